"""What every pass is given, and how a region is proved and replaced."""

from collections.abc import Callable, Mapping, Sequence

import torch
from attrs import field, frozen
from torch import fx, nn

from fastft.graph.capture import Binding
from fastft.graph.regions import Region, emit, erase, fingerprint
from fastft.graph.report import Rewrite
from fastft.graph.verify import Verdict, prove
from fastft.registry.spec import ModelSpec


@frozen(eq=False)
class Context:
    """What the passes over one captured graph share.

    `implementations` says per rule whether a region becomes a fused "op" or "torch" code. `verdicts` remembers what
    was proved, by the region's structure, the replacement's constants and the precision it was computed in; it lives
    as long as one compiled model.
    """

    binding: Binding
    spec: ModelSpec
    implementations: Mapping[str, str]
    verdicts: dict[tuple[object, ...], Verdict] = field(factory=dict)

    def module(self, name: str) -> nn.Module:
        """Return the module called `name`, the full qualified name."""
        return next(module for found, module in self.binding.modules.values() if found == name)


@frozen(eq=False)
class Replacement:
    """A function that computes a region's outputs from `arguments` (nodes and constants), and what it claims."""

    rule: str
    function: Callable[..., object]
    arguments: tuple[object, ...]
    implementation: str
    same_rounding: bool = True
    inputs: Mapping[fx.Node, torch.Tensor] = field(factory=dict)


def replace_if_proved(
    graph_module: fx.GraphModule,
    context: Context,
    region: Region,
    replacement: Replacement,
    stack_from: Sequence[fx.Node] | None = None,
) -> Rewrite:
    """Prove `replacement` against `region` and, if it holds, put it into the graph; report either way."""
    mark = fingerprint(region)
    constants = tuple(a for a in fx.node.map_aggregate(replacement.arguments, _constant) if a is not None)
    key = (replacement.rule, replacement.implementation, mark, repr(constants), *_precision(region))
    if key not in context.verdicts:
        context.verdicts[key] = prove(
            graph_module,
            region,
            context.binding,
            replacement.function,
            replacement.arguments,
            same_rounding=replacement.same_rounding,
            inputs=replacement.inputs,
        )
    verdict = context.verdicts[key]
    if verdict.ok:
        origins = stack_from or [region.nodes[0]] * len(region.outputs)
        emit(graph_module.graph, replacement.function, replacement.arguments, region.nodes, origins, region.outputs)
        erase(graph_module.graph, region.nodes)
    return Rewrite(replacement.rule, region.name, verdict.ok, verdict.reason, replacement.implementation, mark)


def _precision(region: Region) -> tuple[object, ...]:
    """Return what decides on dtypes beside those of the inputs: autocast's state, and the dtypes of the results."""
    made = [node.meta["example_value"] for node in region.outputs]
    tensors = [value for value in made if isinstance(value, torch.Tensor)]
    kinds = {tensor.device.type for tensor in tensors}
    states = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds)]
    return (*(tensor.dtype for tensor in tensors), *states)


def _constant(value: object) -> object:
    return None if isinstance(value, fx.Node) else value


def refused(rule: str, name: str, reason: str) -> Rewrite:
    """Return the record of a region that was found and cannot be replaced."""
    return Rewrite(rule, name, False, reason)
