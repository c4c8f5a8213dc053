"""Normalisation modules: RMSNorm in its cast orders, LayerNorm."""

from torch import fx

from fastft.graph.passes.context import Context, Replacement, refused, replace_if_proved, replace_regions
from fastft.graph.regions import Region
from fastft.graph.report import Rewrite
from fastft.kernels import layer_norm, rms_norm
from fastft.registry.spec import NormPoint

RULE = "norm"


def replace_norms(graph_module: fx.GraphModule, context: Context) -> tuple[Rewrite, ...]:
    """Replace the regions of the normalisation modules that the spec names."""
    return replace_regions(graph_module, context, RULE, context.spec.norms, _replace)


def _replace(graph_module: fx.GraphModule, context: Context, region: Region, point: NormPoint) -> Rewrite:
    if len(region.inputs) != 1 or len(region.outputs) != 1:
        return refused(
            RULE, region.name, f"has {len(region.inputs)} inputs and {len(region.outputs)} outputs, not one each"
        )
    epsilon = getattr(region.module, point.eps, None)
    if not isinstance(epsilon, (int, float)):
        return refused(RULE, region.name, f"has no number {point.eps!r}, which the spec names as its epsilon")
    (x,) = region.inputs
    epsilon = float(epsilon)
    weight, bias = region.parameters.get("weight"), region.parameters.get("bias")
    implementation = context.implementations[RULE]
    if point.kind == "layer":
        function = layer_norm.layer_norm if implementation == "op" else layer_norm.ref.layer_norm
        arguments = (x, weight, bias, epsilon)
    else:
        if weight is None or bias is not None:
            return refused(RULE, region.name, f"has parameters {sorted(region.parameters)}, not just a weight")
        function = rms_norm.rms_norm if implementation == "op" else rms_norm.ref.rms_norm
        arguments = (x, weight, epsilon, point.offset, point.cast)
    return replace_if_proved(graph_module, context, region, Replacement(RULE, function, arguments, implementation))
