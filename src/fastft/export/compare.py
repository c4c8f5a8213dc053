"""How far one model's logits are from another's, and how far they may be."""

import math
from collections.abc import Iterable

import torch
from attrs import frozen
from torch import Tensor

_ROWS = 64  # positions that are compared at once, so that a large vocabulary needs little memory


@frozen
class Limits:
    """What is allowed: mean KL divergence (nats a token), share of tokens with another first choice, relative rise of
    perplexity.
    """

    kl: float
    other_choice: float
    perplexity: float


@frozen
class Distance:
    """What was found over `tokens` positions; `kl` is the mean of KL(reference || other) in nats."""

    tokens: int
    largest_difference: float
    kl: float
    same_choice: float
    perplexity: float
    reference_perplexity: float

    @property
    def perplexity_rise(self) -> float:
        """The relative rise of the perplexity over the reference's; NaN without a text."""
        return self.perplexity / self.reference_perplexity - 1


def distance(reference: Iterable[Tensor], other: Iterable[Tensor], ids: Iterable[list[int]], text: int) -> Distance:
    """Compare logits [tokens, vocabulary] of several sequences; perplexity is over those from number `text` on.

    Sums are fp64; a vocabulary that is longer in one of the two (padding) is cut to the shorter.
    """
    tokens = same = 0
    largest = kl = loss = reference_loss = 0.0
    predicted = 0
    for number, (first, second, sequence) in enumerate(zip(reference, other, ids, strict=True)):
        width = min(first.shape[-1], second.shape[-1])
        for start in range(0, first.shape[0], _ROWS):
            p, q = (logits[start : start + _ROWS, :width].double() for logits in (first, second))
            largest = max(largest, (p - q).abs().max().item()) if _finite(p, q) else math.nan
            log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
            kl += (log_p.exp() * (log_p - log_q)).sum().item()
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            tokens += p.shape[0]
            if number >= text:
                targets = torch.tensor(sequence[start + 1 : start + 1 + _ROWS])
                rows = torch.arange(len(targets))
                reference_loss -= log_p[rows, targets].sum().item()
                loss -= log_q[rows, targets].sum().item()
                predicted += len(targets)
    mean = max(predicted, 1)
    perplexities = [math.exp(min(value / mean, 700)) if predicted else math.nan for value in (loss, reference_loss)]
    return Distance(tokens, largest, kl / max(tokens, 1), same / max(tokens, 1), *perplexities)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


# What a kind of numbers may cost: about four times what the worst of its types costs the demo model (4.5 million
# parameters) on held-out text. docs/how-to/verify-export.md has the measurements.
_LIMITS = {
    "fp32": Limits(1e-5, 0.005, 0.002),
    "fp16": Limits(5e-5, 0.01, 0.005),
    "bf16": Limits(2e-3, 0.05, 0.01),
    "q8_0": Limits(5e-3, 0.1, 0.02),
    "q6_k": Limits(0.03, 0.2, 0.03),
    "fp8": Limits(0.015, 0.15, 0.03),
    "q5": Limits(0.08, 0.3, 0.08),
    "q4": Limits(0.33, 0.5, 0.25),
    "nf4": Limits(0.33, 0.5, 0.25),
    "mxfp4": Limits(0.6, 0.6, 0.3),
    "q3": Limits(1.0, 0.7, 0.8),
    "q2": Limits(2.4, 0.85, 1.5),
}
_ALIASES = {"f32": "fp32", "adapter": "fp32", "f16": "fp16", "iq4": "q4", "iq3": "q3", "iq2": "q2"}
# What computing the reference itself in 16 bits costs, or in int8, which also rounds what goes into each layer.
_NOISE = {"bfloat16": _LIMITS["bf16"], "float16": _LIMITS["fp16"], "int8": Limits(0.01, 0.15, 0.02)}


def limits_of(kind: str, reference: str, original: bool = False) -> Limits | None:
    """Return what a kind ("bf16", "q4_k_m" ...) may cost against a reference computed in a dtype, or in "int8".

    `original`: its adapters were merged into 16-bit weights where the reference has them quantised.
    None for kinds without a limit: ternary and 1-bit types make noise of models that were not trained for them.
    """
    known = {**_LIMITS, **{alias: _LIMITS[name] for alias, name in _ALIASES.items()}}
    name = next((name for name in sorted(known, key=len, reverse=True) if kind.startswith(name)), None)
    if name is None:
        return None
    extra = [_NOISE.get(reference), _LIMITS["nf4"] if original else None]
    allowed = [known[name], *(limits for limits in extra if limits is not None)]
    return Limits(*(sum(getattr(one, part) for one in allowed) for part in ("kl", "other_choice", "perplexity")))
