"""Which implementation an op runs: the Triton kernel, or the torch reference."""

import torch

from fastft.environment import installed, triton_interpreted


def use_triton(*tensors: torch.Tensor | None) -> bool:
    """Say whether an op on these tensors runs its Triton kernel rather than the torch reference.

    CUDA tensors use Triton where it is installed. CPU tensors use the reference, or Triton's interpreter when
    `TRITON_INTERPRET=1`. Other devices, and fp64 (which the kernels do not compute in), use the reference.
    `None` stands for an optional tensor that was not given.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if not given or not installed("triton") or any(tensor.dtype == torch.float64 for tensor in given):
        return False
    devices = {tensor.device.type for tensor in given}
    return devices == {"cuda"} or (devices == {"cpu"} and triton_interpreted())
