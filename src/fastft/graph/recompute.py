"""Memory plans: which results of a layer's forward are kept for its backward, and which are computed again."""

import operator
from typing import Literal, get_args

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import CheckpointPolicy

PlanName = Literal["auto", "keep", "min"]
PLANS: tuple[str, ...] = get_args(PlanName)


class TagPass(CustomGraphPass):
    """Tags the nodes of a joint graph for the partitioner, as the plan says.

    "keep" (and "auto", until budgets are solved for) leaves the choice to the partitioner's minimum cut, which keeps
    the results of matrix products. "min" keeps the layer's input, and what was drawn at random, and computes the rest
    again.
    """

    def __init__(self, plan: PlanName) -> None:
        self.plan = plan

    def __call__(self, graph: fx.Graph) -> None:
        """Tag `graph` in place."""
        if self.plan != "min":
            return
        backward = _backward_nodes(graph)
        for node in graph.nodes:
            if node.op == "call_function" and node not in backward and not _draws_random_numbers(_maker(node)):
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
                node.meta["ac_graph_id"] = 0

    def uuid(self) -> bytes:
        """Return what identifies this pass in Inductor's cache key."""
        return f"fastft-plan-{self.plan}-5".encode()


def _maker(node: fx.Node) -> fx.Node:
    """Return the operation that returned the tuple which `node` takes apart, or `node` itself."""
    while node.target is operator.getitem and node.args[0].op == "call_function":
        node = node.args[0]
    return node


def _draws_random_numbers(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else []
    if "dropout_p" in names:  # attention is tagged as random whether or not it drops anything
        index = names.index("dropout_p")
        given = node.args[index] if index < len(node.args) else node.kwargs.get("dropout_p", 0.0)
        return given != 0.0
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _backward_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Return all nodes that depend on a gradient coming in."""
    pending = [node for node in graph.nodes if node.op == "placeholder" and "tangents" in node.name]
    found: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.users)
    return found
