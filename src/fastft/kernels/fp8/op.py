"""fp8 quantisation and products outside the dispatcher, for the operations that are made of them.

x W^T is q_x q_w^T times the scales of x's rows and of W's. The same fp8 values of W serve its gradient: in dy W, the
scales of W's rows belong to the columns of dy, into which they are multiplied before dy's rows are quantised.
"""

import torch
from torch import Tensor

from fastft.kernels.capability import fp8_obstacle
from fastft.kernels.dispatch import use_triton
from fastft.kernels.fp8 import ref
from fastft.kernels.fp8.launch import MAX_RANK, PARTS
from fastft.kernels.nf4.ref import BLOCK
from fastft.kernels.rows import as_matrix

MULTIPLE = 16
"""Both sizes of a factor are multiples of this: 16 bytes, which fp8 GEMMs load at a time."""


def device_obstacle(device: torch.device) -> str:
    """Return why nothing on the device can be computed in fp8, "" if it can."""
    if device.type not in ("cuda", "cpu"):
        return f"device {device.type!r} has no fp8 products; CUDA and the CPU have"
    if device.type == "cpu":
        return ""
    return fp8_obstacle(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def obstacle(device: torch.device, dtype: torch.dtype, n: int, k: int, nf4: bool) -> str:
    """Return why a product with a weight [n, k] cannot be computed in fp8, "" if it can.

    dtype: of its result. nf4: the weight is in NF4. A CPU computes it in fp32 from fp8 factors.
    """
    why = device_obstacle(device)
    if why:
        return why
    if dtype != torch.bfloat16 and not (device.type == "cpu" and dtype == torch.float32):
        return f"it computes in {str(dtype).removeprefix('torch.')}, fp8 products give bfloat16"
    if n % MULTIPLE or k % MULTIPLE:
        return f"its weight is {n} x {k}; fp8 products need multiples of {MULTIPLE}"
    if nf4 and k % BLOCK:
        return f"its rows of {k} are no whole blocks of {BLOCK} of NF4"
    return ""


def quantize_rows(parts: list[Tensor], factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return matrices side by side in fp8 with a scale a row; see `ref.quantize_rows`."""
    if not use_triton(*parts):
        return ref.quantize_rows(parts, factors)
    from fastft.kernels.fp8 import triton as kernels

    parts = [as_matrix(part) for part in parts]
    parts = parts if len(parts) <= PARTS else [torch.cat(parts, dim=1)]
    return kernels.quantize_rows(parts, factors)


def quantize_whole(weight: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a frozen weight [n, k] in fp8 under one scale: [rows, k] and [k, rows], and the scale, fp32 [1].

    rows: at least n; what is beyond it is zero. e4m3 spans 2^17 at the same relative precision, so that one scale costs
    only those rows anything that are thousands of times smaller than the largest.
    """
    n, k = weight.shape
    scale = ref.scale_of(torch.stack(torch.aminmax(weight)).float().abs().amax()).reshape(1)
    q = torch.empty(rows, k, dtype=ref.FP8, device=weight.device)
    q.view(torch.uint8)[n:].zero_()
    turned = torch.empty(k, rows, dtype=ref.FP8, device=weight.device)
    if use_triton(weight):
        from fastft.kernels.fp8 import triton as kernels

        kernels.scale_into(weight.contiguous(), scale, q)
        kernels.transpose_into(q, turned)
    else:
        q[:n] = ref.to_fp8(weight.float() * scale.reciprocal())
        turned.view(torch.uint8).copy_(q.view(torch.uint8).t())
    return q, turned, scale


def weight_rows(weight: Tensor, state: list[Tensor], n: int, k: int) -> tuple[Tensor, Tensor]:
    """Return a frozen weight in fp8 [n, k] and the scales of its rows, fp32 [n].

    weight, state: [n, k] and []; packed NF4 bytes and its state as `lora_linears` takes it; or, held in fp8 (or as the
    bytes of that), [n, k] and [scales [n] fp32], which are given back, or [scales, the same values as [k, n]].
    """
    if ref.held(weight, n, k) or not use_triton(weight):
        return ref.weight_rows(weight, state, n, k)
    if not state:
        q, scale = quantize_rows([weight])
        return q, scale.view(-1)
    from fastft.kernels.fp8 import triton as kernels

    out = torch.empty(n, k, dtype=ref.FP8, device=weight.device)
    scale = torch.empty(n, dtype=torch.float32, device=weight.device)
    kernels.nf4_to_fp8(weight, state, n, k, out, scale, transposed=False)
    return out, scale


def weight_columns(
    weights: list[Tensor], states: list[list[Tensor]], sizes: list[int], k: int
) -> tuple[Tensor, Tensor]:
    """Return weights one under the other, transposed: fp8 [k, sum of n_i] and the scales of their rows [sum of n_i].

    weights, states: as `weight_rows` takes them, n_i = sizes[i]. The values are those of `weight_rows`. What is held
    as [k, n_i] is copied together, and given back as it is where it lies so already (`side_by_side`).
    """
    turned = [ref.held_turned(*given, k) for given in zip(weights, states, sizes)]
    if all(columns is not None for columns in turned):
        whole, scales = side_by_side(turned), side_by_side([state[0] for state in states])
        if whole is not None and scales is not None:
            return whole, scales
    device, width = weights[0].device, sum(sizes)
    out = torch.empty(k, width, dtype=ref.FP8, device=device)
    scale = torch.empty(width, dtype=torch.float32, device=device)
    start = 0
    for weight, state, n in zip(weights, states, sizes):
        columns, own = out[:, start : start + n], scale[start : start + n]
        _transposed_into(weight, state, n, k, columns, own)
        start += n
    return out, scale


def side_by_side(parts: list[Tensor]) -> Tensor | None:
    """Return the contiguous tensor [..., sum of n_i] of which the parts [..., n_i] are all columns in order, if any."""
    first, width = parts[0], sum(part.shape[-1] for part in parts)
    start, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    strides = (width, 1)[-first.dim() :]
    for part in parts:
        if part.data_ptr() != start or part.untyped_storage().data_ptr() != storage or part.stride() != strides:
            return None
        start += part.shape[-1] * part.element_size()
    return first.as_strided((*first.shape[:-1], width), strides)


def _transposed_into(weight: Tensor, state: list[Tensor], n: int, k: int, out: Tensor, scale: Tensor) -> None:
    turned = ref.held_turned(weight, state, n, k)
    if turned is not None:
        out.view(torch.uint8).copy_(turned.view(torch.uint8))
        made = state[0]
    elif use_triton(weight):
        from fastft.kernels.fp8 import triton as kernels

        if state and not ref.held(weight, n, k):
            kernels.nf4_to_fp8(weight, state, n, k, out, scale, transposed=True)
            return
        q, made = weight_rows(weight, state, n, k)
        kernels.transpose_into(q, out)
    else:
        q, made = ref.weight_rows(weight, state, n, k)
        out.view(torch.uint8).copy_(q.view(torch.uint8).t())
    scale.copy_(made)


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an fp8 weight [n, k] with the scales of its rows, fp32 [n], in `dtype`."""
    if not use_triton(weight) or dtype == torch.float64:
        return ref.dequantize(weight, scale, dtype)
    from fastft.kernels.fp8 import triton as kernels

    return kernels.dequantize(weight.contiguous(), scale, dtype)


def product(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    dtype: torch.dtype,
    fast: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Return (q scale) (weight weight_scale)^T in `dtype`, [M, N].

    q: fp8 [M, K], scale fp32 [M, 1]. weight: fp8 [N, K], weight_scale fp32 [N], [1] for one that all rows
    share, None for ones. fast: on CUDA, partial sums stay in the tensor cores, which keep fewer bits of them than fp32
    has. out: [M, N], where the product is to be written.
    """
    if weight_scale is None:
        weight_scale = torch.ones(weight.shape[0], dtype=torch.float32, device=weight.device)
    columns = weight_scale.reshape(1, -1).expand(1, weight.shape[0]).contiguous()
    if q.shape[0] == 0:
        return torch.empty(0, weight.shape[0], dtype=dtype, device=q.device)
    if q.device.type == "cpu":  # torch's own takes several scales there in some versions, on some processors
        made = ref.product(q, scale, weight, columns, dtype)
        return made if out is None else out.copy_(made)
    into = {} if out is None else {"out": out}
    return torch._scaled_mm(q, weight.t(), scale_a=scale, scale_b=columns, out_dtype=dtype, use_fast_accum=fast, **into)


def low_rank_add_(y: Tensor, left: Tensor, right: Tensor, scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
    """Add scale * left right^T + bias to y [M, N] in place and return it: left [M, r], right [N, r], bias [N]."""
    r = left.shape[1]
    if use_triton(y) and 0 < r <= MAX_RANK and left.stride(1) == 1 and left.dtype == right.dtype == y.dtype:
        from fastft.kernels.fp8 import triton as kernels

        return kernels.low_rank_add_(y, left, right, scale, bias)
    if bias is not None:
        y.add_(bias)
    return y.addmm_(left, right.t(), alpha=scale) if r else y
