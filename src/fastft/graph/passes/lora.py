"""LoRA linears: one fused operation for all projections that read the same activation."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from attrs import evolve, frozen
from torch import fx, nn

from fastft.graph.capture import QUANT_STATE
from fastft.graph.kept import FACTORS, KeptInput, Packed, kept_inputs
from fastft.graph.passes.context import Context, Replacement, refused, replace_if_proved
from fastft.graph.regions import NotARegionError, Region, collect, make_region
from fastft.graph.report import Rewrite
from fastft.kernels import fp8, lora

RULE = "lora"
QUANT_PARTS = ("absmax", "code2", "absmax2", "offset")
FP8_SCALE = "weight_scale"
"""The buffer that holds the scales of an fp8 weight's rows (`fastft.model.fp8_linear`)."""


@frozen(eq=False)
class Projection:
    """One LoRA linear as the fused operation takes it: nodes of its tensors, and constants.

    `nf4`: the weight is in NF4. `not_fp8` says why its large product cannot have fp8 factors, "" where it can.
    """

    region: Region
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    a: fx.Node
    b: fx.Node
    scale: float
    quant_state: tuple[fx.Node, ...]
    out_features: int
    nf4: bool = False
    not_fp8: str = ""


def replace_lora_linears(graph_module: fx.GraphModule, context: Context) -> tuple[Rewrite, ...]:
    """Replace PEFT's LoRA linears, those of one parent and one input together."""
    done: list[Rewrite] = []
    groups: dict[tuple[str, fx.Node, str], list[Projection]] = {}
    for name, module, nodes in collect(graph_module.graph, context.binding, _has_its_adapter):
        try:
            found = lora_projection(make_region(name, module, nodes, context.binding))
        except NotARegionError as error:
            found = str(error)
        if isinstance(found, str):
            done.append(refused(RULE, name, found))
        else:
            apart = found.not_fp8 if context.compute == "fp8" else ""
            groups.setdefault((name.rpartition(".")[0], found.x, apart), []).append(found)
    for (parent, _, _), projections in groups.items():
        done += _replace_group(graph_module, context, parent, projections)
    return tuple([*done, *(_other_linears(graph_module, context) if context.compute == "fp8" else ())])


def _other_linears(graph_module: fx.GraphModule, context: Context) -> list[Rewrite]:
    """Return a record of every linear that has no adapter: what runs as it was though fp8 was asked for."""
    inside = {id(part) for _, m in context.binding.modules.values() if is_lora_linear("", m) for part in m.modules()}
    found = collect(graph_module.graph, context.binding, lambda _, m: isinstance(m, nn.Linear) and id(m) not in inside)
    why = "it has no LoRA adapter, and runs as it was"
    return [Rewrite(RULE, name, False, why, not_fp8=why) for name, _, _ in found]


def is_lora_linear(name: str, module: nn.Module) -> bool:
    """Say whether the module is one of PEFT's LoRA layers around a linear (by what it is, PEFT is not imported)."""
    return (
        any(base.__module__.startswith("peft.tuners.lora") for base in type(module).__mro__)
        and hasattr(module, "lora_A")
        and hasattr(module, "base_layer")
        and hasattr(module.base_layer, "out_features")
    )


def _has_its_adapter(name: str, module: nn.Module) -> bool:
    return is_lora_linear(name, module) and not module.disable_adapters


def lora_projection(region: Region) -> Projection | str:
    """Return the parts of a LoRA linear, or the reason why it cannot be fused."""
    module = region.module
    reason = obstacle(module)
    if reason:
        return reason
    adapter = active_adapters(module)[0]
    have = dict(region.parameters)
    base = module.base_layer
    weight, bias = have.pop("base_layer.weight", None), have.pop("base_layer.bias", None)
    a, b = have.pop(f"lora_A.{adapter}.weight", None), have.pop(f"lora_B.{adapter}.weight", None)
    state = tuple(
        node for part in QUANT_PARTS if (node := have.pop(f"base_layer.{QUANT_STATE}.{part}", None)) is not None
    )
    if is_fp8_linear(base) and (stored := have.pop(f"base_layer.{FP8_SCALE}", None)) is not None:
        state = (stored,)
    expected = _quant_parts(base)
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
    why = not_fp8(base, region.outputs[0].meta["example_value"].dtype)
    return Projection(region, inputs[0], weight, bias, a, b, scale, state, base.out_features, is_nf4_linear(base), why)


def not_fp8(base: nn.Module, dtype: torch.dtype) -> str:
    """Return why the product with a linear's weight cannot have fp8 factors for an input of `dtype`, "" if it can."""
    if base.weight.requires_grad:
        return "its weight is trained"
    return fp8.obstacle(base.weight.device, dtype, base.out_features, base.in_features, is_nf4_linear(base))


def is_fp8_linear(base: nn.Module) -> bool:
    """Say whether the layer holds its weight in fp8: a byte a weight, and scales beside them."""
    weight = base._parameters.get("weight")
    return weight is not None and weight.dtype == torch.uint8 and FP8_SCALE in base._buffers


def is_nf4_linear(base: nn.Module) -> bool:
    """Say whether the layer holds its weight in bitsandbytes' NF4."""
    return getattr(getattr(base._parameters.get("weight"), QUANT_STATE, None), "quant_type", "") == "nf4"


def obstacle(module: nn.Module) -> str:
    """Return why a LoRA linear (`is_lora_linear`) cannot be fused, as far as the module tells; "" if it can be."""
    active = active_adapters(module)
    if module.merged or module.disable_adapters:
        return "the adapter is merged or switched off"
    if len(active) != 1:
        return f"{len(active)} adapters are active; one is fused"
    adapter = active[0]
    if adapter in getattr(module, "lora_variant", {}) or module.use_dora.get(adapter):
        return "DoRA and other LoRA variants run as PEFT wrote them"
    if not isinstance(module.lora_dropout[adapter], nn.Identity):
        return "LoRA dropout above 0 runs as PEFT wrote it"
    parts = module.lora_A[adapter], module.lora_B[adapter]
    if not all(isinstance(part, nn.Linear) for part in parts):
        return f"the adapter of {type(module).__name__} is no pair of linears and runs as PEFT wrote it"
    if module.lora_B[adapter].bias is not None:
        return "a bias on lora_B runs as PEFT wrote it"
    base = module.base_layer
    return f"base layer {type(base).__name__} has no fused form" if _quant_parts(base) is None else ""


def active_adapters(module: nn.Module) -> list[str]:
    """Return the names of the adapters that a LoRA linear computes with."""
    return [name for name in module.active_adapters if name in module.lora_A]


def _quant_parts(base: nn.Module) -> int | None:
    """Return how many tensors the quantisation state of a supported base layer has, None for an unsupported one.

    Some of these (GPTQ, AWQ) have no weight, only what it is packed into.
    """
    weight = getattr(base, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    state = getattr(weight, QUANT_STATE, None)
    if is_fp8_linear(base):
        return 1
    if state is not None:
        fits = (
            state.quant_type == "nf4" and state.blocksize == 64 and (not state.nested or state.state2.blocksize == 256)
        )
        return (4 if state.nested else 1) if fits else None
    plain = weight.is_floating_point() and weight.dim() == 2 and isinstance(base, nn.Linear)
    return 0 if plain and not hasattr(weight, "CB") else None


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
    replacement = _replacement(projections, context.implementations[RULE])
    origins = [p.region.nodes[0] for p in projections]
    result = replace_if_proved(graph_module, context, region, replacement, origins)
    if not result.applied and len(projections) > 1:
        return [r for p in projections for r in _replace_group(graph_module, context, parent, [p])]
    return [evolve(result, module=p.region.name) for p in projections]


def _replacement(projections: Sequence[Projection], implementation: str) -> Replacement:
    dtype = projections[0].region.outputs[0].meta["example_value"].dtype

    def computed(function, x, weights, biases, a, b, scales, states, out_features, **more):
        weights = [w if s or w.dtype == dtype else w.to(dtype) for w, s in zip(weights, states)]
        results = function(x, weights, biases, a, b, scales, states, out_features, **more)
        return tuple(results[index] for index in range(len(weights)))

    def arguments(weights, states):
        return (
            projections[0].x,
            weights,
            [p.bias for p in projections],
            [p.a for p in projections],
            [p.b for p in projections],
            [p.scale for p in projections],
            states,
            [p.out_features for p in projections],
        )

    op, plain = partial(computed, lora.lora_linears), partial(computed, lora.ref.lora_linears)
    return fused_linears(RULE, projections, arguments, op, plain, implementation, projections[0].not_fp8)


def fused_linears(
    rule: str,
    projections: Sequence[Projection],
    arguments: Callable[[list[fx.Node], list[list[fx.Node]]], tuple[object, ...]],
    op: Callable[..., object],
    plain: Callable[..., object],
    implementation: str,
    not_fp8: str,
    eight_bits: bool = False,
) -> Replacement:
    """Return how a region of `projections` is computed: by `op` (with `fp8=True`, in fp8), or `plain` torch code.

    Both take what `arguments` makes of the weights and their quantisation states, x first, which is cast to the dtype
    of the results: what autocast, where it is on, computes in. `not_fp8`: why there is no form with fp8 factors, or "".
    `eight_bits`: whether `op` takes `eight_bits=True`.
    """
    dtype = projections[-1].region.outputs[0].meta["example_value"].dtype
    x_dtype = projections[0].x.meta["example_value"].dtype
    not_fp8 = not_fp8 or ("" if implementation == "op" else "only the fused operation computes in fp8")

    def cast(function):
        return lambda x, *rest, **options: function(x if x_dtype == dtype else x.to(dtype), *rest, **options)

    return Replacement(
        rule,
        cast(op if implementation == "op" else plain),
        arguments(*held_weights(projections)),
        implementation,
        same_rounding=False,
        fp8=not_fp8 or cast(partial(op, fp8=True)),
        kept_arguments=lambda kept, in_fp8: arguments(*kept_weights(projections, kept, FACTORS if in_fp8 else dtype)),
        eight_bits=eight_bits and implementation == "op",
    )


def held_weights(projections: Sequence[Projection]) -> tuple[list[fx.Node], list[list[fx.Node]]]:
    """Return the weights and their quantisation states as the model holds them."""
    return [p.weight for p in projections], [list(p.quant_state) for p in projections]


def kept_weights(
    projections: Sequence[Projection], kept: list[KeptInput], dtype: torch.dtype
) -> tuple[list[fx.Node], list[list[fx.Node]]]:
    """Return the same with a copy in place of every NF4 weight: dequantised, without a state, or as fp8 factors.

    Factors of weights that read one activation are made together: its gradient is one product with all of them.
    """
    weights, states = held_weights(projections)
    together: dict[object, list[int]] = {}
    for i, p in enumerate(projections):
        if p.nf4:
            together.setdefault(p.x if dtype == FACTORS else i, []).append(i)
    for places in together.values():
        group = [_packed(projections[i]) for i in places]
        for i, (copy, *rest) in zip(places, kept_inputs(kept, group, dtype), strict=True):
            weights[i], states[i] = copy, rest
    return weights, states


def _packed(projection: Projection) -> Packed[fx.Node]:
    k = projection.a.meta["example_value"].shape[1]
    return Packed(projection.weight, projection.quant_state, projection.out_features, k)
