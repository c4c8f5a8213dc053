"""Gated feed-forwards whose three projections are LoRA linears: one fused computation from input to output.

A module that is anything else, or that the fused form does not reproduce, is left to the rewrites of its parts, which
then say what they did.
"""

from torch import fx, nn

from fastft.graph.capture import is_instance_of, module_stack
from fastft.graph.passes.context import Context, Replacement, replace_if_proved
from fastft.graph.passes.lora import Projection, is_lora_linear, lora_projection
from fastft.graph.regions import NotARegionError, Region, collect, make_region
from fastft.graph.report import Rewrite
from fastft.kernels import lora_glu
from fastft.registry.spec import GluPoint

RULE = "feed_forward"


def replace_feed_forwards(graph_module: fx.GraphModule, context: Context) -> tuple[Rewrite, ...]:
    """Replace gated feed-forwards of LoRA linears; report the regions of the linears and of the gate as replaced."""
    done: list[Rewrite] = []
    for point in context.spec.glus:
        found = collect(graph_module.graph, context.binding, lambda _, m, p=point: is_instance_of(m, p.classes))
        for name, module, nodes in found:
            projections = _projections(name, module, nodes, point, context)
            if projections:
                done += _replace(graph_module, context, name, module, nodes, projections, point)
    return tuple(done)


def _projections(
    name: str, module: nn.Module, nodes: list[fx.Node], point: GluPoint, context: Context
) -> list[Projection] | None:
    """Return the projections as the fused computation takes them, or None where one of them does not fit."""
    inner = (point.packed,) if point.packed else (point.gate, point.up)
    made = []
    for child in (*inner, point.down):
        linear = getattr(module, child, None)
        if not isinstance(linear, nn.Module) or not is_lora_linear(child, linear):
            return None
        own = [node for node in nodes if id(linear) in module_stack(node)]
        try:
            projection = lora_projection(make_region(f"{name}.{child}", linear, own, context.binding))
        except (NotARegionError, IndexError):  # no nodes: it is not called here
            return None
        if isinstance(projection, str) or not _fits(projection):
            return None
        made.append(projection)
    return made if all(p.x is made[0].x for p in made[:-1]) else None


def _fits(projection: Projection) -> bool:
    base = projection.region.module.base_layer
    return projection.bias is None and not base.weight.requires_grad and projection.a.meta["example_value"].shape[0] > 0


def _replace(
    graph_module: fx.GraphModule,
    context: Context,
    name: str,
    module: nn.Module,
    nodes: list[fx.Node],
    projections: list[Projection],
    point: GluPoint,
) -> list[Rewrite]:
    try:
        region = make_region(name, module, nodes, context.binding)
    except NotARegionError:
        return []
    if len(region.outputs) != 1:
        return []
    present = set(graph_module.graph.nodes)
    replacement = _replacement(region, projections, point, context.implementations[RULE])
    result = replace_if_proved(graph_module, context, region, replacement)
    if not result.applied:
        return []
    for node in graph_module.graph.nodes:
        if node not in present:
            _hand_to_parent(node, region)
    parts = [("lora", p.region.name) for p in projections] + [("glu", name)]
    return [Rewrite(rule, part, True, "", result.implementation, result.fingerprint) for rule, part in parts]


def _hand_to_parent(node: fx.Node, region: Region) -> None:
    """Take the module and what is in it off the node's module stack, so that no later rewrite takes it for a part."""
    inside = {id(child) for child in region.module.modules()}
    stack = node.meta.get("nn_module_stack") or {}
    node.meta["nn_module_stack"] = {k: v for k, v in stack.items() if int(str(k).split("@")[0]) not in inside}


def _replacement(region: Region, projections: list[Projection], point: GluPoint, implementation: str) -> Replacement:
    function = lora_glu.feed_forward if implementation == "op" else lora_glu.ref.feed_forward
    dtype = region.outputs[0].meta["example_value"].dtype  # what autocast, where it is on, computes in
    x = projections[0].x
    x_dtype = x.meta["example_value"].dtype

    def fused(x, weights, a, b, scales, states, activation):
        return function(x if x_dtype == dtype else x.to(dtype), weights, a, b, scales, states, activation)

    arguments = (
        x,
        [p.weight for p in projections],
        [p.a for p in projections],
        [p.b for p in projections],
        [p.scale for p in projections],
        [list(p.quant_state) for p in projections],
        point.activation,
    )
    return Replacement(RULE, fused, arguments, implementation, same_rounding=False)
