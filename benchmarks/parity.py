"""Does an arm compute what it should? An arm that does not has its speed struck out.

The truth is the same model in fp32. Rounding to bf16 is allowed, as much of it as eager transformers and PEFT do: how
much that is depends on the shape, and is measured in every cell. A gradient that is compared with eager's own would not
do: an arm that shares eager's roundings lies near it, one with fewer roundings does not.

An arm that says of itself that it is not exact has wider limits for step 0, and its losses must follow those of an
exact arm that passed, step by step on the same batches. The gradient of one with fp8 factors is allowed as much error,
by the same multiple, as that of the eager model with fp8 factors: deep models with random weights enlarge rounding, be
it to bf16 or to fp8.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Largest relative differences from the truth allowed at step 0, of the loss and of the gradient's norm; and the largest
# relative error of the gradient (L2, from sketches) as a multiple of eager's, beside what sketches are rounded to.
LOSS = 1e-3
GRADIENT_NORM = 1e-2
GRADIENT_OF_EAGER = 1.25
FLOOR = 1e-5
# The same for an arm that is not exact; and the largest mean relative difference of its losses, over all steps, from
# those of an exact arm. Noise of a third of the gradient, independent from step to step, is far below that of a batch.
INEXACT_LOSS = 2e-3
INEXACT_NORM = 5e-2
INEXACT_GRADIENT = 0.35
INEXACT_CURVE = 2e-3
SPEEDS = (
    "tokens_per_second", "non_padding_per_second", "loss_bearing_per_second", "step_ms", "step_p95_ms", "mfu",
)  # fmt: skip


def judged(
    result: Mapping[str, Any],
    reference: Mapping[str, Any],
    exact: bool = True,
    beside: Mapping[str, Any] | None = None,
    fp8: bool = False,
) -> dict[str, Any]:
    """Return `result` with its `parity`; where that fails, the speeds are None and stand in `struck_out` instead.

    `reference` holds the truth's `loss0`, `grad_norm0` and `sketch`, and under `eager` the same of the eager run in
    bf16. `parity` holds the truth's loss and gradient norm, the differences of arm and eager run from the truth, what
    is allowed, and `ok`: True, False, or None with a `reason` where there is no reference. NaN fails. The sketches are
    left out of what is returned. `exact`: what the arm says of itself; if it is not, `beside` is the line of an exact
    arm on the same cell that passed, whose losses its own are to follow. `fp8`: the arm has fp8 factors, and
    `reference` holds the eager run with such under `eager_fp8`.
    """
    result = dict(result)
    if result["status"] != "ok":
        return result
    sketch = result.pop("sketch")
    if reference["status"] != "ok":
        return {**result, "parity": {"ok": None, "reason": f"no reference: {reference['reason']}"}}
    eager = differences(reference["eager"], reference["eager"]["sketch"], reference)
    if not all(map(math.isfinite, eager.values())):
        return {**result, "parity": {"ok": None, "reason": "no reference: it is not finite"}}
    arm = differences(result, sketch, reference)
    rounded = differences(reference["eager_fp8"], reference["eager_fp8"]["sketch"], reference) if fp8 else None
    allowed = {
        "loss_difference": LOSS if exact else INEXACT_LOSS,
        "grad_norm_difference": GRADIENT_NORM if exact else INEXACT_NORM,
        "gradient_error": INEXACT_GRADIENT,
    }
    if exact or rounded:
        allowed["gradient_error"] = GRADIENT_OF_EAGER * (rounded or eager)["gradient_error"] + FLOOR
    if not exact:
        if beside is None:
            return {**result, "parity": {"ok": None, "reason": "not exact, and no exact arm passed before it"}}
        arm["curve_difference"] = curve_difference(result["losses"], beside["losses"])
        allowed["curve_difference"] = INEXACT_CURVE
    parity = {
        "ok": all(arm[name] <= allowed[name] for name in allowed),
        "reference_loss0": reference["loss0"],
        "reference_grad_norm0": reference["grad_norm0"],
        **arm,
        **{f"eager_{name}": value for name, value in eager.items()},
        **{f"eager_fp8_{name}": value for name, value in (rounded or {}).items()},
        "loss_allowed": allowed["loss_difference"],
        "grad_norm_allowed": allowed["grad_norm_difference"],
        "gradient_allowed": allowed["gradient_error"],
        "reference_s": reference.get("process_s"),
    }
    if parity["ok"]:
        return {**result, "parity": parity}
    struck = {name: result[name] for name in SPEEDS}
    return {**result, **dict.fromkeys(SPEEDS), "struck_out": struck, "parity": parity}


def differences(seen: Mapping[str, Any], sketch: Sequence[float], truth: Mapping[str, Any]) -> dict[str, float]:
    """Return the relative differences from the truth: of loss and gradient norm, and of the gradient in L2."""
    return {
        "loss_difference": _relative(seen["loss0"], truth["loss0"]),
        "grad_norm_difference": _relative(seen["grad_norm0"], truth["grad_norm0"]),
        "gradient_error": _distance(sketch, truth["sketch"]),
    }


def curve_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """Return the mean relative difference of two runs' losses, step by step; infinity where they do not fit."""
    if len(losses) != len(others) or not losses:
        return math.inf
    return sum(_relative(one, other) for one, other in zip(losses, others)) / len(losses)


def _distance(sketch: Sequence[float], reference: Sequence[float]) -> float:
    if len(sketch) != len(reference):
        return math.inf
    distance = math.dist(sketch, reference) / max(math.hypot(*reference), 1e-30)
    return distance if math.isfinite(distance) else math.inf


def _relative(value: float, reference: float) -> float:
    difference = abs(value - reference) / max(abs(reference), 1e-30)
    return difference if math.isfinite(difference) else math.inf
