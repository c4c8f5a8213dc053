"""NF4 dequantisation in plain torch: the meaning of the format, byte-equal to bitsandbytes."""

import torch
import torch.nn.functional as F
from torch import Tensor

# The 16 levels of NF4: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", appendix E.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64  # weights that share one absmax
BLOCK2 = 256  # absmax values that share one second-level absmax


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight [out_features, in_features] in `dtype`; see `fastft.kernels.nf4.op.nf4_dequantize`.

    Everything is computed in fp32, each product and sum rounded by itself, and rounded to `dtype` once at the end.
    """
    numel = out_features * in_features
    blocks = -(-numel // BLOCK)
    scale = block_scales(absmax, code2, absmax2, offset)
    data = packed.view(torch.uint8).reshape(-1)
    index = torch.stack((data >> 4, data & 15), -1).reshape(-1)[:numel]  # the high nibble comes first
    value = packed.new_tensor(LEVELS, dtype=torch.float32)[index.int()]
    value = F.pad(value, (0, blocks * BLOCK - numel)).view(blocks, BLOCK) * scale[:, None]
    return value.reshape(-1)[:numel].view(out_features, in_features).to(dtype)


def block_scales(absmax: Tensor, code2: Tensor | None, absmax2: Tensor | None, offset: Tensor | None) -> Tensor:
    """Return the scale of every block of 64 weights, fp32."""
    scale = absmax.reshape(-1)
    if code2 is None:
        return scale
    return code2[scale.int()] * absmax2.reshape(-1).repeat_interleave(BLOCK2)[: scale.numel()] + offset
