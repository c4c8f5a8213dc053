"""Which implementation an op runs, the Triton kernel or the torch reference, and on which device it is launched."""

from contextlib import AbstractContextManager, nullcontext

import torch

from fastft.environment import installed, triton_interpreted


def use_triton(*tensors: torch.Tensor | None) -> bool:
    """Say whether an op on these tensors runs its Triton kernel rather than the torch reference.

    CUDA tensors use Triton where it is installed. CPU tensors use the reference, or Triton's interpreter when
    `TRITON_INTERPRET=1`. Other devices, and fp64 (which the kernels do not compute in), use the reference.
    `None` stands for an optional tensor that was not given.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if not given or any(tensor.dtype == torch.float64 for tensor in given):
        return False
    devices = {tensor.device.type for tensor in given}
    if devices != {"cuda"} and not (devices == {"cpu"} and triton_interpreted()):
        return False
    return installed("triton")


def launch_on(tensor: torch.Tensor) -> AbstractContextManager:
    """Make the tensor's GPU the current one, which is where Triton launches; does nothing for a CPU tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def processors(device: torch.device) -> int:
    """Return how many multiprocessors the device has; 2 for the interpreter, so that tests see several programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
