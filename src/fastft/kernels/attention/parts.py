"""One part of an attention whose keys come in several parts: its output and logsumexp, and its share of the gradient.

Sequences lie end to end, [T, H, D], and offsets [n + 1] int32 say where each begins; sequence i of the queries sees
sequence i of the keys. Parts over disjoint keys merge by their logsumexps, and the gradient of the merged attention is
the sum of each part's, given the merged output and logsumexp (as in ring attention, Liu et al., 2023).
"""

import itertools

import torch
from attrs import frozen
from torch import Tensor

FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_HEAD_SIZE = 256
FLASH_CAPABILITY = (8, 0)


def flash_refusal(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Say why FlashAttention cannot compute attention of such tensors, or nothing if it can."""
    if device.type != "cuda":
        return f"FlashAttention needs a CUDA device, not {device.type}"
    if dtype not in FLASH_DTYPES:
        return f"FlashAttention needs 16-bit numbers, not {dtype}"
    if head_size > FLASH_HEAD_SIZE or head_size % 8:
        return f"FlashAttention knows heads of multiples of 8 up to {FLASH_HEAD_SIZE}, not {head_size}"
    return ""


def _flash(q: Tensor) -> bool:
    """Say whether FlashAttention computes attention of such queries here: older GPUs do not have it."""
    return not flash_refusal(q.device, q.dtype, q.shape[-1]) and (
        torch.cuda.get_device_capability(q.device) >= FLASH_CAPABILITY
    )


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return queries, keys and values in the dtype in which torch's own attention would compute them."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


@frozen(eq=False)
class Part:
    """Which queries see which keys.

    offsets: of the queries' and of the keys' sequences. longest: the longest of each. causal: query i of a sequence
    sees keys 0 to i of its own, else all. scale: of the scores. before: of a causal part, how many keys before its own
    a query sees; -1 for all.
    """

    offsets: tuple[Tensor, Tensor]
    longest: tuple[int, int]
    causal: bool
    scale: float
    before: int = -1

    @property
    def flash(self) -> tuple[bool, dict[str, int]]:
        """Return what FlashAttention takes for `causal` and `before`: whether all before is seen, and a window."""
        if self.causal and self.before >= 0:
            return False, {"window_size_left": self.before, "window_size_right": 0}
        return self.causal, {}


def part_forward(q: Tensor, k: Tensor, v: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Return (output [T, H, D], logsumexp [H, T] fp32) of q [T, H, D] over k, v [S, Hk, D], Hk a divisor of H."""
    if not _flash(q):
        return _torch_forward(q, k, v, part)
    causal, window = part.flash
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *part.offsets, *part.longest, 0.0, causal, False, scale=part.scale, **window
    )
    return out, lse


def part_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: Part
) -> tuple[Tensor, Tensor, Tensor]:
    """Return this part's share of (dq, dk, dv); out, its gradient, and lse are those of the merged attention."""
    if not _flash(q):
        return _torch_backward(grad, q, k, v, out, lse, part)
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the dropout that there is not
    unused = torch.empty(0, device=q.device)
    causal, window = part.flash
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse.contiguous(), *part.offsets, *part.longest, 0.0, causal, state, unused,
        scale=part.scale, **window,
    )  # fmt: skip


def _sequences(offsets: tuple[Tensor, Tensor]) -> list[tuple[slice, slice]]:
    """Return the rows of each sequence's queries and keys."""
    pairs = (itertools.starmap(slice, itertools.pairwise(ends.tolist())) for ends in offsets)
    return list(zip(*pairs, strict=True))


def _heads_first(t: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[T, Hk, D] -> [H, T, D], each key's head repeated for its group of queries."""
    return t.to(dtype).transpose(0, 1).repeat_interleave(heads // t.shape[1], dim=0)


def _scores(q: Tensor, k: Tensor, part: Part) -> Tensor:
    scores = torch.matmul(q, k.transpose(1, 2)) * part.scale
    if part.causal:
        seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).tril()
        seen = seen.triu(-part.before) if part.before >= 0 else seen
        scores = scores.masked_fill_(~seen, -float("inf"))
    return scores


def _torch_forward(q: Tensor, k: Tensor, v: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    heads, work = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, q.shape[0], dtype=work, device=q.device)
    for rows, keys in _sequences(part.offsets):
        qs, ks, vs = (_heads_first(t[at], heads, work) for t, at in ((q, rows), (k, keys), (v, keys)))
        scores = _scores(qs, ks, part)
        lse[:, rows] = torch.logsumexp(scores, -1)
        out[rows] = torch.matmul((scores - lse[:, rows, None]).exp_(), vs).transpose(0, 1).to(q.dtype)
    return out, lse


def _torch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: Part
) -> tuple[Tensor, Tensor, Tensor]:
    heads, work = q.shape[1], lse.dtype
    made = [torch.zeros(t.shape, dtype=work, device=q.device) for t in (q, k, v)]
    inner = (grad.to(work) * out.to(work)).sum(-1).t()  # of each row, [H, T]
    for rows, keys in _sequences(part.offsets):
        qs, ks, vs, gs = (_heads_first(t[at], heads, work) for t, at in ((q, rows), (k, keys), (v, keys), (grad, rows)))
        p = (_scores(qs, ks, part) - lse[:, rows, None]).exp_()
        ds = p * (torch.matmul(gs, vs.transpose(1, 2)) - inner[:, rows, None]) * part.scale
        shares = torch.matmul(ds, ks), torch.matmul(ds.transpose(1, 2), qs), torch.matmul(p.transpose(1, 2), gs)
        for whole, share, at in zip(made, shares, (rows, keys, keys), strict=True):
            whole[at] += share.unflatten(0, (whole.shape[1], -1)).sum(1).transpose(0, 1)
    return tuple(whole.to(q.dtype) for whole in made)
