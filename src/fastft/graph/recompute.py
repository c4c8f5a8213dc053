"""Memory plans: which results of a layer's forward are kept for its backward, and which are computed again."""

import operator
from typing import Literal

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import CheckpointPolicy

PlanName = Literal["auto", "keep", "min"]
PLANS: tuple[str, ...] = ("auto", "keep", "min")
# What costs real time to compute again, by the end of the operation's name: matrix products and attention.
COSTLY = ("mm", "bmm", "addmm", "baddbmm", "_scaled_mm", "lora_linears", "attention", "attn", "flex_attention", "conv")


class TagPass(CustomGraphPass):
    """Tags the nodes of a joint graph for the partitioner, as the plan says.

    "keep" (and "auto", until budgets are solved for) keeps the results of matrix products and of attention, and
    computes everything elementwise again: norms, gates and rotations cost less than the traffic of keeping them, and
    what they are made from is kept anyway. "min" keeps the layer's input alone. Both keep what is drawn at random.
    """

    def __init__(self, plan: PlanName) -> None:
        self.plan = plan

    def __call__(self, graph: fx.Graph) -> None:
        """Tag `graph` in place."""
        backward = _backward_nodes(graph)
        for node in graph.nodes:
            if node.op != "call_function" or node in backward:
                continue
            maker = _maker(node)
            if not (_draws_random_numbers(maker) or (self.plan != "min" and _is_costly(maker))):
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
                node.meta["ac_graph_id"] = 0

    def uuid(self) -> bytes:
        """Return what identifies this pass in Inductor's cache key."""
        return f"fastft-plan-{self.plan}-3".encode()


def _maker(node: fx.Node) -> fx.Node:
    """Return the operation that returned the tuple which `node` takes apart, or `node` itself."""
    while node.target is operator.getitem and node.args[0].op == "call_function":
        node = node.args[0]
    return node


def _is_costly(node: fx.Node) -> bool:
    packet = getattr(node.target, "overloadpacket", node.target)
    name = getattr(packet, "__name__", str(packet))
    return any(name == word or name.endswith(f"_{word}") for word in COSTLY) or "_attention" in name


def _draws_random_numbers(node: fx.Node) -> bool:
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
