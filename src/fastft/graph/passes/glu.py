"""Gated feed-forward modules: the activation and the product between their projections."""

from torch import fx, nn

from fastft.graph.capture import module_stack
from fastft.graph.passes.context import Context, Replacement, refused, replace_if_proved, replace_regions
from fastft.graph.regions import NotARegionError, Region, without_children
from fastft.graph.report import Rewrite
from fastft.kernels import glu
from fastft.registry.spec import GluPoint

RULE = "glu"


def replace_glus(graph_module: fx.GraphModule, context: Context) -> tuple[Rewrite, ...]:
    """Replace what gated feed-forward modules do outside their projections."""
    return replace_regions(graph_module, context, RULE, context.spec.glus, _replace, _outside_projections)


def _outside_projections(module: nn.Module, nodes: list[fx.Node], point: GluPoint) -> list[fx.Node]:
    names = [*([point.packed] if point.packed else [point.gate, point.up]), point.down]
    missing = [name for name in names if not isinstance(getattr(module, name, None), nn.Module)]
    if missing:
        raise NotARegionError(f"has no module {', '.join(map(repr, missing))} that the spec names")
    return without_children(nodes, [getattr(module, name) for name in names])


def _replace(graph_module: fx.GraphModule, context: Context, region: Region, point: GluPoint) -> Rewrite:
    implementation = context.implementations[RULE]
    function = glu.glu if implementation == "op" else glu.ref.glu
    if len(region.outputs) != 1 or region.parameters:
        return refused(
            RULE, region.name, f"has {len(region.outputs)} outputs and parameters {sorted(region.parameters)}"
        )
    if point.packed:
        if len(region.inputs) != 1:
            return refused(RULE, region.name, f"has {len(region.inputs)} inputs, not the one of a packed projection")

        def packed(both, activation):
            halves = both.chunk(2, dim=-1)
            return function(halves[0], halves[1], activation)

        replacement = Replacement(RULE, packed, (region.inputs[0], point.activation), implementation)
        return replace_if_proved(graph_module, context, region, replacement)
    gate = _made_by(region, getattr(region.module, point.gate))
    up = _made_by(region, getattr(region.module, point.up))
    if gate is None or up is None or len(region.inputs) != 2:
        return refused(RULE, region.name, "its inputs are not the outputs of its gate and up projections")
    replacement = Replacement(RULE, function, (gate, up, point.activation), implementation)
    return replace_if_proved(graph_module, context, region, replacement)


def _made_by(region: Region, module: nn.Module) -> fx.Node | None:
    return next((node for node in region.inputs if id(module) in module_stack(node)), None)
