"""What is done to the joint graph of a layer's forward and backward before it is parted."""

from functools import cache
from pathlib import Path

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

import fastft.kernels
from fastft.graph import recompute, shared_casts
from fastft.graph.recompute import tag
from fastft.graph.shared_casts import share_casts
from fastft.memory import levels


class JointPass(CustomGraphPass):
    """Has adapters cast together, and tags the graph for the partitioner, so that it keeps what `level` says."""

    def __init__(self, level: str) -> None:
        self.level = level

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite and tag `graph` in place."""
        share_casts(graph)
        tag(graph, self.level)

    def uuid(self) -> bytes:
        """Return what identifies this pass in Inductor's cache key: the level, and the sources of what is done.

        Those of all kernels too, as the bodies of custom operations are no part of that key. (A tag on the key would
        do as well, but Inductor's worker processes do not know it, and the launch configurations that were timed are
        kept under the tag: a later process would not find them.)
        """
        return sources_hash() + self.level.encode()


@cache
def sources_hash() -> bytes:
    """Return a hash over the sources of this pass and of all kernels, whose operations it calls."""
    kernels = sorted(map(str, Path(fastft.kernels.__path__[0]).rglob("*.py")))
    return get_hash_for_files((__file__, recompute.__file__, shared_casts.__file__, levels.__file__, *kernels))
