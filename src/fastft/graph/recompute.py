"""Memory plans: which results of a layer's forward are kept for its backward, and which are computed again."""

from typing import Literal

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import CheckpointPolicy

PlanName = Literal["auto", "keep", "min"]
PLANS: tuple[str, ...] = ("auto", "keep", "min")


class TagPass(CustomGraphPass):
    """Tags the nodes of a joint graph for the partitioner, as the plan says.

    "keep" (and "auto", until budgets are solved for) leaves the choice to the partitioner's minimum cut, which keeps
    the results of matrix products. "min" keeps the layer's input alone and computes the rest again.
    """

    def __init__(self, plan: PlanName) -> None:
        self.plan = plan

    def __call__(self, graph: fx.Graph) -> None:
        """Tag `graph` in place."""
        if self.plan != "min":
            return
        backward = _backward_nodes(graph)
        for node in graph.nodes:
            if node.op == "call_function" and node not in backward:
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
                node.meta["ac_graph_id"] = 0

    def uuid(self) -> bytes:
        """Return what identifies this pass in Inductor's cache key."""
        return f"fastft-plan-{self.plan}-1".encode()


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
