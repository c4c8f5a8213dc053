"""Does an arm compute what the reference computes? An arm that does not has its speed struck out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Largest relative differences allowed at step 0: of the loss, of the gradient's norm, and of the gradient itself (L2,
# from sketches). They leave room for the rounding of bf16 over all layers, twice: in the arm and in the reference.
# A wrong norm offset, a missing scale, a shifted label or a lost gradient lies outside.
LOSS = 1e-3
GRADIENT_NORM = 1e-2
GRADIENT = 1e-1
SPEEDS = (
    "tokens_per_second", "non_padding_per_second", "loss_bearing_per_second", "step_ms", "step_p95_ms", "mfu",
)  # fmt: skip


def judged(result: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """Return `result` with its `parity`; where that fails, the speeds are None and stand in `struck_out` instead.

    `parity` holds the reference's loss and gradient norm, the relative differences, the bounds, and `ok`: True, False,
    or None with a `reason` where there is no reference. NaN fails. The sketches are left out of what is returned.
    """
    result = dict(result)
    if result["status"] != "ok":
        return result
    if reference["status"] != "ok":
        del result["sketch"]
        return {**result, "parity": {"ok": None, "reason": f"no reference: {reference['reason']}"}}
    loss = _relative(result["loss0"], reference["loss0"])
    norm = _relative(result["grad_norm0"], reference["grad_norm0"])
    gradient = _distance(result.pop("sketch"), reference["sketch"])
    parity = {
        "ok": loss <= LOSS and norm <= GRADIENT_NORM and gradient <= GRADIENT,
        "reference_loss0": reference["loss0"],
        "reference_grad_norm0": reference["grad_norm0"],
        "loss_difference": loss,
        "grad_norm_difference": norm,
        "gradient_difference": gradient,
        "loss_allowed": LOSS,
        "grad_norm_allowed": GRADIENT_NORM,
        "gradient_allowed": GRADIENT,
    }
    if parity["ok"]:
        return {**result, "parity": parity}
    struck = {name: result[name] for name in SPEEDS}
    return {**result, **dict.fromkeys(SPEEDS), "struck_out": struck, "parity": parity}


def _distance(sketch: Sequence[float], reference: Sequence[float]) -> float:
    if len(sketch) != len(reference):
        return math.inf
    distance = math.dist(sketch, reference) / max(math.hypot(*reference), 1e-30)
    return distance if math.isfinite(distance) else math.inf


def _relative(value: float, reference: float) -> float:
    difference = abs(value - reference) / max(abs(reference), 1e-30)
    return difference if math.isfinite(difference) else math.inf
