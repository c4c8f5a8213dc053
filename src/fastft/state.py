"""What fastft knows of a loaded model, kept on the model itself as one frozen record."""

from typing import Any

from attrs import evolve, frozen

from fastft.registry.spec import ModelSpec

ATTRIBUTE = "fastft_state"


@frozen(eq=False)
class ModelState:
    """Facts about one loaded model.

    `quant` is None, "nf4", "int8" or "fp8"; `notes` are plain sentences about what loading put right.
    `revision` is the hub revision asked for; `added_tokens` are the ids whose rows `add_tokens` made.
    `loftq`: the adapter started at what quantisation took away, so it fits the dequantised base alone.
    `plan` is the memory plan that `fastft.compile(plan="auto")` takes.
    `compiled` is the `fastft.graph.compile.Compiled` record once `fastft.compile` has run.
    `rollouts` is the `fastft.rollout.choose.Attached` engine that the model was loaded with, if it was.
    """

    source: str = ""
    spec: ModelSpec | None = None
    quant: str | None = None
    max_length: int | None = None
    full: bool = False
    tokenizer: Any = None
    notes: tuple[str, ...] = ()
    revision: str | None = None
    added_tokens: tuple[int, ...] = ()
    loftq: bool = False
    plan: str = "auto"
    compiled: Any = None
    rollouts: Any = None


def base_model(model: Any) -> Any:
    """Return the transformers model inside `model`, which may be wrapped by PEFT."""
    get_base = getattr(model, "get_base_model", None)
    return get_base() if callable(get_base) else model


def get_state(model: Any) -> ModelState:
    """Return the state kept on `model`, or an empty one for a model that fastft did not load."""
    return base_model(model).__dict__.get(ATTRIBUTE) or ModelState()


def quant_of(model: Any) -> str | None:
    """Return what the weights are quantised to, as `ModelState.quant`; of a model loaded otherwise, as they tell."""
    quant = get_state(model).quant
    for parameter in () if quant else base_model(model).parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            return str(state.quant_type)
        if type(parameter).__name__ == "Int8Params" and not parameter.is_floating_point():
            return "int8"
    return quant


def planned_of(model: Any) -> Any:
    """Return the memory plan of a compiled model's layers (`fastft.graph.planned.PlannedLayers`), None without one."""
    return getattr(get_state(model).compiled, "planned", None)


def update_state(model: Any, **changes: Any) -> ModelState:
    """Replace fields of the state kept on `model` and return the new record."""
    state = evolve(get_state(model), **changes)
    object.__setattr__(base_model(model), ATTRIBUTE, state)
    return state
