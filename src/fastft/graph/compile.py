"""Compile a model's decoder layers: captured once, rewritten as the spec allows, reused for every layer."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from attrs import define, evolve, field
from torch import nn

from fastft.errors import Problem, UsageError, did_you_mean
from fastft.graph import attention
from fastft.graph.backend import BACKENDS, RewritingBackend, Settings
from fastft.graph.capture import is_instance_of
from fastft.graph.head import head_check
from fastft.graph.pipeline import PASSES, default_implementations
from fastft.graph.planned import PlannedLayers
from fastft.graph.report import RewriteReport
from fastft.memory.plan import describe_modes, plan_problem
from fastft.registry.resolve import find
from fastft.registry.spec import ModelSpec
from fastft.state import base_model, get_state, update_state

# transformers takes one of these by itself; anything else was asked for by name.
DEFAULT_ATTENTION = ("sdpa", "eager", attention.NAME)


@define(eq=False)
class Compiled:
    """A compiled model's layers and what was done to them.

    `plain_attention` is transformers' own implementation that computes the same; `enabled` switches the compiled path;
    `planned` says what each layer keeps; `whole` that a layer is one graph, `remarks` and `eager_calls` why not.
    """

    spec: ModelSpec | None
    settings: Settings
    layers: tuple[nn.Module, ...]
    backend: RewritingBackend | None
    base_report: RewriteReport
    planned: PlannedLayers | None = None
    plain_attention: str = "sdpa"
    enabled: bool = True
    whole: bool = True
    remarks: list[str] = field(factory=list)
    eager_calls: dict[str, int] = field(factory=dict)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A copied or unpickled model has none: `nn.Module` leaves the compiled call of a layer behind.
        return type(None), ()

    def report(self) -> RewriteReport:
        """Return what was rewritten up to now, and what was not."""
        graphs = tuple(self.backend.graphs) if self.backend else ()
        modes = describe_modes(self.planned.modes) if self.planned else ""
        notes = [f"{count} training calls of a layer ran uncompiled: {why}" for why, count in self.eager_calls.items()]
        return evolve(
            self.base_report, graphs=graphs, modes=modes, notes=(*self.base_report.notes, *self.remarks, *notes)
        )


def compile(
    model: nn.Module,
    plan: str | int = "auto",
    backend: str = "inductor",
    *,
    disable: Sequence[str] = (),
    implementations: Mapping[str, str] | None = None,
    dynamic: bool | None = None,
    batch: tuple[int, int] | None = None,
) -> nn.Module:
    """Compile the decoder layers of `model` in place and return it.

    The compiled path is taken while the model trains with gradients on and without a cache; generation and evaluation
    run as before. Nothing is compiled until the first training step. An unknown architecture is returned as it is, and
    `report(model)` says so. Calling it again replaces what an earlier call installed.

    plan: what is kept for the backward pass. "keep": results of matrix products and of attention. "min": the layers'
    inputs. "offload": attention's outputs too, in CPU memory. A number of bytes, or "24GB": as fast as a step of that
    peak can be, weights and optimizer included. "auto": what the model's state says, else what the GPU has free but for
    a reserve of 1 GiB and 3 %; "keep" on a CPU.
    batch: (rows, length) of the largest batch to come, which a budget is solved for; None: the first one. A larger one
    later solves it again.
    backend: "inductor", or "aot_eager" and "eager" for debugging.
    disable: names of rewrites to leave out.
    implementations: per rewrite "op" (fused operation) or "torch" (plain code that Inductor fuses).
    dynamic: as for `torch.compile`; None compiles for the first length and, at a second one, for all.

    It registers the attention "fastft" with transformers and sets `torch._dynamo.config.specialize_float`, without
    which constants such as epsilon become inputs of a graph with dynamic lengths. Raises UsageError.
    """
    chosen = {**default_implementations(), **(implementations or {})}
    _check_arguments(plan, backend, disable, chosen)
    base = base_model(model)
    plan = get_state(model).plan if plan == "auto" else plan
    problem = plan_problem(plan)
    if problem is not None:
        raise UsageError(problem)
    spec = get_state(model).spec or find(base.config)
    settings = Settings(backend, plan, disable=tuple(disable), implementations=chosen)
    layers = decoder_layers(base, spec) if spec else ()
    uncompile(model)
    if spec is None or not layers:
        why = (
            f"architecture {base.config.model_type!r} has no spec"
            if spec is None
            else "the spec's layer classes are not in the model"
        )
        note = f"{why}: it runs unrewritten through transformers and PEFT"
        report_ = RewriteReport(
            None, "none", str(plan), base.config._attn_implementation, "transformers", 0, notes=(note,)
        )
        update_state(model, compiled=Compiled(spec, settings, (), None, report_))
        return model
    return _install(model, base, spec, settings, layers, dynamic, batch)


def _check_arguments(plan: object, backend: str, disable: Sequence[str], implementations: Mapping[str, str]) -> None:
    names = [step.name for step in PASSES]
    problems: list[Problem] = []
    wrong_plan = plan_problem(plan)
    if wrong_plan is not None:
        problems.append(wrong_plan)
    if backend not in BACKENDS:
        problems.append(Problem("backend", backend, f"one of {BACKENDS}", did_you_mean(backend, BACKENDS)))
    for name in (*disable, *implementations):
        if name not in names:
            problems.append(Problem("rewrite", name, f"one of {names}", did_you_mean(name, names)))
    for name, value in implementations.items():
        if value not in ("op", "torch"):
            problems.append(Problem(f"implementations[{name!r}]", value, "'op' or 'torch'"))
    if problems:
        raise UsageError(*problems)


def decoder_layers(base: nn.Module, spec: ModelSpec) -> tuple[nn.Module, ...]:
    """Return the modules of the classes that the spec calls decoder layers, in order."""
    return tuple(module for module in base.modules() if is_instance_of(module, spec.layer_classes))


def _install(
    model: nn.Module,
    base: nn.Module,
    spec: ModelSpec,
    settings: Settings,
    layers: tuple[nn.Module, ...],
    dynamic: bool | None,
    batch: tuple[int, int] | None,
) -> nn.Module:
    notes = []
    attention.register()
    given = base.config._attn_implementation
    if given in DEFAULT_ATTENTION:
        base.set_attn_implementation(attention.NAME)
    else:
        notes.append(f"attention implementation {given!r} was asked for and is kept")
    head = head_check(model)
    torch._dynamo.config.specialize_float = True
    rewriting = RewritingBackend(base, spec, settings)
    told = "chunked, from hidden states" if head.fused else head.reason
    report_ = RewriteReport(
        spec.name,
        settings.backend,
        str(settings.plan),
        base.config._attn_implementation,
        told,
        len(layers),
        notes=tuple(notes),
    )
    # transformers' SDPA path leaves a soft cap out without a word.
    plain = "eager" if any(point.softcap for point in spec.attentions) else "sdpa"
    planned = PlannedLayers.of(model, spec, settings.plan, layers, batch)
    compiled = Compiled(spec, settings, layers, rewriting, report_, planned, plain_attention=plain)
    versions: dict[tuple[str, bool], Callable[..., Any]] = {}

    def version(level: str, whole: bool) -> Callable[..., Any]:
        """Return the compiled version of a layer that keeps what `level` says, made on first use."""
        if (level, whole) not in versions:
            versions[level, whole] = torch.compile(
                _own_copy(_call_layer), backend=rewriting.at_level(level), fullgraph=whole, dynamic=dynamic
            )
        return versions[level, whole]

    for index, layer in enumerate(layers):
        layer._compiled_call_impl = _dispatcher(layer, index, version, compiled)
    update_state(model, compiled=compiled)
    return model


def _call_layer(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return layer._call_impl(*args, **kwargs)


def _own_copy(function: FunctionType) -> FunctionType:
    """Return `function` with a code object of its own, which is what Dynamo counts recompilations by."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _dispatcher(
    layer: nn.Module, index: int, version: Callable[[str, bool], Callable[..., Any]], compiled: Compiled
) -> Callable[..., Any]:
    """Return what `nn.Module.__call__` is to run: the compiled layer when training, the plain one otherwise."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not (compiled.enabled and layer.training and torch.is_grad_enabled()):
            return layer._call_impl(*args, **kwargs)
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
            return eagerly("a key-value cache is in use (pass use_cache=False)", *args, **kwargs)
        with compiled.planned.call(index, layer, args, kwargs) as mode:
            try:
                return version(mode.level, compiled.whole)(layer, *args, **kwargs)
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                return eagerly("its inputs changed in more ways than Dynamo's recompile_limit allows", *args, **kwargs)
            except torch._dynamo.exc.Unsupported as error:
                if not compiled.whole:
                    raise
                compiled.whole = False
                cause = _cause(error)
                compiled.remarks.append(f"layers are captured in pieces, Dynamo cannot trace them whole: {cause}")
                return version(mode.level, False)(layer, *args, **kwargs)

    def eagerly(why: str, *args: Any, **kwargs: Any) -> Any:
        if why not in compiled.eager_calls:
            warnings.warn(f"a layer runs uncompiled: {why}", stacklevel=3)
        compiled.eager_calls[why] = compiled.eager_calls.get(why, 0) + 1
        return layer._call_impl(*args, **kwargs)

    return call


def _cause(error: Exception) -> str:
    """Return what Dynamo stumbled on, in one line: its explanation, and the innermost line of the user's code."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = next((line for line in lines if line.startswith("Explanation:")), lines[0])
    files = [line for line in lines if line.startswith("File ")]
    return f"{told.removeprefix('Explanation:').strip()} ({files[-1]})" if files else told


def uncompile(model: nn.Module) -> nn.Module:
    """Take the compiled path off `model` again and return it."""
    compiled = get_state(model).compiled
    if compiled is not None:
        for layer in compiled.layers:
            layer._compiled_call_impl = None
        update_state(model, compiled=None)
    return model


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[nn.Module]:
    """Run `model` as transformers and PEFT wrote it within the context, attention included."""
    compiled = get_state(model).compiled
    base = base_model(model)
    given = base.config._attn_implementation
    enabled = compiled.enabled if compiled else False
    if compiled:
        compiled.enabled = False
    if compiled and given == attention.NAME:
        base.set_attn_implementation(compiled.plain_attention)
    try:
        yield model
    finally:
        if compiled:
            compiled.enabled = enabled
        base.set_attn_implementation(given)


def report(model: nn.Module) -> RewriteReport:
    """Return what `compile` did to `model`: regions replaced and refused with reasons. Raises UsageError before it."""
    compiled = get_state(model).compiled
    if compiled is None:
        raise UsageError(Problem("model", type(model).__name__, "a compiled model", "call fastft.compile(model) first"))
    return compiled.report()
