"""The ordered rewrites, and the pure function that runs them over one captured graph."""

from collections.abc import Callable, Mapping, Sequence

from attrs import frozen
from torch import fx, nn

from fastft.graph.capture import copy_graph, place
from fastft.graph.passes.context import Context
from fastft.graph.passes.feed_forward import replace_feed_forwards
from fastft.graph.passes.glu import replace_glus
from fastft.graph.passes.lora import replace_lora_linears
from fastft.graph.passes.norm import replace_norms
from fastft.graph.passes.rope import replace_rotations
from fastft.graph.report import GraphReport, Rewrite


@frozen(eq=False)
class Pass:
    """A rewrite by name. `implementation` is its form within a compiled graph, "op" or "torch", chosen by measurement.

    Inductor fuses transparent norms, gates and rotations with their neighbours, which moves fewer bytes than an opaque
    kernel between them; it cannot make a LoRA linear over 4-bit weights.
    """

    name: str
    rewrite: Callable[[fx.GraphModule, Context], tuple[Rewrite, ...]]
    implementation: str


PASSES = (
    Pass("feed_forward", replace_feed_forwards, "op"),
    Pass("lora", replace_lora_linears, "op"),
    Pass("glu", replace_glus, "torch"),
    Pass("norm", replace_norms, "torch"),
    Pass("rope", replace_rotations, "torch"),
)


def default_implementations() -> Mapping[str, str]:
    """Return the form of each rewrite within a compiled graph."""
    return {step.name: step.implementation for step in PASSES}


def rewrite(
    graph_module: fx.GraphModule, context: Context, unit: nn.Module | None, disable: Sequence[str] = ()
) -> tuple[fx.GraphModule, GraphReport]:
    """Return a rewritten copy of `graph_module` and what was done; the original is left alone.

    `unit` is the compiled module, None where it is not known; `disable` names passes to leave out.
    """
    new = copy_graph(graph_module)
    if unit is not None:
        place(new, context.binding, unit)
    done: list[Rewrite] = []
    for step in PASSES:
        if step.name not in disable:
            done += step.rewrite(new, context)
    _drop_bodies(new)
    # No dead-code elimination here: Dynamo's nodes for context managers have effects and no users.
    new.graph.lint()
    new.recompile()
    before, after = len(graph_module.graph.nodes), len(new.graph.nodes)
    return new, GraphReport("graph" if unit is None else type(unit).__name__, before, after, tuple(done))


def _drop_bodies(graph_module: fx.GraphModule) -> None:
    """Drop the bodies of functions that were replaced, as of bitsandbytes' products: later passes go through each.

    The copy lets go of them; what is within a body is the original's as well, and stays.
    """
    unused = [node for node in graph_module.graph.nodes if node.op == "get_attr" and not node.users]
    for node in unused:
        graph_module.graph.erase_node(node)
    used = {node.target for node in graph_module.graph.nodes if node.op in ("get_attr", "call_module")}
    bodies = dict(graph_module.named_children())
    for name in {node.target for node in unused} - used:
        if name in bodies:
            delattr(graph_module, name)
