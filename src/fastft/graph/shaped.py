"""Record the nodes that a function makes, while it may still ask its arguments for shape, dtype and device."""

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.proxy import GraphAppendingTracer, Proxy

STATIC = frozenset({"shape", "dtype", "device", "ndim", "is_cuda", "layout", "requires_grad"})
STATIC_METHODS = frozenset({"dim", "size", "numel", "is_floating_point", "is_contiguous", "stride", "element_size"})


class ShapedProxy(Proxy):
    """A proxy that answers questions about its tensor from the example that Dynamo captured with."""

    def __getattr__(self, name: str) -> Any:
        example = self.node.meta.get("example_value")
        if isinstance(example, torch.Tensor) and (name in STATIC or name in STATIC_METHODS):
            return getattr(example, name)
        return super().__getattr__(name)

    def __len__(self) -> int:
        return len(self.node.meta["example_value"])


class ShapedTracer(GraphAppendingTracer):
    """Appends nodes to a graph and computes each one's example value on fake tensors, as Dynamo does."""

    def proxy(self, node: fx.Node) -> ShapedProxy:
        """Wrap `node`."""
        return ShapedProxy(node, self)

    def create_node(self, kind: str, target: Any, args: tuple, kwargs: dict, *rest: Any, **more: Any) -> fx.Node:
        """Create a node and its example value."""
        node = super().create_node(kind, target, args, kwargs, *rest, **more)
        given, named = fx.node.map_aggregate((args, kwargs), _example)
        mode = next((leaf.fake_mode for leaf in _leaves((given, named)) if isinstance(leaf, FakeTensor)), None)
        if mode is not None and kind in ("call_function", "call_method"):
            with mode, torch.no_grad():
                node.meta["example_value"] = (
                    target(*given, **named)
                    if kind == "call_function"
                    else getattr(given[0], target)(*given[1:], **named)
                )
        elif kind == "call_function":
            node.meta["example_value"] = target(*given, **named)
        return node


def _example(value: Any) -> Any:
    return value.meta.get("example_value") if isinstance(value, fx.Node) else value


def _leaves(value: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(value)
