"""Which engine a name means, and starting it. Needs no torch until an engine is made."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from attrs import define, field

from fastft.environment import installed
from fastft.errors import EngineError, Problem, UsageError, did_you_mean
from fastft.rollout.base import Engine
from fastft.state import base_model, get_state, update_state

NAMES = ("auto", "transformers", "vllm")


@define(eq=False)
class Attached:
    """The engine that a model was loaded with: its name and options, and the engine itself once it was wanted."""

    name: str
    options: Mapping[str, Any] = field(factory=dict)
    engine: Engine | None = None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copied or unpickled model has none


def attach_engine(model: Any, engine: str, options: Mapping[str, Any]) -> None:
    """Remember which engine samples for `model`; it is started when it is first wanted."""
    update_state(model, rollouts=Attached(engine, options))


def attached_engine(model: Any, tokenizer: Any = None) -> Engine:
    """Return the engine that `model` was loaded with ("transformers" for others), started if it is not running."""
    attached = get_state(model).rollouts
    if attached is None:
        attached = Attached("transformers")
        update_state(model, rollouts=attached)
    if attached.engine is None or attached.engine.closed:
        attached.engine = _make(attached.name, model, tokenizer, dict(attached.options))
    return attached.engine


def make_engine(engine: "str | Engine", model: Any, tokenizer: Any, **options: Any) -> Engine:
    """Return a rollout engine that the present weights of `model` have been handed to.

    * "transformers" samples with the model itself (options: `max_rows`, `max_batch_tokens`).
    * "vllm" starts vLLM in this process (options: see `fastft.rollout.vllm.VLLMEngine`).
    * "http://host:port" is a vLLM server that was started elsewhere (options: see
      `fastft.rollout.server.ServerEngine`).
    * "auto" takes "vllm" where it is installed and there is a GPU, else "transformers", and prints which.
    * An `Engine` is taken as it is, without options.

    A model that was loaded with `FastLanguageModel.from_pretrained(fast_inference=True)` has an engine already, which
    is taken where it is the one that is asked for.

    Raises `UsageError` for an unknown name or option, `EngineError` for an engine that cannot be had.
    """
    attached = get_state(model).rollouts
    if attached is not None and engine in ("auto", attached.name):
        if attached.engine is None or attached.engine.closed:
            attached.options = {**attached.options, **options}
        elif options:
            print(f"fastft: engine={engine!r} is running since the model was loaded; {sorted(options)} change nothing.")
        made = attached_engine(model, tokenizer)
    else:
        made = _make(engine, model, tokenizer, options)
    made.hand_over(model)
    return made


def _make(engine: "str | Engine", model: Any, tokenizer: Any, options: dict[str, Any]) -> Engine:
    if isinstance(engine, Engine):
        if options:
            raise UsageError(Problem("engine options", sorted(options), "none beside an engine that is made already"))
        return engine
    if engine == "auto":
        engine = _best(model)
    if engine == "transformers":
        from fastft.rollout.hf import TransformersEngine

        return _with_options("transformers", TransformersEngine, options)
    if engine == "vllm":
        check_vllm()
        from fastft.rollout.vllm import VLLMEngine

        return _with_options("vllm", VLLMEngine, options, model=model)
    if str(engine).startswith(("http://", "https://")):
        from fastft.rollout.server import ServerEngine

        return _with_options(str(engine), ServerEngine, options, url=engine)
    expected = f"one of {', '.join(map(repr, NAMES))}, the URL of a vLLM server, or an Engine"
    raise UsageError(Problem("engine", engine, expected, did_you_mean(str(engine), NAMES)))


def check_vllm() -> None:
    """Raise `EngineError` where vLLM is not installed, naming what installs it."""
    if not installed("vllm"):
        raise EngineError(
            "engine 'vllm': vLLM is not installed; `pip install 'fastft[vllm]'` installs it (for a machine without a "
            "GPU see docs/how-to/rollouts.md), or take engine='transformers'"
        )


def vllm_obstacle(model: Any) -> str:
    """Return why vLLM cannot sample from a model on its device, "" if it can: its LoRA kernels there take 16 bits."""
    base = base_model(model)
    if base.device.type == "cpu" or base.dtype.itemsize == 2 or get_state(model).full:
        return ""
    return f"vLLM's LoRA kernels on a GPU compute in 16 bits, and the model in {str(base.dtype).removeprefix('torch.')}"


def _best(model: Any) -> str:
    import torch

    there = installed("vllm") and torch.cuda.is_available()
    why = vllm_obstacle(model) if there else ""
    name = "vllm" if there and not why else "transformers"
    print(f"fastft: engine='auto' takes {name!r} for rollouts{': ' + why if why else ''}.")
    return name


def _with_options(name: str, make: Any, options: dict[str, Any], **given: Any) -> Engine:
    known = [key for key in signature(make).parameters if key not in given]
    problems = [
        Problem(f"engine {name!r} option", key, f"one of {', '.join(known)}", did_you_mean(key, known))
        for key in options
        if key not in known
    ]
    if problems:
        raise UsageError(*problems)
    return make(**given, **options)
