"""Lines of other libraries' loggers that tell a reader nothing, kept back while something runs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# Loggers of bitsandbytes, and how the lines begin that say nothing a reader could act on: a faster CPU kernel that is
# not installed (fastft never takes it, see `fastft.model.quantize`), and that every 8-bit layer computes in fp16.
_NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep two lines of bitsandbytes from being printed while the block runs; its loggers are as before afterwards."""
    added = []
    for name, start in _NOISE.items():
        logger = logging.getLogger(name)
        keep = lambda record, start=start: not str(record.msg).startswith(start)  # noqa: E731
        logger.addFilter(keep)
        added.append((logger, keep))
    try:
        yield
    finally:
        for logger, keep in added:
            logger.removeFilter(keep)
