"""Gated feed-forwards whose three projections are LoRA linears: one fused computation from input to output.

A module that is anything else, or that the fused form does not reproduce, is left to the rewrites of its parts, which
then say what they did.
"""

from attrs import evolve
from torch import fx, nn

from fastft.graph.capture import module_stack
from fastft.graph.passes.context import Context, Replacement, calls, replace_if_proved
from fastft.graph.passes.lora import Projection, fused_linears, is_lora_linear, lora_projection, obstacle
from fastft.graph.regions import NotARegionError, Region, make_region
from fastft.graph.report import Rewrite
from fastft.kernels import lora_glu
from fastft.registry.spec import GluPoint

RULE = "feed_forward"


def replace_feed_forwards(graph_module: fx.GraphModule, context: Context) -> tuple[Rewrite, ...]:
    """Replace gated feed-forwards of LoRA linears; report the regions of the linears and of the gate as replaced."""
    done: list[Rewrite] = []
    for point, name, module, nodes in calls(graph_module, context, context.spec.glus):
        projections = _projections(name, module, nodes, point, context)
        if projections:
            done += _replace(graph_module, context, name, module, nodes, projections, point)
    return tuple(done)


def _projections(
    name: str, module: nn.Module, nodes: list[fx.Node], point: GluPoint, context: Context
) -> list[Projection] | None:
    """Return the projections as the fused computation takes them, or None where one of them does not fit."""
    made = []
    for child, linear in _linears(module, point).items():
        own = [node for node in nodes if id(linear) in module_stack(node)]
        try:
            projection = lora_projection(make_region(f"{name}.{child}", linear, own, context.binding))
        except (NotARegionError, IndexError):  # no nodes: it is not called here
            return None
        if isinstance(projection, str) or not _fits(projection):
            return None
        made.append(projection)
    return made if all(p.x is made[0].x for p in made[:-1]) else None


def _linears(module: nn.Module, point: GluPoint) -> dict[str, nn.Module]:
    """Return the LoRA linears of a gated feed-forward by name, the last one down; none unless all of them are such."""
    names = (*((point.packed,) if point.packed else (point.gate, point.up)), point.down)
    found = {name: getattr(module, name, None) for name in names}
    whole = all(isinstance(linear, nn.Module) and is_lora_linear(name, linear) for name, linear in found.items())
    return found if whole else {}


def fusable_linears(module: nn.Module, point: GluPoint) -> list[nn.Module]:
    """Return the LoRA linears of a gated feed-forward that is fused whole, as far as the modules tell, else none."""
    found = list(_linears(module, point).values())
    return [] if any(map(_left_to_its_parts, found)) else found


def _left_to_its_parts(linear: nn.Module) -> bool:
    base = linear.base_layer
    return bool(obstacle(linear)) or base.bias is not None or base.weight.requires_grad


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
    replacement = _replacement(projections, point, context.implementations[RULE])
    result = replace_if_proved(graph_module, context, region, replacement)
    if not result.applied:
        return []
    for node in graph_module.graph.nodes:
        if node not in present:
            _hand_to_parent(node, region)
    linear = evolve(result, rule="lora", kept="", not_eight_bits="")
    gate = evolve(result, rule="glu", compute="exact", not_fp8="")
    return [*(evolve(linear, module=p.region.name) for p in projections), gate]


def _hand_to_parent(node: fx.Node, region: Region) -> None:
    """Take the module and what is in it off the node's module stack, so that no later rewrite takes it for a part."""
    inside = {id(child) for child in region.module.modules()}
    stack = node.meta.get("nn_module_stack") or {}
    node.meta["nn_module_stack"] = {k: v for k, v in stack.items() if int(str(k).split("@")[0]) not in inside}


def _replacement(projections: list[Projection], point: GluPoint, implementation: str) -> Replacement:
    def arguments(weights, states):
        a, b, scales = [p.a for p in projections], [p.b for p in projections], [p.scale for p in projections]
        return projections[0].x, weights, a, b, scales, states, point.activation

    obstacles = [f"{p.region.name}: {p.not_fp8}" for p in projections if p.not_fp8]
    op, plain = lora_glu.feed_forward, lora_glu.ref.feed_forward
    not_fp8 = "; ".join(obstacles)
    return fused_linears(RULE, projections, arguments, op, plain, implementation, not_fp8, eight_bits=True)
