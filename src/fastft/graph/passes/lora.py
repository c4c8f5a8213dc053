"""LoRA linears: one fused operation for all projections that read the same activation."""

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import fx, nn

from fastft.graph.capture import QUANT_STATE
from fastft.graph.passes.context import Context, Replacement, refused, replace_if_proved
from fastft.graph.regions import NotARegionError, Region, collect, make_region
from fastft.graph.report import Rewrite
from fastft.kernels import lora

RULE = "lora"
QUANT_PARTS = ("absmax", "code2", "absmax2", "offset")


@frozen(eq=False)
class Projection:
    """One LoRA linear as the fused operation takes it: nodes of its tensors, and constants."""

    region: Region
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    a: fx.Node
    b: fx.Node
    scale: float
    quant_state: tuple[fx.Node, ...]
    out_features: int


def replace_lora_linears(graph_module: fx.GraphModule, context: Context) -> tuple[Rewrite, ...]:
    """Replace PEFT's LoRA linears, those of one parent and one input together."""
    done: list[Rewrite] = []
    groups: dict[tuple[str, fx.Node], list[Projection]] = {}
    for name, module, nodes in collect(graph_module.graph, context.binding, is_lora_linear):
        try:
            found = lora_projection(make_region(name, module, nodes, context.binding))
        except NotARegionError as error:
            found = str(error)
        if isinstance(found, str):
            done.append(refused(RULE, name, found))
        else:
            groups.setdefault((name.rpartition(".")[0], found.x), []).append(found)
    for (parent, _), projections in groups.items():
        done += _replace_group(graph_module, context, parent, projections)
    return tuple(done)


def is_lora_linear(name: str, module: nn.Module) -> bool:
    """Say whether the module is one of PEFT's LoRA layers around a linear (by what it is, PEFT is not imported)."""
    return (
        any(base.__module__.startswith("peft.tuners.lora") for base in type(module).__mro__)
        and hasattr(module, "lora_A")
        and hasattr(module, "base_layer")
        and hasattr(module.base_layer, "out_features")
    )


def lora_projection(region: Region) -> Projection | str:
    """Return the parts of a LoRA linear, or the reason why it cannot be fused."""
    module = region.module
    active = [name for name in module.active_adapters if name in module.lora_A]
    reason = _unfusable(module, active)
    if reason:
        return reason
    adapter = active[0]
    have = dict(region.parameters)
    base = module.base_layer
    weight, bias = have.pop("base_layer.weight", None), have.pop("base_layer.bias", None)
    a, b = have.pop(f"lora_A.{adapter}.weight", None), have.pop(f"lora_B.{adapter}.weight", None)
    state = tuple(
        node for part in QUANT_PARTS if (node := have.pop(f"base_layer.{QUANT_STATE}.{part}", None)) is not None
    )
    expected = _quant_parts(base)
    if expected is None:
        return f"base layer {type(base).__name__} has no fused form"
    # A code table that all weights share can be bound under another weight's name.
    shared = [node for name, node in have.items() if name.endswith(".code2")]
    if len(state) == expected - 1 and len(shared) == 1:
        state = (state[0], shared[0], *state[1:])
    elif have:
        return f"uses further parameters {sorted(have)}"
    if weight is None or a is None or b is None or len(state) != expected:
        return f"its parameters {sorted(region.parameters)} are not those of a LoRA linear"
    # A dynamic length that the region reads besides x is no activation.
    inputs = [node for node in region.inputs if not isinstance(node.meta.get("example_value"), torch.SymInt)]
    if len(inputs) != 1 or len(region.outputs) != 1:
        return f"has {len(inputs)} inputs and {len(region.outputs)} outputs, not one each"
    scale = float(module.scaling[adapter])
    return Projection(region, inputs[0], weight, bias, a, b, scale, state, base.out_features)


def _unfusable(module: nn.Module, active: Sequence[str]) -> str:
    if module.merged or module.disable_adapters:
        return "the adapter is merged or switched off"
    if len(active) != 1:
        return f"{len(active)} adapters are active; one is fused"
    adapter = active[0]
    if adapter in getattr(module, "lora_variant", {}) or module.use_dora.get(adapter):
        return "DoRA and other LoRA variants run as PEFT wrote them"
    if not isinstance(module.lora_dropout[adapter], nn.Identity):
        return "LoRA dropout above 0 runs as PEFT wrote it"
    if module.lora_B[adapter].bias is not None:
        return "a bias on lora_B runs as PEFT wrote it"
    return ""


def _quant_parts(base: nn.Module) -> int | None:
    """Return how many tensors the quantisation state of a supported base layer has, None for an unsupported one."""
    state = getattr(base.weight, QUANT_STATE, None)
    if state is not None:
        fits = (
            state.quant_type == "nf4" and state.blocksize == 64 and (not state.nested or state.state2.blocksize == 256)
        )
        return (4 if state.nested else 1) if fits else None
    plain = base.weight.is_floating_point() and base.weight.dim() == 2 and isinstance(base, nn.Linear)
    return 0 if plain and not hasattr(base.weight, "CB") else None


def _replace_group(
    graph_module: fx.GraphModule, context: Context, parent: str, projections: list[Projection]
) -> list[Rewrite]:
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    nodes = sorted((node for p in projections for node in p.region.nodes), key=order.__getitem__)
    if len(projections) == 1:
        region = projections[0].region
    else:
        try:
            region = make_region(parent, context.module(parent), nodes, context.binding)
        except NotARegionError:
            return [r for p in projections for r in _replace_group(graph_module, context, parent, [p])]
    replacement = _replacement(region, projections, context.implementations[RULE])
    origins = [p.region.nodes[0] for p in projections]
    result = replace_if_proved(graph_module, context, region, replacement, origins)
    if not result.applied and len(projections) > 1:
        return [r for p in projections for r in _replace_group(graph_module, context, parent, [p])]
    names = [p.region.name for p in projections]
    return [Rewrite(RULE, n, result.applied, result.reason, result.implementation, result.fingerprint) for n in names]


def _replacement(region: Region, projections: Sequence[Projection], implementation: str) -> Replacement:
    function = lora.lora_linears if implementation == "op" else lora.ref.lora_linears
    made = [p.region.outputs[0].meta["example_value"] for p in projections]
    dtype = made[0].dtype  # what autocast, where it is on, computes in
    x_dtype = projections[0].x.meta["example_value"].dtype

    weight_dtypes = [p.weight.meta["example_value"].dtype for p in projections]

    def fused(x, weights, biases, a, b, scales, states, out_features):
        x = x if x_dtype == dtype else x.to(dtype)
        weights = [w if s or given == dtype else w.to(dtype) for w, s, given in zip(weights, states, weight_dtypes)]
        results = function(x, weights, biases, a, b, scales, states, out_features)
        return tuple(results[index] for index in range(len(weights)))

    arguments = (
        projections[0].x,
        [p.weight for p in projections],
        [p.bias for p in projections],
        [p.a for p in projections],
        [p.b for p in projections],
        [p.scale for p in projections],
        [list(p.quant_state) for p in projections],
        [p.out_features for p in projections],
    )
    return Replacement(RULE, fused, arguments, implementation, same_rounding=False)
