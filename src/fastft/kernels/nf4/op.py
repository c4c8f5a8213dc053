"""The registered op `fastft::nf4_dequantize`, and the same work into a buffer that the caller owns."""

from contextlib import nullcontext

import torch
from torch import Tensor

from fastft.errors import Problem, UsageError
from fastft.kernels.dispatch import use_triton
from fastft.kernels.nf4 import ref
from fastft.kernels.nf4.launch import Nf4Launch, heuristic


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
    """Dequantise a weight stored as bitsandbytes stores NF4; byte-equal to `dequantize_4bit`. Not differentiable.

    packed: ceil(numel / 2) bytes of any shape (or another 1-d storage dtype of the same bytes), high nibble first.
    absmax: one scale per 64 weights, fp32; or, double quantised, uint8 indices into code2 [256] fp32, which are
    multiplied by absmax2 (fp32, one per 256 scales) and added to offset (fp32 scalar). Without double quantisation
    code2, absmax2 and offset are None. Returns [out_features, in_features] in `dtype`, contiguous.
    Raises UsageError where the sizes do not fit together.
    """
    return torch.ops.fastft.nf4_dequantize(packed, absmax, code2, absmax2, offset, out_features, in_features, dtype)


def dequantize_into(
    packed: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
    launch: Nf4Launch | None = None,
) -> Tensor:
    """Do the work of `nf4_dequantize` outside the dispatcher, into `out` where it is given.

    out: contiguous, [out_features, in_features] in `dtype`; a buffer that several weights reuse one after another.
    launch: settings other than the heuristic's.
    """
    _check(packed, absmax, code2, absmax2, offset, out_features, in_features, dtype, out)
    if not use_triton(packed, absmax):
        value = ref.nf4_dequantize(packed, absmax, code2, absmax2, offset, out_features, in_features, dtype)
        return value if out is None else out.copy_(value)
    if out is None:
        out = torch.empty(out_features, in_features, dtype=dtype, device=packed.device)
    _launch(packed, absmax, code2, absmax2, offset, out, launch or heuristic(out.numel()))
    return out


def _launch(
    packed: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
    launch: Nf4Launch,
) -> None:
    from fastft.kernels.nf4.triton import nf4_dequantize_kernel

    numel = out.numel()
    if numel == 0:
        return
    data = packed.contiguous().view(torch.uint8).reshape(-1)
    per_word = 8 if numel % 8 == 0 and data.data_ptr() % 4 == 0 else 2
    if per_word == 8:
        data = data[: numel // 2].view(torch.int32)
    programs = -(-numel // (ref.BLOCK * launch.blocks))
    nested = code2 is not None
    # fp fusion off: bitsandbytes rounds code2 * absmax2 before it adds the offset, a fused multiply-add would not.
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        nf4_dequantize_kernel[(programs,)](
            data, absmax.contiguous(), code2, absmax2, offset, out, numel,
            NESTED=nested, PER_WORD=per_word, BLOCKS=launch.blocks,
            EVEN=numel % (ref.BLOCK * launch.blocks) == 0, GATHER=launch.gather,
            num_warps=launch.num_warps, enable_fp_fusion=False,
        )  # fmt: skip


def _check(
    packed: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    out: Tensor | None,
) -> None:
    numel = out_features * in_features
    blocks = -(-numel // ref.BLOCK)
    size = packed.numel() * packed.element_size()
    problems = []
    if size < (numel + 1) // 2:
        problems.append(
            Problem("nf4 packed", f"{size} bytes", f"{(numel + 1) // 2} bytes for {out_features} x {in_features}")
        )
    if absmax.numel() != blocks:
        problems.append(Problem("nf4 absmax", absmax.numel(), f"{blocks} scales, one per {ref.BLOCK} weights"))
    given = [value is not None for value in (code2, absmax2, offset)]
    if any(given) != all(given):
        problems.append(Problem("nf4 code2, absmax2, offset", given, "all three or none"))
    expected = torch.uint8 if all(given) else torch.float32
    if absmax.dtype != expected:
        problems.append(
            Problem("nf4 absmax dtype", absmax.dtype, f"{expected} {'with' if all(given) else 'without'} code2")
        )
    if all(given) and absmax2.numel() != -(-blocks // ref.BLOCK2):
        problems.append(Problem("nf4 absmax2", absmax2.numel(), f"{-(-blocks // ref.BLOCK2)} scales"))
    for name, value in (("code2", code2), ("absmax2", absmax2), ("offset", offset)):
        if value is not None and value.dtype != torch.float32:
            problems.append(Problem(f"nf4 {name} dtype", value.dtype, "torch.float32"))
    if out is not None and (
        tuple(out.shape) != (out_features, in_features) or out.dtype != dtype or not out.is_contiguous()
    ):
        problems.append(
            Problem("nf4 out", f"{out.dtype} {tuple(out.shape)}", f"contiguous {dtype} {(out_features, in_features)}")
        )
    if problems:
        raise UsageError(*problems)


@torch.library.custom_op("fastft::nf4_dequantize", mutates_args=())
def _nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return dequantize_into(packed, absmax, code2, absmax2, offset, out_features, in_features, dtype)


@_nf4_dequantize.register_fake
def _(packed, absmax, code2, absmax2, offset, out_features, in_features, dtype):
    return packed.new_empty(out_features, in_features, dtype=dtype)
