"""Inductor's worker processes, which compile Triton kernels side by side: started before a graph needs them."""

import torch


def start_workers(backend: str, device: torch.device) -> None:
    """Start them in the background where layers on `device` become Triton kernels; safe to call again.

    A fresh one imports torch for seconds, and until they are ready Inductor compiles one kernel after the other in this
    process. `torch.compile` starts them for its own backend "inductor" alone, and not before the first graph. They do
    nothing where the user has switched them off (`torch._inductor.config.compile_threads`, `TORCH_WARM_POOL=0`).
    """
    if backend != "inductor" or device.type != "cuda":
        return
    from torch._inductor.async_compile import maybe_warm_pool

    maybe_warm_pool()
