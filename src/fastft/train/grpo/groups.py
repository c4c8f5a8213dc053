"""Which completions of a generation are in one micro-batch: those of a prompt, as far as that changes no update.

TRL shuffles the completions of a generation and cuts them into micro-batches. An update adds up micro-batches: among
them a completion may stand in any, and where those of a prompt stand together, the prompt is computed once for all.
For the same reason several micro-batches may be one: a GPU then waits for the host to launch one pass and not several.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastft.memory.plan import Plan

# Tokens of a pass beyond which a GPU takes longer to run it than the host takes to launch it.
MOST_TOKENS = 1 << 15


def micro_batches_of_an_update(args: Any) -> int:
    """Return how many micro-batches of a generation that follow each other always belong to the same update.

    Updates end at multiples of `gradient_accumulation_steps`, generations at those of `steps_per_generation`, and the
    last update of an epoch, which may be shorter, where a generation ends.
    """
    return math.gcd(args.steps_per_generation, args.gradient_accumulation_steps)


def order_matters(args: Any, entropy_bonus: bool) -> bool:
    """Say whether an update depends on which completions share a micro-batch.

    The loss "bnpo" and the bonus for entropy are means over the tokens of a micro-batch, and `top_entropy_quantile` is
    a quantile of them. All other losses are sums over completions, divided by what is the same for each micro-batch.
    """
    return args.loss_type == "bnpo" or args.top_entropy_quantile < 1.0 or entropy_bonus


def may_merge(args: Any, entropy_bonus: bool) -> bool:
    """Say whether micro-batches of an update may be one: where that changes neither the update nor a checkpoint.

    With more than one update from a generation a checkpoint may hold completions that wait, cut into micro-batches.
    """
    one_update = args.steps_per_generation == args.gradient_accumulation_steps and args.num_iterations == 1
    return one_update and not order_matters(args, entropy_bonus)


def merged(rows: int, times: int, length: int, foreseen: Callable[[int], Plan | None]) -> int:
    """Return how many of `times` micro-batches of `rows` completions are to be one, a divisor of `times`.

    length: tokens of the longest prompt with its completion. `foreseen` returns the memory plan of a micro-batch of so
    many completions, None where that is not known. The merged one is to fit, its layers to compute no more again and to
    move no more; copies of weights are not asked for, since they save the less a token the more tokens there are.
    """
    now = foreseen(rows)
    if now is None or not now.fits:
        return 1
    for count in range(times, 1, -1):
        if times % count or rows * count * length > MOST_TOKENS:
            continue
        then = foreseen(rows * count)
        if then is not None and then.fits and _kept(then) == _kept(now):
            return count
    return 1


def merge(args: Any, times: int) -> None:
    """Make `times` micro-batches one in the settings of an update, in place."""
    args.per_device_train_batch_size *= times
    args.gradient_accumulation_steps //= times
    args.steps_per_generation //= times


def _kept(plan: Plan) -> list[tuple[str, bool]]:
    return [(mode.level, mode.offload) for mode in plan.modes]


def put_together(batches: Sequence[Mapping[str, Any]], update: int) -> list[dict[str, Any]]:
    """Return micro-batches of equal size whose rows are moved among each `update` of them so that prompts stay whole.

    Of a micro-batch, tensors `[B, ...]` and lists have an entry for each row, `prompt_ids` and `prompt_mask` `[B, P]`
    among them; numbers and None belong to the generation and stay.
    """
    if update == 1:
        return list(batches)
    made = []
    for first in range(0, len(batches), update):
        made += _put_together(batches[first : first + update])
    return made


def _put_together(batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = len(batches[0]["prompt_ids"])
    joined = {name: _joined([batch[name] for batch in batches]) for name in batches[0]}
    pairs = torch.stack([joined["prompt_ids"], joined["prompt_mask"]], 1).cpu().numpy()
    return [
        {name: _rows_of(value, chosen) for name, value in joined.items()}
        for chosen in arranged([pair.tobytes() for pair in pairs], rows)
    ]


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], Tensor) and parts[0].ndim:
        return torch.cat(list(parts))
    return list(itertools.chain(*parts)) if isinstance(parts[0], list) else parts[0]


def _rows_of(value: Any, rows: list[int]) -> Any:
    if isinstance(value, Tensor) and value.ndim:
        return value[rows]
    return [value[row] for row in rows] if isinstance(value, list) else value


def arranged(prompts: Sequence[Hashable], size: int) -> list[list[int]]:
    """Return the rows of each micro-batch of `size`, given every row's prompt, with few prompts in each.

    A group that is larger than a micro-batch fills some alone. Then the largest come first, each whole where the least
    room is left; what fits nowhere fills the rest in order. With groups of equal size no arrangement needs fewer.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    full = [group[at : at + size] for group in groups.values() for at in range(0, len(group) - size + 1, size)]
    rests = [group[len(group) // size * size :] for group in groups.values()]
    filling: list[list[int]] = [[] for _ in range(len(prompts) // size - len(full))]
    torn: list[int] = []
    for rest in sorted(rests, key=len, reverse=True):
        room = [rows for rows in filling if len(rows) + len(rest) <= size]
        (max(room, key=len) if room else torn).extend(rest)
    left = iter(torn)
    for rows in filling:
        rows.extend(itertools.islice(left, size - len(rows)))
    return full + filling
