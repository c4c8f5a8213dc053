"""What the first graph needs beside itself, made ready while nothing waits for it yet.

Inductor's workers, Triton's hash, and the kernels of fused operations.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from threading import Thread

import torch
from attrs import define


def prepare_inductor(backend: str, device: torch.device) -> None:
    """Begin, in the background, what lowering layers on `device` will need; safe to call again.

    Nothing is done where the user has switched it off (`torch._inductor.config.compile_threads`, `TORCH_WARM_POOL=0`),
    nor by a torch that has no such functions: the first graph then waits for it, as it does without fastft.
    """
    if backend != "inductor":
        return
    with suppress(ImportError):
        _hash_triton()
    if device.type == "cuda":
        with suppress(ImportError):
            _start_workers()


def _start_workers() -> None:
    """Start the processes that compile Triton kernels side by side.

    A fresh one imports torch for seconds, and until they are ready Inductor compiles one kernel after the other in this
    process. `torch.compile` starts them for its own backend "inductor" alone, and not before the first graph.
    """
    from torch._inductor.async_compile import maybe_warm_pool

    maybe_warm_pool()


@cache
def _hash_triton() -> None:
    """Hash Triton's libraries, hundreds of MB, which stand in the key of every compiled graph.

    Reading and hashing leave the interpreter to others. Triton remembers the hash; whoever asks before it is there
    makes it anew.
    """
    from torch._inductor.runtime.triton_compat import HAS_TRITON, triton_key

    def ask() -> None:
        with suppress(Exception):  # the first graph asks again, and tells
            triton_key()

    if HAS_TRITON:
        Thread(target=ask, name="fastft-hash-triton", daemon=True).start()


@define(eq=False)
class Ahead:
    """Calls that are being made in threads of their own."""

    threads: tuple[Thread, ...] = ()

    def join(self) -> None:
        """Wait for the calls, and give back the workspaces that cuBLAS took for their threads, and would keep."""
        threads, self.threads = self.threads, ()
        for thread in threads:
            thread.join()
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if threads and clear is not None:
            clear()


def make_ahead(calls: Sequence[Callable[[], None]], device: torch.device) -> Ahead:
    """Make each of `calls` in a thread of its own; none where `device` is not a GPU.

    One that fails is made again by whoever needs it, who then tells.
    """

    def run(call: Callable[[], None]) -> None:
        with suppress(Exception), torch.cuda.device(device):
            call()

    # No daemons: one that is within torch would abort a process that ends.
    threads = [Thread(target=run, args=(call,), name="fastft-first-call") for call in calls if device.type == "cuda"]
    for thread in threads:
        thread.start()
    return Ahead(tuple(threads))
