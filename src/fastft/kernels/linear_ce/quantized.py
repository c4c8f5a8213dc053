"""The loss head's two large products with fp8 factors: logits, and the gradient of hidden states.

The label's own column has none. Its logit is made in the dtype of the hidden states, and so is its share of the
gradient, (p_y - 1) W_y: in a confident row p_y W_y and W_y nearly cancel, and the rounding of either would be larger
than what remains. What has fp8 factors is sum over j != y of p_j W_j, whose row has a scale of its own.
"""

import torch
from attrs import frozen
from torch import Tensor

from fastft.kernels import fp8
from fastft.kernels.rows import ceil_div


@frozen(eq=False)
class Quantized:
    """The gradient over rows of logits: fp8 values [rows, V], their scale and the label's own entry, fp32 [rows]."""

    values: Tensor
    scale: Tensor
    slope: Tensor


@frozen(eq=False)
class Fp8Head:
    """A frozen head weight [V, D], and in fp8 under one scale, fp32 [1]: rows [P, D], columns [D, P], P >= V."""

    weight: Tensor
    rows: Tensor
    columns: Tensor
    scale: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "Fp8Head":
        """Quantise a weight [V, D], D a multiple of `fp8.MULTIPLE`."""
        return cls(weight, *fp8_factors(weight))

    @classmethod
    def kept(cls, weight: Tensor, factors: list[Tensor]) -> "Fp8Head":
        """Return the same from what `fp8_factors` made of the weight (or the bytes of that)."""
        rows, columns, scale = factors
        return cls(weight, rows.view(fp8.ref.FP8), columns.view(fp8.ref.FP8), scale)

    def buffers(self, height: int, dtype: torch.dtype) -> tuple[Tensor, Quantized]:
        """Return memory for the logits [height, P] of a chunk and for their gradient."""
        where, wide = self.weight.device, self.rows.shape[0]
        values = torch.empty(height, wide, dtype=fp8.ref.FP8, device=where)
        values.view(torch.uint8)[:, self.weight.shape[0] :].zero_()
        narrow = (torch.empty(height, dtype=torch.float32, device=where) for _ in range(2))
        return torch.empty(height, wide, dtype=dtype, device=where), Quantized(values, *narrow)

    def logits(self, hidden: Tensor, bias: Tensor | None, target: Tensor, own: Tensor, out: Tensor) -> Tensor:
        """Write hidden W^T + bias [rows, V] into out [rows, P] and return it; own: W's rows of the targets."""
        made = fp8.product(*fp8.quantize_rows([hidden]), self.rows, self.scale, hidden.dtype, out=out)
        made = made[:, : self.weight.shape[0]]
        exact = torch.bmm(hidden[:, None, :], own[:, :, None])[:, 0]
        if bias is not None:
            made.add_(bias)
            exact = exact + bias[target][:, None]
        return made.scatter_(1, target[:, None], exact)

    def input_gradient(self, made: Quantized, own: Tensor) -> Tensor:
        """Return the gradient of hidden [rows, D] from that of the logits."""
        dtype = own.dtype
        others = fp8.product(made.values, made.scale[:, None], self.columns, self.scale, dtype)
        return torch.addcmul(others, made.slope.to(dtype)[:, None], own)


def fp8_factors(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a frozen head weight [V, D] in fp8 as rows and as columns, V padded to `fp8.MULTIPLE`, and its scale."""
    padded = ceil_div(weight.shape[0], fp8.MULTIPLE) * fp8.MULTIPLE
    return fp8.quantize_whole(weight, padded)


def quantize_(dlogits: Tensor, target: Tensor, into: Quantized) -> None:
    """Quantise a gradient over logits [rows, V] in plain torch; the label's own entry becomes zero in it."""
    into.slope.copy_(dlogits.gather(1, target[:, None])[:, 0])
    dlogits.scatter_(1, target[:, None], 0.0)
    q, scale = fp8.ref.quantize_rows([dlogits])
    into.values[:, : dlogits.shape[1]] = q
    into.scale.copy_(scale[:, 0])
