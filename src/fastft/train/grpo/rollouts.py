"""Rollouts in a trainer: equal prompts are sampled together, and the engine's log-probabilities are held to account."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from attrs import define, evolve, frozen
from torch import Tensor, nn

from fastft.errors import EngineError
from fastft.rollout.base import Completion, Engine, Sampling
from fastft.train import checkpoint, record

COMPLETIONS = "completions.jsonl"
MOST_LINES = 4000


def state_of(model: nn.Module, step: int) -> tuple[Any, ...]:
    """Return what is another after the trained weights have changed: by a step, by loading others, by the user.

    Some optimizers write where torch does not see it: the step tells that.
    """
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return step, *((parameter.data_ptr(), parameter._version) for parameter in trained)


def sample(engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
    """Return one completion of every prompt in order; prompts that stand together and are equal are one request.

    Raises `EngineError`, also for an answer of another size than what was asked for.
    """
    runs = [(prompt, len(list(equal))) for prompt, equal in groupby(map(tuple, prompts))]
    made: list[list[Completion]] = [[] for _ in runs]
    for count in sorted({length for _, length in runs}):
        places = [place for place, (_, length) in enumerate(runs) if length == count]
        answers = engine.generate([runs[place][0] for place in places], sampling, count)
        sizes = [len(answer) for answer in answers]
        if sizes != [count] * len(places) or not all(one.ids for answer in answers for one in answer):
            raise EngineError(
                f"engine {engine.name!r}: asked for {count} completions of {len(places)} prompts, got {sizes[:8]}, or "
                "an empty one among them"
            )
        for place, answer in zip(places, answers, strict=True):
            made[place] = list(answer)
        # a second request of the same seed would repeat the first one's draws
        sampling = evolve(sampling, seed=sampling.seed + 1) if sampling.seed is not None else sampling
    return [completion for answer in made for completion in answer]


def logprobs_of(completions: Sequence[Completion]) -> list[list[float]] | None:
    """Return the engine's log-probabilities of every completion, None where it does not say them."""
    if any(completion.logprobs is None for completion in completions):
        return None
    return [list(completion.logprobs or ()) for completion in completions]


@frozen
class Difference:
    """Trainer's minus engine's log-probabilities of sampled tokens: mean and max of their size, in nats.

    `kl` estimates KL(engine || trainer) a token: the mean of exp(d) - d - 1 (Schulman's k3). `tokens` were compared;
    if there were some, and the engine said a number for none of them, the others are NaN.
    """

    mean: float
    max: float
    kl: float
    tokens: int


def difference(trainer: Tensor, engine: Tensor, mask: Tensor, truncated: bool = False) -> Difference:
    """Compare log-probabilities `[B, T]` where `mask` is not 0 and the engine said a number.

    `truncated`: the engine sampled from a truncated distribution (top_p, top_k, min_p), whose log-probabilities are
    higher than the trainer's by right; mean and max then count only where they are lower.
    """
    kept = mask.bool() & ~torch.isnan(engine)
    gap = (trainer.detach().float() - engine.float())[kept]
    if not gap.numel():
        unknown = float("nan") if mask.any() else 0.0
        return Difference(unknown, unknown, unknown, 0)
    size = gap.clamp(min=0) if truncated else gap.abs()
    kl = (gap.exp() - gap - 1).mean()
    mean, largest, kl = torch.stack([size.mean(), size.max(), kl]).tolist()
    return Difference(mean, largest, kl, gap.numel())


def together(parts: Sequence[Difference]) -> Difference:
    """Return the difference over all tokens that `parts` compared; NaN if the engine said nothing of one of them."""
    told = [part for part in parts if part.tokens]
    unknown = any(not part.tokens and math.isnan(part.mean) for part in parts)
    if unknown or not told:
        return Difference(*[math.nan if unknown else 0.0] * 3, sum(part.tokens for part in told))
    tokens = sum(part.tokens for part in told)
    mean, kl = (sum(getattr(part, name) * part.tokens for part in told) / tokens for name in ("mean", "kl"))
    largest = math.nan if math.isnan(mean) else max(part.max for part in told)  # max leaves some NaN out
    return Difference(mean, largest, kl, tokens)


def refuse_difference(found: Difference, bound: float | None, engine: str, reasons: Sequence[str] = ()) -> None:
    """Raise `EngineError` with the likely reasons for log-probabilities that differ by more than `bound` in the mean.

    A mean that is no number is refused under any bound but None.
    """
    if bound is None or found.mean <= bound:
        return
    likely = [
        *reasons,
        "the engine has not got the last weights",
        "it runs other base weights, another quantisation or another dtype than the trainer",
        "it computes another temperature, scale or soft cap of the logits",
    ]
    raise EngineError(
        f"engine {engine!r}: its log-probabilities differ from the trainer's by {found.mean:.3g} nats a token in the "
        f"mean ({found.max:.3g} at most, {found.tokens:,} tokens); the bound is max_logprob_difference={bound:g}. "
        f"Likely reasons: {'; '.join(likely)}. max_logprob_difference=None lets the run go on with such rollouts."
    )


@define
class Samples:
    """Sample completions of a run, a line each in completions.jsonl: step, prompt, completion, rewards, advantage."""

    folder: Path
    each: int
    lines: int = 0
    told: bool = False

    def begin(self, global_step: int) -> None:
        """Keep the lines of an earlier run up to `global_step`, and go on behind them."""
        rows = record.kept_lines(self.folder / COMPLETIONS, global_step)
        self.lines = len(rows)
        checkpoint.write_text(self.folder / COMPLETIONS, "".join(json.dumps(row) + "\n" for row in rows))

    def add(self, step: int, logs: Mapping[str, Any], count: int) -> None:
        """Append `each` of the last `count` completions in TRL's `logs`, evenly spaced. Raises `SaveError`."""
        chosen = min(self.each, count)
        first = len(logs["prompt"]) - count
        for number in range(chosen):
            if self.lines >= MOST_LINES:
                self._tell()
                return
            place = first + number * count // chosen
            given = {name: values[place] for name, values in logs["rewards"].items()}
            rewards = {name: None if math.isnan(value) else value for name, value in given.items()}
            row = {
                "step": step,
                "prompt": logs["prompt"][place],
                "completion": logs["completion"][place],
                "rewards": rewards,
                "advantage": logs["advantages"][place],
            }
            record.append_line(self.folder / COMPLETIONS, row)
            self.lines += 1

    def _tell(self) -> None:
        if not self.told:
            self.told = True
            print(f"fastft: {self.folder / COMPLETIONS} holds {MOST_LINES:,} completions; no more are kept.")
