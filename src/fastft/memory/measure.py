"""The bytes that a loaded model takes, as the estimate wants them, and the memory of the host."""

import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastft.memory.estimate import Setup
from fastft.memory.shape import shape_of
from fastft.registry.spec import ModelSpec
from fastft.state import base_model, quant_of

# AdamW: two numbers a trained parameter, in its own dtype.
OPTIMIZER_NUMBERS = 2
UNKNOWN_HOST = 16 << 30


def setup_of_model(model: nn.Module, spec: ModelSpec) -> Setup:
    """Return the setup of a loaded model with its weights counted, for a batch yet unknown (no rows, no length).

    The optimizer is taken to be AdamW, and the last norm to be computed by transformers. Raises UsageError where the
    config does not tell the sizes.
    """
    base = base_model(model)
    shape = shape_of(base.config.to_dict(), spec)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    bytes_trained = _bytes(trained.values())
    everything = _bytes([*model.parameters(), *model.buffers(), *_quantisation(model)])
    full = bool(trained) and not any("lora_" in name for name in trained)
    ranks = [p.shape[0] for name, p in trained.items() if "lora_A" in name and p.dim() == 2]
    hidden = base.get_input_embeddings().weight
    element = hidden.element_size()
    return Setup(
        shape, 0, 0, everything if full else everything - bytes_trained, 0 if full else bytes_trained,
        bytes_trained, OPTIMIZER_NUMBERS * bytes_trained, max(ranks, default=0), full, quant_of(model), element,
        norm="eager",
    )  # fmt: skip


def host_memory() -> int:
    """Return the CPU memory in bytes that is available, as Linux tells it; elsewhere 16 GiB is taken for granted."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return UNKNOWN_HOST
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    return sizes.get("MemAvailable", UNKNOWN_HOST)


def host_peak() -> int:
    """Return the most memory that this process has had resident so far, in bytes; 0 where the system does not tell.

    Linux's `ru_maxrss` begins with that of the process that started this one, so /proc is read there.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    if sys.platform == "win32":
        return 0
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _bytes(tensors: Any) -> int:
    """Return the bytes of the tensors' memory, shared memory counted once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(sizes.values())


def _quantisation(model: nn.Module) -> list[Tensor]:
    """Return the tensors of bitsandbytes' quantisation states, which are no buffers."""
    found = []
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found += [state.absmax]
            if state.nested:
                found += [state.state2.absmax, state.state2.code]
        scales = getattr(parameter, "SCB", None)
        found += [scales] if scales is not None else []
    return found
