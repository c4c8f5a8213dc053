"""Compile a model's decoder layers and the norms outside them: captured once, rewritten as the spec allows, reused."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from attrs import define, evolve, field
from torch import nn

from fastft.errors import Problem, UsageError
from fastft.given import model_problem, refuse
from fastft.graph import attention
from fastft.graph.ahead import make_ahead, prepare_inductor
from fastft.graph.arguments import check_arguments
from fastft.graph.backend import RewritingBackend, Settings
from fastft.graph.calls import Kind, kind_of, mark_documents, mark_lengths
from fastft.graph.capture import is_instance_of
from fastft.graph.first_calls import first_calls
from fastft.graph.first_input import FirstInput
from fastft.graph.head import NOT_FP8_HEAD, head_check
from fastft.graph.keepable import eight_bits_obstacle
from fastft.graph.outer_norms import norm_dispatcher, norm_settings, outer_norms
from fastft.graph.passes.norm import RULE as NORM
from fastft.graph.pipeline import default_implementations
from fastft.graph.planned import PlannedLayers
from fastft.graph.report import RewriteReport
from fastft.graph.uncompiled_calls import Counts, cause, notes, reason, run_uncompiled
from fastft.kernels import fp8
from fastft.memory.estimate import Mode
from fastft.memory.plan import EIGHT_BITS, fast_is_keep, named_part, not_in_eight_bits, plan_problem
from fastft.registry.resolve import find
from fastft.registry.spec import ModelSpec
from fastft.state import base_model, get_state, update_state

# transformers takes one of these by itself; anything else was asked for by name.
DEFAULT_ATTENTION = ("sdpa", "eager", attention.NAME)
# What a decoder layer calls its key-value cache: the second until transformers 5.23.
CACHES = ("cache", "past_key_values")

IN_PIECES = (
    "layers are captured in pieces, which keep more for the backward than the memory plan says; Dynamo cannot trace "
    "them whole: {}"
)
FEWER_KEPT = (
    "layers that keep fewer copies of weights than planned, or none: {}; some linears of theirs were not replaced"
)

# The number of the layers' structure, their level, whether weights are dequantised, the calls, whether it is one graph.
VersionKey = tuple[int, str, bool, Kind, bool]


@define(eq=False)
class Compiled:
    """A compiled model's layers, its norms outside them, and what was done to both.

    `plain_attention` is transformers' own implementation that computes the same, `earlier_attention` are those that the
    model had before (`attention.implementations`); `enabled` switches the compiled path;
    `planned` says what each layer keeps; `pieces` are the kinds of calls in which a layer is more than one graph,
    `remarks` and `eager_calls` say why. `last`: the kind of the layers' last call, None where it ran uncompiled.
    `eager_layers`: those that ran so with gradients.
    `fp8_head`: the loss head's products are to have fp8 factors as well.
    """

    spec: ModelSpec | None
    settings: Settings
    layers: tuple[nn.Module, ...]
    backend: RewritingBackend | None
    base_report: RewriteReport
    planned: PlannedLayers | None = None
    plain_attention: str = "sdpa"
    earlier_attention: Mapping[str, str] = field(factory=dict)
    enabled: bool = True
    pieces: set[Kind] = field(factory=set)
    fp8_head: bool = False
    remarks: list[str] = field(factory=list)
    eager_calls: Counts = field(factory=dict)
    eager_layers: set[int] = field(factory=set)
    norms: tuple[nn.Module, ...] = ()
    last: Kind | None = None

    @property
    def whole(self) -> bool:
        """Say whether a layer is one graph, whatever the call."""
        return not self.pieces

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        # A copied or unpickled model has none: `nn.Module` leaves the compiled call of a layer behind.
        # The attention that its config names is to be known where it is loaded.
        return attention.register, ()

    def report(self) -> RewriteReport:
        """Return what was rewritten up to now, and what was not."""
        graphs = tuple(self.backend.graphs) if self.backend else ()
        modes = self.planned.described() if self.planned else ""
        exact_head = any(remark.startswith(NOT_FP8_HEAD.format("")) for remark in self.remarks)
        head = self.base_report.head + (", with fp8 factors" if self.fp8_head and not exact_head else "")
        eager = notes(self.eager_calls, self.eager_layers, len(self.layers))
        made = evolve(self.base_report, head=head, graphs=graphs, modes=modes)
        fewer = self.planned.fewer if self.planned else 0
        kept = [FEWER_KEPT.format(fewer)] if fewer else []
        kept += filter(None, [not_in_eight_bits(self.settings.plan, made.why_not_in_eight_bits())])
        kept += [self.planned.unmet] if self.planned and self.planned.unmet else []
        return evolve(made, notes=(*made.notes, *self.remarks, *eager, *kept))


def compile(
    model: nn.Module,
    plan: str | int = "auto",
    backend: str = "inductor",
    *,
    disable: Sequence[str] = (),
    implementations: Mapping[str, str] | None = None,
    dynamic: bool | None = None,
    batch: tuple[int, int] | None = None,
    compute: str = "exact",
) -> nn.Module:
    """Compile the decoder layers of `model`, and the norms outside them, in place and return it.

    The compiled path is taken while the model trains with gradients on and without a cache, and in training mode for
    the passes without gradients that go with it: log-probabilities of a reference or of an earlier policy. Generation
    and evaluation run as before. Nothing is compiled until the first training step. An unknown architecture is
    returned as it is, and `report(model)` says so. Calling it again replaces what an earlier call installed.

    plan: what is kept for the backward pass. "keep": results of matrix products and of attention. "fast": NF4 weights
    too, dequantised or as fp8 factors, 2 bytes each in bf16, until `uncompile` or the end of a trainer's run. "min":
    the layers' inputs. "offload": attention's outputs too, in CPU memory. A number of bytes, or "24GB": as fast as a
    step of that peak can be, weights and optimizer included. "auto": what the model's state says, else what the GPU has
    free but for a reserve of 1 GiB and 3 %, and but for a quarter where weights are kept so; "keep" on a CPU. With
    "+8bit" behind it ("keep+8bit", "24GB+8bit") gate and up of the feed-forwards, the most of what "keep" keeps, are
    kept in 8 bits a number (a scale for 64). The forward stays exact, gradients do not: about 1 % off for evenly spread
    values.
    batch: (rows, length) of the largest batch to come, which a budget is solved for; None: the first one. A larger one
    later solves it again.
    backend: "inductor", or "aot_eager" and "eager" for debugging.
    disable: names of rewrites to leave out.
    implementations: per rewrite "op" (fused operation) or "torch" (plain code that Inductor fuses). A norm outside the
    layers is a graph of its own, that runs compiled where the layers do: one fused operation, without Inductor, unless
    "torch" is said.
    compute: "exact": the numbers are those of the model in its own dtype, up to rounding. "fp8": in training steps the
    products with frozen weights have fp8 factors (e4m3, a scale for every row), forward and backward, those with
    adapters do not; passes without gradients likewise, but for a reference's, whose adapter is off. That changes the
    numbers, and the report, run.json and the model card say so. It takes bf16 and a GPU of compute capability 8.9, or a
    CPU, which is slow at it; linears that cannot compute so stay exact, and the report says why. "fp8+head": the loss
    head's products too, but for each row's own label (`linear_ce.quantized`).
    dynamic: as for `torch.compile`; None compiles layers for the first length and, at a second one, for all, and where
    a batch is known to be of many lengths, as fastft's trainers know it, for all at once.

    With "inductor" on a GPU it starts Inductor's worker processes, which take seconds until the first graph needs them.
    On a GPU it also starts threads that make the first calls of fused operations, on `model`'s weights, so that Triton
    compiles their kernels meanwhile; the first step waits for them. Until then do not capture CUDA graphs of your own.
    It registers the attention "fastft" with transformers and sets `torch._dynamo.config.specialize_float`, without
    which constants such as epsilon become inputs of a graph with dynamic lengths. Raises UsageError.
    """
    refuse(model_problem(model))
    check_arguments(plan, backend, disable, implementations, dynamic, batch, compute)
    base = base_model(model)
    settings = _settings(model, base, plan, backend, disable, implementations, compute)
    spec = get_state(model).spec or find(base.config)
    layers = decoder_layers(base, spec) if spec else ()
    uncompile(model)
    if layers:
        device = next(base.parameters()).device
        prepare_inductor(settings.backend, device)
        compiled = _install(model, base, spec, settings, layers, dynamic, batch, compute)
        compiled.norms = outer_norms(base, spec, layers, settings.disable)
        calls = first_calls(model, base, spec, layers[0], compiled.norms, compiled.backend.settings, compiled.fp8_head)
        compiled.backend.ahead = make_ahead(calls, device)
        _install_norms(compiled, dynamic)
    else:
        _leave(model, base, spec, settings, compute)
    return model


def _settings(
    model: nn.Module,
    base: nn.Module,
    plan: str | int,
    backend: str,
    disable: Sequence[str],
    implementations: Mapping[str, str] | None,
    compute: str,
) -> Settings:
    """Return how graphs are rewritten and lowered, with the plan that the model's state makes of `plan`.

    Raises UsageError for arguments that are wrong, by themselves or with this model.
    """
    chosen = {**default_implementations(), **(implementations or {})}
    _check_device(base, compute)
    plan = _of_state(plan, get_state(model).plan)
    problem = plan_problem(plan)
    if problem is not None:
        raise UsageError(problem)
    return Settings(
        backend, plan, disable=tuple(disable), implementations=chosen, compute=compute.split("+")[0],
        norm_alone=(implementations or {}).get(NORM, "op"),
    )  # fmt: skip


def _leave(model: nn.Module, base: nn.Module, spec: ModelSpec | None, settings: Settings, compute: str) -> None:
    """Note that no layers of the model are known: it stays as it is, and the report says why."""
    why = (
        f"architecture {base.config.model_type!r} has no spec"
        if spec is None
        else "the spec's layer classes are not in the model"
    )
    note = f"{why}: it runs unrewritten through transformers and PEFT"
    note += f", exact though compute={compute!r} was asked for" if compute != "exact" else ""
    attention_ = base.config._attn_implementation
    report_ = RewriteReport(None, "none", str(settings.plan), attention_, "transformers", 0, notes=(note,))
    update_state(model, compiled=Compiled(spec, settings, (), None, report_))


def _of_state(plan: str | int, of_state: str | int) -> str | int:
    """Return the plan that a model's state names where "auto" was asked for, else `plan`."""
    named, eight_bits = named_part(plan)
    if named != "auto":
        return plan
    return f"{of_state}{EIGHT_BITS}" if eight_bits and not named_part(of_state)[1] else of_state


def _check_device(base: nn.Module, compute: str) -> None:
    weight = next(base.parameters())
    why = fp8.device_obstacle(weight.device) if compute != "exact" else ""
    if why:
        raise UsageError(Problem("compute", compute, f"'exact' here: {why}"))


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
    compute: str,
) -> Compiled:
    # transformers' SDPA path leaves a soft cap out without a word.
    plain = "eager" if any(point.softcap for point in spec.attentions) else "sdpa"
    notes, earlier = _take_attention(base, plain)
    head = head_check(model)
    torch._dynamo.config.specialize_float = True
    told = "chunked, from hidden states" if head.fused else head.reason
    fp8_head = compute == "fp8+head" and head.fused
    if compute == "fp8+head" and not head.fused:
        notes.append(NOT_FP8_HEAD.format("the loss is transformers' own"))
    report_ = RewriteReport(
        spec.name,
        settings.backend,
        str(settings.plan),
        base.config._attn_implementation,
        told,
        len(layers),
        notes=tuple(notes),
        compute=compute,
    )
    obstacle = eight_bits_obstacle(layers, spec, settings.disable, settings.implementations)
    settings = evolve(settings, eight_bits=named_part(settings.plan)[1] and not obstacle)
    eight_bits = None if obstacle else settings.eight_bits
    planned = PlannedLayers.of(
        model, spec, settings.plan, layers, batch, compute, settings.disable, eight_bits, settings.norm_alone
    )
    not_so = (fast_is_keep(settings.plan, planned.modes, planned.why_not), not_in_eight_bits(settings.plan, obstacle))
    report_ = evolve(report_, notes=(*report_.notes, *filter(None, not_so)))
    rewriting = RewritingBackend(
        base, spec, settings, layers, graphs=planned.graphs, weights=planned.weights, first=FirstInput(layers)
    )
    compiled = Compiled(spec, settings, layers, rewriting, report_, planned, plain, earlier, fp8_head=fp8_head)
    versions: dict[VersionKey, Callable[..., Any]] = {}
    both: set[VersionKey] = set()  # of those, the ones with two forms (`first_input`)

    def version(index: int, mode: Mode, kind: Kind, whole: bool) -> Callable[..., Any]:
        """Return the compiled version of a layer that keeps what `mode` says, for such calls, made on first use.

        Each structure of layers has its own: Dynamo keeps few captures of one.
        """
        key = (rewriting.first.number(index), mode.level, mode.dequantised, kind, whole)
        if rewriting.first.shown is not None and key not in both:  # what was captured before has one form alone
            versions.pop(key, None)
            both.add(key)
        if key not in versions:
            versions[key] = torch.compile(
                _own_copy(_call_unit), backend=rewriting.for_mode(mode), fullgraph=whole, dynamic=dynamic
            )
        return versions[key]

    for index, layer in enumerate(layers):
        layer._compiled_call_impl = _dispatcher(layer, index, version, compiled, dynamic is False)
    update_state(model, compiled=compiled)
    return compiled


def _take_attention(base: nn.Module, plain: str) -> tuple[list[str], dict[str, str]]:
    """Give the model fastft's attention unless it was given another; return notes on that, and what it had before.

    A copy of a compiled model has fastft's without ever having had another: `plain` then stands for it.
    """
    attention.register()
    before = attention.implementations(base)
    if before[""] in DEFAULT_ATTENTION:
        base.set_attn_implementation(attention.NAME)
        return [], {name: plain if given in (attention.NAME, None) else given for name, given in before.items()}
    return [f"attention implementation {before['']!r} was asked for and is kept"], {}


def _install_norms(compiled: Compiled, dynamic: bool | None) -> None:
    """Let the norms outside the layers run compiled where the layers do: one version with gradients, one without.

    Each norm has its own: the graph of one without a weight does not say which of several it is of.
    """
    settings = norm_settings(compiled.settings)

    def made(norm: nn.Module) -> Callable[..., Any]:
        rewriting = compiled.backend.for_units((norm,), settings)

        def backend(graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            lowered = rewriting(graph_module, example_inputs)
            if not any(done.applied for done in rewriting.graphs[-1].rewrites):
                compiled.planned.norm_is_eager()
            return lowered

        # A lone operation has nothing to gain from a length that is fixed.
        lengths = True if dynamic is None else dynamic
        return torch.compile(_own_copy(_call_unit), backend=backend, fullgraph=True, dynamic=lengths)

    def uncompiled(norm: nn.Module, error: Exception, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        compiled.planned.norm_is_eager()
        return run_uncompiled(compiled.eager_calls, norm, "a norm outside the layers", reason(error), args, kwargs)

    for norm in compiled.norms:
        versions = {gradients: made(norm) for gradients in (True, False)}
        norm._compiled_call_impl = norm_dispatcher(norm, versions, lambda: compiled.last, uncompiled)


def _call_unit(unit: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return unit._call_impl(*args, **kwargs)


def _own_copy(function: FunctionType) -> FunctionType:
    """Return `function` with a code object of its own, which is what Dynamo counts recompilations by."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _dispatcher(
    layer: nn.Module,
    index: int,
    version: Callable[[int, Mode, Kind, bool], Callable[..., Any]],
    compiled: Compiled,
    fixed: bool,
) -> Callable[..., Any]:
    """Return what `nn.Module.__call__` is to run: the compiled layer when training, the plain one otherwise.

    fixed: each length is to have a version of its own, whatever a batch says of lengths.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        kind = kind_of(layer, kwargs) if compiled.enabled and layer.training else None
        compiled.last = kind
        if kind is None:
            return layer._call_impl(*args, **kwargs)
        if kwargs.get("use_cache") or any(kwargs.get(name) is not None for name in CACHES):
            return eagerly("a key-value cache is in use (pass use_cache=False)", *args, **kwargs)
        lengths_vary, planned = kwargs.pop("lengths_vary", False), compiled.planned
        if kind.rows == "cu_seq_lens_q" and not fixed:
            mark_documents(kwargs)

        def run(mode: Mode, whole: bool, given: Sequence[Any], named: Mapping[str, Any]) -> Any:
            if lengths_vary and not fixed:
                mark_lengths(given, named)
            return version(index, mode, kind, whole)(layer, *given, **named)

        # Without gradients nothing is kept for a backward, whatever the plan.
        forward = nullcontext(Mode(dequantised=planned.mode(index).dequantised))
        with planned.call(index, layer, args, kwargs) if kind.gradients else forward as mode:
            try:
                if kind in compiled.pieces or not kind.gradients:
                    return run(mode, kind not in compiled.pieces, args, kwargs)
                with compiled.backend.first.of(index, args, kwargs, shares) as (given, named):
                    return run(mode, True, given, named)
            except torch._dynamo.exc.FailOnRecompileLimitHit as error:
                return eagerly(reason(error), *args, **kwargs)
            except torch._dynamo.exc.Unsupported as error:
                if kind in compiled.pieces:
                    raise
                compiled.pieces.add(kind)
                _remark(compiled, IN_PIECES.format(cause(error)))
                return run(mode, False, args, kwargs)

    def shares(other: int) -> bool:
        own, theirs = compiled.planned.mode(index), compiled.planned.mode(other)
        return (own.level, own.dequantised) == (theirs.level, theirs.dequantised)

    def eagerly(why: str, *args: Any, **kwargs: Any) -> Any:
        compiled.last = None
        if torch.is_grad_enabled():
            compiled.eager_layers.add(index)
        return run_uncompiled(compiled.eager_calls, layer, "a layer", why, args, kwargs)

    return call


def _remark(compiled: Compiled, told: str) -> None:
    if told not in compiled.remarks:
        compiled.remarks.append(told)


def uncompile(model: nn.Module) -> nn.Module:
    """Take the compiled path off `model` again, attention included, and return it."""
    compiled = get_state(model).compiled
    if compiled is not None:
        for unit in (*compiled.layers, *compiled.norms):
            unit._compiled_call_impl = None
        if compiled.earlier_attention:
            attention.put_back(base_model(model), compiled.earlier_attention)
        release_weights(model)
        update_state(model, compiled=None)
    return model


def wait_ahead(model: nn.Module) -> None:
    """Wait for the calls that `compile` has begun in threads."""
    compiled = get_state(model).compiled
    if compiled is not None and compiled.backend is not None:
        compiled.backend.ahead.join()


def release_weights(model: nn.Module) -> None:
    """Let go of the copies of NF4 weights that `model` keeps; a further training step makes them again."""
    compiled = get_state(model).compiled
    if compiled is not None and compiled.planned is not None:
        compiled.planned.weights.clear()


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
    refuse(model_problem(model))
    compiled = get_state(model).compiled
    if compiled is None:
        raise UsageError(Problem("model", type(model).__name__, "a compiled model", "call fastft.compile(model) first"))
    return compiled.report()
