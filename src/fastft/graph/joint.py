"""What is done to the joint graph of a layer's forward and backward before it is parted."""

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from fastft.graph.recompute import tag
from fastft.graph.shared_casts import share_casts

VERSION = 2
"""Changes with what the pass does to a graph: part of the key of Inductor's cache."""


class JointPass(CustomGraphPass):
    """Has adapters cast together, and tags the graph for the partitioner, so that it keeps what `level` says."""

    def __init__(self, level: str) -> None:
        self.level = level

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite and tag `graph` in place."""
        share_casts(graph)
        tag(graph, self.level)

    def uuid(self) -> bytes:
        """Return what identifies this pass in Inductor's cache key."""
        return f"fastft-level-{self.level}-{VERSION}".encode()
