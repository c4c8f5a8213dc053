"""How a batch of prompts and completions is laid out for the backbone, without padding where that is exact.

padded: as it came. packed: the rows end to end, each a document of its own. shared: every distinct prompt once, then
the completions, which see their prompt and themselves (`fastft.kernels.attention.SharedPrompts`).

Lengths and prompts are compared on the host, which waits for the device once.
"""

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from fastft.graph import attention
from fastft.graph.head import find_spec, unwrapped
from fastft.kernels.attention import Numbers, SharedPrompts
from fastft.kernels.attention.parts import flash_refusal
from fastft.state import base_model
from fastft.train import dropping
from fastft.train.flops import windows_of

ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


@frozen(eq=False)
class Layout:
    """Where the tokens of a batch [B, T] stand in the backbone's input, and where its results belong.

    kind: "padded", "packed" or "shared"; reason: why not "shared". inputs: what the backbone takes. before: of each of
    the n completion tokens, the index of the token before it in the flattened input. places: its index in [B * keep].
    """

    kind: str
    reason: str
    inputs: dict[str, Any]
    before: Tensor
    places: Tensor


@frozen(eq=False)
class Lengths:
    """Tokens of every row's prompt and completion; `columns` is T, `keep` how many of them are the completions'."""

    prompts: tuple[int, ...]
    completions: tuple[int, ...]
    columns: int
    keep: int

    @property
    def whole(self) -> list[int]:
        """The lengths of prompt and completion together."""
        return [a + b for a, b in zip(self.prompts, self.completions, strict=True)]


def lay_out(model: Any, input_ids: Tensor, attention_mask: Tensor, keep: int, share_prompts: bool = True) -> Layout:
    """Return the most compact layout that gives `model` the same results as every row alone.

    input_ids, attention_mask: int64 `[B, T]`, prompts padded on the left, the last `keep` columns on the right. Rows
    whose completion is empty are left out of the packed and the shared layout.
    """
    ids, mask = input_ids.cpu(), attention_mask.cpu() != 0
    lengths = _lengths(mask, keep)
    if lengths is None:
        why = "the mask is not that of prompts padded on the left, none of them empty, and completions on the right"
        return _padded(model, input_ids, attention_mask, mask, keep, why)
    reason = packing_refusal(model)
    rows = [row for row, size in enumerate(lengths.completions) if size]
    if reason or not rows:
        return _padded(model, input_ids, attention_mask, mask, keep, reason or "every completion is empty")
    groups = _groups(ids, lengths, rows)
    if not share_prompts:
        reason = "share_prompts is off"
    elif len(groups) == len(rows):
        reason = "no two rows have the same prompt"
    else:
        reason = sharing_refusal(model, max(lengths.whole[row] for row in rows))
    return _packed(input_ids, lengths, rows, reason) if reason else _shared(input_ids, lengths, groups)


def packing_refusal(model: Any) -> str:
    """Say why rows cannot be laid end to end for `model`, or nothing if they can."""
    base = base_model(unwrapped(model))
    given = base.config._attn_implementation
    if given != attention.NAME:
        return f"the attention implementation is {given!r}; that of fastft.compile(model) lays rows end to end"
    if find_spec(base) is None:
        return f"no spec describes {base.config.model_type!r}"
    other = set(getattr(base.config.get_text_config(), "layer_types", None) or ()) - ATTENTION_LAYERS
    return f"layers of the type {', '.join(sorted(other))} mix tokens by other means than attention" if other else ""


def sharing_refusal(model: Any, longest_row: int) -> str:
    """Say why a prompt cannot be computed once for several completions, or nothing if it can."""
    base = base_model(unwrapped(model))
    config, device = base.config.get_text_config(), base.get_input_embeddings().weight.device
    windows = [window for window in windows_of(config) if window is not None]
    if windows and longest_row > min(windows):
        return f"a row of {longest_row} tokens does not fit the sliding window of {min(windows)}"
    if dropping.first_on(base):
        return "dropout is on, and every completion's own copy of the prompt would draw its own"
    if device.type != "cuda":
        return ""
    if any(getattr(config, point.softcap, None) for point in find_spec(base).attentions if point.softcap):
        return "the scores have a soft cap, which FlashAttention does not know"
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else base.dtype
    return flash_refusal(device, dtype, heads)


def _lengths(mask: Tensor, keep: int) -> Lengths | None:
    """Return the lengths if `mask` is padded as it should be and no prompt is empty, else None."""
    prompts, completions = mask[:, :-keep].sum(1), mask[:, -keep:].sum(1)
    columns, behind = torch.arange(mask.shape[1] - keep), torch.arange(keep)
    left = columns >= len(columns) - prompts[:, None]
    right = behind < completions[:, None]
    if not (torch.equal(mask, torch.cat([left, right], 1)) and bool((prompts > 0).all())):
        return None
    return Lengths(tuple(prompts.tolist()), tuple(completions.tolist()), mask.shape[1], keep)


def _groups(ids: Tensor, lengths: Lengths, rows: Sequence[int]) -> list[list[int]]:
    """Return the rows of each distinct prompt, in the order in which the prompts first appear."""
    end, groups = lengths.columns - lengths.keep, {}
    for row in rows:
        prompt = ids[row, end - lengths.prompts[row] : end].numpy().tobytes()
        groups.setdefault(prompt, []).append(row)
    return list(groups.values())


def _padded(model: Any, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, keep: int, reason: str) -> Layout:
    """Return the batch as it came, with positions counted from each row's first token."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "position_ids" in inspect.signature(base_model(unwrapped(model)).forward).parameters:
        inputs["position_ids"] = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
    row, column = mask[:, -keep:].nonzero(as_tuple=True)
    before = row * mask.shape[1] + mask.shape[1] - keep + column - 1
    return Layout("padded", reason, inputs, *_moved(input_ids.device, before, row * keep + column))


def _packed(input_ids: Tensor, lengths: Lengths, rows: Sequence[int], reason: str) -> Layout:
    sizes = [lengths.whole[row] for row in rows]
    starts = _starts(sizes)
    first = lengths.columns - lengths.keep
    source = [_range(row * lengths.columns + first - lengths.prompts[row], lengths.whole[row]) for row in rows]
    before = [
        _range(start + lengths.prompts[row] - 1, lengths.completions[row])
        for start, row in zip(starts, rows, strict=False)
    ]
    where = _moved(
        input_ids.device, torch.cat(source), torch.cat([_range(0, size) for size in sizes]), _offsets(sizes),
        torch.cat(before), _places(lengths, rows),
    )  # fmt: skip
    inputs = _inputs(input_ids, *where[:2]) | {"cu_seq_lens_q": where[2], "max_length_q": _rounded(max(sizes))}
    return Layout("packed", reason, inputs, *where[3:])


def _shared(input_ids: Tensor, lengths: Lengths, groups: Sequence[Sequence[int]]) -> Layout:
    rows = list(itertools.chain(*groups))
    prompts = [lengths.prompts[group[0]] for group in groups]
    completions = [lengths.completions[row] for row in rows]
    totals = [sum(lengths.completions[row] for row in group) for group in groups]
    first, tokens = lengths.columns - lengths.keep, sum(prompts)
    source = [
        _range(group[0] * lengths.columns + first - size, size) for group, size in zip(groups, prompts, strict=True)
    ] + [_range(row * lengths.columns + first, lengths.completions[row]) for row in rows]
    positions = [_range(0, size) for size in prompts] + [
        _range(lengths.prompts[row], lengths.completions[row]) for row in rows
    ]
    last = {row: end - 1 for group, end in zip(groups, _starts(prompts)[1:], strict=True) for row in group}
    before = [
        torch.cat([torch.tensor([last[row]]), _range(tokens + start, size - 1)])
        for row, start, size in zip(rows, _starts(completions), completions, strict=False)
    ]
    where = _moved(
        input_ids.device, torch.cat(source), torch.cat(positions), _offsets(prompts + completions), _offsets(prompts),
        _offsets(totals), torch.cat(before), _places(lengths, rows),
    )  # fmt: skip
    longest = max(prompts + completions), max(prompts), max(totals), max(lengths.whole[row] for row in rows)
    shared = SharedPrompts(*where[2:5], torch.tensor(Numbers(tokens, *longest)))
    return Layout("shared", "", _inputs(input_ids, *where[:2]) | {"shared_prompts": shared}, *where[5:])


def _inputs(input_ids: Tensor, source: Tensor, positions: Tensor) -> dict[str, Any]:
    mask = attention.told_elsewhere(input_ids.device)
    ids, positions = input_ids.flatten()[source][None], positions[None]
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "lengths_vary": True}


def _places(lengths: Lengths, rows: Sequence[int]) -> Tensor:
    return torch.cat([_range(row * lengths.keep, lengths.completions[row]) for row in rows])


def _range(start: int, size: int) -> Tensor:
    return torch.arange(start, start + size)


def _starts(sizes: Sequence[int]) -> list[int]:
    """Return where each of the pieces begins, and where the last one ends."""
    return [0, *itertools.accumulate(sizes)]


def _offsets(sizes: Sequence[int]) -> Tensor:
    return torch.tensor(_starts(sizes), dtype=torch.int32)


def _rounded(longest: int) -> int:
    """Return a power of two that is at least `longest`: a compiled layer sees few different numbers."""
    return 1 << max(longest - 1, 0).bit_length()


def _moved(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors on the device; of a compiled layer's inputs, their lengths are of this batch alone."""
    moved = tuple(tensor.to(device) for tensor in tensors)
    for tensor in moved:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return moved
