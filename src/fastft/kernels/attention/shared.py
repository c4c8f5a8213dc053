"""Attention of completions that share prompts: `fastft::shared_attention`.

Prompts lie first, then the completions, those of a prompt side by side. Every prompt and every completion attends to
itself causally; then each group of completions attends to its prompt, all of it. The two merge by their logsumexps, so
that a completion sees what it would see behind a copy of the prompt of its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastft.errors import Problem, UsageError
from fastft.kernels.attention.parts import Part, autocast, part_backward, part_forward


class SharedPrompts(NamedTuple):
    """Where prompts and completions lie in one row of T tokens. A tuple, which compilers and wrappers look into.

    segments: offsets [prompts + completions + 1] of all of them. prompts: offsets [prompts + 1] of the prompts. groups:
    offsets [prompts + 1] of each prompt's completions, counted from the end of the prompts. int32, none of them empty.
    numbers: `Numbers` as a tensor on the CPU, so that no compiled layer is made for one of them.
    """

    segments: Tensor
    prompts: Tensor
    groups: Tensor
    numbers: Tensor


class Numbers(NamedTuple):
    """The tokens of all prompts, the longest segment, prompt and group, and the longest prompt with a completion."""

    prompt_tokens: int
    longest_segment: int
    longest_prompt: int
    longest_group: int
    longest_row: int


def shared_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, shared: SharedPrompts, window: int | None = None
) -> Tensor:
    """Return the attention [1, H, T, D] of q [1, H, T, D] over k, v [1, Hk, T, D] that `shared` describes.

    window: how many tokens a query may see, itself included. Raises UsageError where a row is longer.
    """
    q, k, v = (t.transpose(1, 2).squeeze(0) for t in autocast(q, k, v))
    out, _ = torch.ops.fastft.shared_attention(q, k, v, *shared, scale, -1 if window is None else window)
    return out.unsqueeze(0).transpose(1, 2)


def shared_pairs(length: int, shared: SharedPrompts) -> Tensor:
    """Return the bool mask [T, T] of pairs (query, key) that `shared` describes."""
    tokens = shared.prompts[-1]
    position = torch.arange(length, device=shared.segments.device)
    segment = torch.bucketize(position, shared.segments[1:].long(), right=True)
    prompt = torch.bucketize(position, shared.prompts[1:].long(), right=True)  # of completions: behind the last
    group = torch.bucketize(position, shared.groups[1:].long() + tokens, right=True)
    own = (segment[:, None] == segment[None, :]) & (position[None, :] <= position[:, None])
    completion = position >= tokens
    return own | (completion[:, None] & ~completion[None, :] & (group[:, None] == prompt[None, :]))


def _parts(segments: Tensor, prompts: Tensor, groups: Tensor, at: Numbers, scale: float) -> tuple[Part, Part]:
    """Return what every token sees in its own segment, and what completions see above them, in their prompt."""
    own = Part((segments, segments), (at.longest_segment, at.longest_segment), True, scale)
    return own, Part((groups, prompts), (at.longest_group, at.longest_prompt), False, scale)


@torch.library.custom_op("fastft::shared_attention", mutates_args=())
def _shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    prompts: Tensor,
    groups: Tensor,
    numbers: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Return (output [T, H, D], logsumexp [H, T]) of q [T, H, D] over k, v [T, Hk, D]; see `SharedPrompts`.

    window: -1 for none.
    """
    at = Numbers(*numbers.tolist())
    if 0 <= window < at.longest_row:
        raise UsageError(
            Problem("shared_prompts", f"rows of {at.longest_row} tokens", f"at most {window}, the sliding window")
        )
    q, k, v = (t.contiguous() for t in (q, k, v))
    head, tail = slice(at.prompt_tokens), slice(at.prompt_tokens, None)
    own, above = _parts(segments, prompts, groups, at, scale)
    out, lse = part_forward(q, k, v, own)
    out_above, lse_above = part_forward(q[tail], k[head], v[head], above)
    merged = torch.logaddexp(lse[:, tail], lse_above)
    shares = ((part - merged).exp_().t()[..., None] for part in (lse[:, tail], lse_above))
    out[tail] = sum(share * part for share, part in zip(shares, (out[tail], out_above), strict=True)).to(out.dtype)
    lse[:, tail] = merged
    return out, lse


@_shared_attention.register_fake
def _(q, k, v, segments, prompts, groups, numbers, scale, window):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


@torch.library.custom_op("fastft::shared_attention_backward", mutates_args=())
def _shared_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    prompts: Tensor,
    groups: Tensor,
    numbers: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv)."""
    at = Numbers(*numbers.tolist())
    grad, q, k, v = (t.contiguous() for t in (grad, q, k, v))
    head, tail = slice(at.prompt_tokens), slice(at.prompt_tokens, None)
    own, above = _parts(segments, prompts, groups, at, scale)
    dq, dk, dv = part_backward(grad, q, k, v, out, lse, own)
    shares = part_backward(grad[tail], q[tail], k[head], v[head], out[tail], lse[:, tail], above)
    for whole, share, rows in zip((dq, dk, dv), shares, (tail, head, head), strict=True):
        whole[rows] += share
    return dq, dk, dv


@_shared_attention_backward.register_fake
def _(grad, q, k, v, out, lse, segments, prompts, groups, numbers, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:7])
    ctx.scale = inputs[7]


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 9
    made = torch.ops.fastft.shared_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return *made, *(None,) * 6


_shared_attention.register_autograd(_backward, setup_context=_setup_context)
