"""What other libraries say that tells a reader nothing, kept back while something runs."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

# Loggers, and how their lines begin that say nothing a reader could act on. Of bitsandbytes: a faster CPU kernel that
# is not installed (fastft never takes it, see `fastft.model.quantize`), and that every 8-bit layer computes in fp16. Of
# transformers: that a text is longer than the model's rows, to which fastft cuts it, or which it refuses it for.
_NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    "transformers.tokenization_utils_base": "Token indices sequence length is longer than",
}

# Warnings to those who call transformers and TRL, and how they begin: PEFT and TRL use older names of methods, and
# fastft trainers that TRL may still change. A reader of fastft's output is neither.
_BETWEEN_LIBRARIES = (r"`(is_)?gradient_checkpointing\w*` is deprecated", r"You are importing from 'trl.experimental'")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the lines of `_NOISE` from being printed while the block runs; the loggers are as before afterwards."""
    with ExitStack() as stack:
        for name, start in _NOISE.items():
            stack.enter_context(kept_back(name, lambda line, start=start: line.startswith(start)))
        yield


@contextmanager
def kept_back(name: str, which: Callable[[str], bool]) -> Iterator[None]:
    """Keep those lines of a logger from being printed, while the block runs, for which `which` is true."""
    logger = logging.getLogger(name)

    def keep(record: logging.LogRecord) -> bool:
        return not which(str(record.msg))

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


@contextmanager
def between_libraries() -> Iterator[None]:
    """Keep back warnings of one library to another, of which the reader is neither, while the block calls them."""
    before = list(warnings.filters)
    for start in _BETWEEN_LIBRARIES:
        warnings.filterwarnings("ignore", start)
    ours = [entry for entry in warnings.filters if entry not in before]
    try:
        yield
    finally:  # only these: the block may be a whole training, in which a callback of the user's sets filters to stay
        for entry in ours:
            if entry in warnings.filters:
                warnings.filters.remove(entry)
