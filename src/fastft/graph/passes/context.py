"""What every pass is given, and how a region is proved and replaced."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

import torch
from attrs import field, frozen
from torch import fx, nn

from fastft.graph.capture import Binding, is_instance_of
from fastft.graph.kept import KeptInput
from fastft.graph.regions import NotARegionError, Region, collect, emit, erase, fingerprint, make_region
from fastft.graph.report import Rewrite
from fastft.graph.verify import (
    EIGHT_BITS,
    FP8,
    FP8_EIGHT_BITS,
    SAME_MATHEMATICS,
    SAME_ROUNDING,
    Allowed,
    Verdict,
    present_shape,
    prove,
)
from fastft.registry.spec import ModelSpec

FP8_RULES = ("lora", "feed_forward")
"""Rules whose replacements may compute in fp8: those with large matrix products."""


@frozen(eq=False)
class Context:
    """What the passes over one captured graph share.

    `implementations` says per rule whether a region becomes a fused "op" or "torch" code. `verdicts` remembers what
    was proved, by the region's structure, its parameters' sizes, the replacement's constants and the precision it was
    computed in; it lives as long as one compiled model. `compute`: "fp8" lets replacements that have such a form take
    it. `kept`: the inputs that take copies of NF4 weights, filled by the passes; None where weights are not
    kept so. `eight_bits`: replacements that can are to keep their widest results in 8 bits. `shown`: the input that a
    second form of the graph has detached (`first_input`), "" where there is none; what it changes is proved as well.
    """

    binding: Binding
    spec: ModelSpec
    implementations: Mapping[str, str]
    verdicts: dict[tuple[object, ...], Verdict] = field(factory=dict)
    compute: str = "exact"
    kept: list[KeptInput] | None = None
    eight_bits: bool = False
    shown: str = ""

    def module(self, name: str) -> nn.Module:
        """Return the module called `name`, the full qualified name."""
        return next(module for found, module in self.binding.modules.values() if found == name)

    def frozen(self, region: Region) -> frozenset[fx.Node]:
        """Return the inputs of the region that need a gradient, but none where the shown input is detached."""
        needs: dict[fx.Node, bool] = {}
        for node in region.nodes[0].graph.nodes if self.shown else ():
            trained = node.op == "placeholder" and node.name != self.shown and _needs_gradient(node)
            needs[node] = trained or any(needs[given] for given in node.all_input_nodes)
        return frozenset(node for node in region.inputs if _needs_gradient(node) and not needs.get(node, True))


class Point(Protocol):
    """What a spec says of modules of some classes."""

    classes: tuple[str, ...]


P = TypeVar("P", bound=Point)


def calls(
    graph_module: fx.GraphModule, context: Context, points: Sequence[P]
) -> Iterator[tuple[P, str, nn.Module, list[fx.Node]]]:
    """Yield (point, name, module, nodes) for each call of a module that one of the spec's `points` names."""
    for point in points:
        for found in collect(graph_module.graph, context.binding, lambda _, m, p=point: is_instance_of(m, p.classes)):
            yield point, *found


def replace_regions(
    graph_module: fx.GraphModule,
    context: Context,
    rule: str,
    points: Sequence[P],
    replace: Callable[[fx.GraphModule, Context, Region, P], Rewrite],
    nodes_of: Callable[[nn.Module, list[fx.Node], P], list[fx.Node]] = lambda _module, nodes, _point: nodes,
) -> tuple[Rewrite, ...]:
    """Return what `replace` did to each call of a module that one of the spec's `points` names.

    `nodes_of` picks what of the call is the region: no nodes, no region. It may raise NotARegionError, as
    `make_region` does, which is reported.
    """
    done = []
    for point, name, module, nodes in calls(graph_module, context, points):
        try:
            chosen = nodes_of(module, nodes, point)
            if chosen:
                done.append(replace(graph_module, context, make_region(name, module, chosen, context.binding), point))
        except NotARegionError as error:
            done.append(refused(rule, name, str(error)))
    return tuple(done)


@frozen(eq=False)
class Replacement:
    """A function that computes a region's outputs from `arguments` (nodes and constants), and what it claims.

    `fp8`: the same computation with fp8 factors, or the reason why there is none. `kept_arguments`: gives the same
    arguments with the copies of NF4 weights, which hold what the function would make of them, in the weights' places;
    its second argument says whether that are fp8 factors.
    `eight_bits`: whether function and fp8, if it is one, take `eight_bits=True`: to keep what they widen in 8 bits.
    """

    rule: str
    function: Callable[..., object]
    arguments: tuple[object, ...]
    implementation: str
    same_rounding: bool = True
    inputs: Mapping[fx.Node, torch.Tensor] = field(factory=dict)
    fp8: Callable[..., object] | str = "it has no such form"
    kept_arguments: Callable[[list[KeptInput], bool], tuple[object, ...]] | None = None
    eight_bits: bool = False


def replace_if_proved(
    graph_module: fx.GraphModule,
    context: Context,
    region: Region,
    replacement: Replacement,
    stack_from: Sequence[fx.Node] | None = None,
) -> Rewrite:
    """Prove `replacement` against `region` and, if it holds, put it into the graph; report either way.

    In a graph that computes in fp8, what is proved is put in with fp8 factors if that is near enough to the region too;
    likewise with what it widens kept in 8 bits.
    """
    mark, none = fingerprint(region), frozenset()
    constants = tuple(a for a in fx.node.map_aggregate(replacement.arguments, _constant) if a is not None)
    key = (replacement.rule, replacement.implementation, mark, repr(constants), _sizes(region), *_precision(region))

    def proved(function: Callable[..., object], allowed: Allowed) -> Verdict:
        verdicts = [proved_with(function, allowed, frozen) for frozen in dict.fromkeys((none, context.frozen(region)))]
        return next((verdict for verdict in verdicts if not verdict.ok), verdicts[0])

    def proved_with(function: Callable[..., object], allowed: Allowed, frozen: frozenset[fx.Node]) -> Verdict:
        found = (*key, allowed.name, *(node in frozen for node in region.inputs))
        modes = (True,) if torch.is_grad_enabled() else (True, False)  # with gradients more is proved
        known = next((context.verdicts[*found, mode] for mode in modes if (*found, mode) in context.verdicts), None)
        if known is None:
            given = (replacement.arguments, allowed, replacement.inputs)
            known = prove(graph_module, region, context.binding, function, *given, frozen=frozen)
            context.verdicts[*found, modes[-1]] = known
        return known

    verdict = proved(replacement.function, SAME_ROUNDING if replacement.same_rounding else SAME_MATHEMATICS)
    function, compute, not_fp8 = replacement.function, "exact", ""
    if verdict.ok and context.compute == "fp8" and replacement.rule in FP8_RULES:
        near = replacement.fp8 if isinstance(replacement.fp8, str) else proved(replacement.fp8, FP8)
        not_fp8 = near if isinstance(near, str) else near.reason
        function, compute = (function, compute) if not_fp8 else (replacement.fp8, "fp8")
    not_eight_bits, kept = "", ""
    if verdict.ok and context.eight_bits and replacement.eight_bits:
        narrow = partial(function, eight_bits=True)
        not_eight_bits = proved(narrow, EIGHT_BITS if compute == "exact" else FP8_EIGHT_BITS).reason
        function, kept = (function, "") if not_eight_bits else (narrow, "8 bits")
    if verdict.ok:
        origins = stack_from or [region.nodes[0]] * len(region.outputs)
        arguments = replacement.arguments
        if context.kept is not None and replacement.kept_arguments is not None:
            arguments = replacement.kept_arguments(context.kept, compute == "fp8")
        emit(graph_module.graph, function, arguments, region.nodes, origins, region.outputs)
        erase(graph_module.graph, region.nodes)
    rule, name, implementation = replacement.rule, region.name, replacement.implementation
    return Rewrite(rule, name, verdict.ok, verdict.reason, implementation, mark, compute, not_fp8, kept, not_eight_bits)


def _sizes(region: Region) -> tuple[object, ...]:
    """Return the shapes of the region's parameters: what holds for one size need not for another."""
    return tuple(tuple(present_shape(node.meta["example_value"])) for node in region.parameters.values())


def _precision(region: Region) -> tuple[object, ...]:
    """Return what decides on dtypes beside those of the inputs: autocast's state, and the dtypes of the results."""
    made = [node.meta["example_value"] for node in region.outputs]
    tensors = [value for value in made if isinstance(value, torch.Tensor)]
    kinds = {tensor.device.type for tensor in tensors}
    states = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds)]
    return (*(tensor.dtype for tensor in tensors), *states)


def _needs_gradient(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad


def _constant(value: object) -> object:
    return None if isinstance(value, fx.Node) else value


def refused(rule: str, name: str, reason: str) -> Rewrite:
    """Return the record of a region that was found and cannot be replaced."""
    return Rewrite(rule, name, False, reason)
