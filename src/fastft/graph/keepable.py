"""What can be kept otherwise than it is, asked before any graph is there: it is for linears that a rewrite takes.

NF4 weights dequantised or as fp8 factors, and gate and up in 8 bits.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import fx, nn

from fastft.graph.capture import Binding, is_instance_of
from fastft.graph.kept import KeptInput
from fastft.graph.passes.feed_forward import fusable_linears
from fastft.graph.passes.lora import is_lora_linear, is_nf4_linear, obstacle
from fastft.memory.plan import NO_NF4
from fastft.registry.spec import GluPoint, ModelSpec


def keepable_linears(
    layers: Sequence[nn.Module], spec: ModelSpec, disable: Collection[str] = ()
) -> tuple[tuple[tuple[nn.Module, ...], ...], str]:
    """Return the linears of each layer whose weights can be kept so, and why not one can be; "" if one can.

    A proof may refuse one later (`left_packed`).
    """
    found, reasons = [], []
    for layer in layers:
        linears = _nf4_lora_linears(layer.named_modules())
        gated = _feed_forwards(layer, spec) if "feed_forward" not in disable else ()
        whole = {id(linear) for module, point in gated for linear in fusable_linears(module, point)}
        whys = [_reason(m, id(m) in whole, disable) for m in linears]
        found.append(tuple(m.base_layer for m, why in zip(linears, whys, strict=True) if not why))
        reasons += whys
    return tuple(found), "" if any(found) else next(iter(reasons), NO_NF4)


def eight_bits_obstacle(
    layers: Sequence[nn.Module], spec: ModelSpec, disable: Collection[str], implementations: Mapping[str, str]
) -> str:
    """Return why gate and up of these layers cannot be kept in 8 bits, "" if they can; a proof may refuse it later."""
    if "feed_forward" in disable or implementations.get("feed_forward") == "torch":
        return "only the fused operation of the rewrite 'feed_forward' does so, and it is left out"
    gated = [found for layer in layers for found in _feed_forwards(layer, spec)]
    if not gated or not all(fusable_linears(module, point) for module, point in gated):
        return "that takes adapters on all linears of a gated feed-forward, without bias"
    return ""


def left_packed(graph: fx.Graph, binding: Binding, kept: Collection[KeptInput]) -> list[fx.Node]:
    """Return the inputs of a rewritten graph that take NF4 weights under an adapter that computes, and no copies."""
    linears = _nf4_lora_linears(binding.modules.values())
    weights = {id(m.base_layer.weight) for m in linears if not (m.disable_adapters or m.merged)}
    copied = {packed.weight for one in kept for packed in one.packed}
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node not in copied]
    return [node for node in inputs if id(binding.tensors.get(node.name)) in weights]


def _nf4_lora_linears(modules: Iterable[tuple[str, nn.Module]]) -> list[nn.Module]:
    return [module for name, module in modules if is_lora_linear(name, module) and is_nf4_linear(module.base_layer)]


def _reason(linear: nn.Module, in_whole: bool, disable: Collection[str]) -> str:
    if "lora" in disable:
        return "" if in_whole else "the rewrite 'lora' is disabled"
    return obstacle(linear)


def _feed_forwards(layer: nn.Module, spec: ModelSpec) -> Iterator[tuple[nn.Module, GluPoint]]:
    """Yield the gated feed-forwards of a layer, each with what the spec says of it."""
    for module in layer.modules():
        for point in spec.glus:
            if is_instance_of(module, point.classes):
                yield module, point
