"""The adapters of a whole layer cast together: a rewrite of the joint graph of its forward and backward.

Each operation on LoRA linears casts the matrices it is given to the dtype it computes in, in two short kernels, forward
and again backward. Here one operation casts those of all of them, and they are given what they would have made. Every
number is the same; small models, whose steps are thousands of kernels, have a tenth less of them.
"""

from collections.abc import Iterator

import torch
from attrs import frozen
from torch import fx
from torch.fx.node import map_arg

from fastft.kernels.lora.casts import joins

# Arguments of an operation that are adapters' matrices, and the one in whose dtype it computes.
ADAPTERS = {
    "fastft::lora_linears": (("a", "b"), "x"),
    "fastft::lora_linears_backward": (("a", "b"), "x"),
    "fastft::linears": (("a",), "x"),
    "fastft::linears_backward": (("a",), "x"),
    "fastft::lora_glu_down": (("b_gate", "b_up", "a_down", "b_down"), "gate0"),
    "fastft::lora_glu_down_backward": (("b_gate", "b_up", "a_down", "b_down"), "dy"),
}
# The argument of a backward that says in what dtype the adapters' gradients are wanted.
GRAD_DTYPE = "grad_dtype"
WIDE = torch.float32


@frozen(eq=False)
class Use:
    """An operation whose adapters, inputs of the graph in fp32, are cast to `dtype`: their nodes by argument."""

    node: fx.Node
    dtype: torch.dtype
    matrices: dict[str, fx.Node | list[fx.Node]]


def share_casts(graph: fx.Graph) -> None:
    """Rewrite a joint graph in place, so that the adapters which its operations would cast are cast once."""
    uses = list(_uses(graph))
    for dtype in dict.fromkeys(use.dtype for use in uses):
        own = [use for use in uses if use.dtype == dtype]
        wanted = dict.fromkeys(matrix for use in own for matrix in _flat(use.matrices))
        copies = _cast(graph, list(wanted), dtype)
        for use in own:
            _give(use.node, {name: _copied(value, copies) for name, value in use.matrices.items()})


def _uses(graph: fx.Graph) -> Iterator[Use]:
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or schema.name not in ADAPTERS:
            continue
        names, activation = ADAPTERS[schema.name]
        given = dict(zip(_names(node), node.args))
        matrices = {name: given[name] for name in names}
        dtype = given[activation].meta["val"].dtype
        if dtype.itemsize == 2 and all(_castable(matrix, dtype) for matrix in _flat(matrices)):
            yield Use(node, dtype, matrices)


def _names(node: fx.Node) -> list[str]:
    return [argument.name for argument in node.target._schema.arguments]


def _flat(matrices: dict[str, fx.Node | list[fx.Node]]) -> list[fx.Node]:
    return [node for given in matrices.values() for node in (given if isinstance(given, list | tuple) else [given])]


def _castable(node: fx.Node, dtype: torch.dtype) -> bool:
    """Say whether a matrix is cast together with others: an input of the graph, of a known size, that `joins` them."""
    value = node.meta.get("val") if node.op == "placeholder" else None
    known = isinstance(value, torch.Tensor) and all(isinstance(size, int) for size in value.shape)
    return known and joins(value, dtype)


def _cast(graph: fx.Graph, matrices: list[fx.Node], dtype: torch.dtype) -> dict[fx.Node, fx.Node]:
    """Return the node of each matrix's copy: views of what one operation makes of all, in their order."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    mode, copies, start = matrices[0].meta["val"].fake_mode, {}, 0
    with graph.inserting_before(inputs[-1].next), mode:

        def call(target: object, *args: object) -> fx.Node:
            node = graph.call_function(target, args)
            node.meta["val"] = target(*map_arg(args, lambda given: given.meta["val"]))
            return node

        flat = call(torch.ops.fastft.cast_matrices.default, matrices, dtype)
        for matrix in matrices:
            shape = list(matrix.meta["val"].shape)
            end = start + matrix.meta["val"].numel()
            piece = call(torch.ops.aten.slice.Tensor, flat, 0, start, end)
            copies[matrix] = call(torch.ops.aten.view.default, piece, shape)
            start = end
    return copies


def _copied(value: fx.Node | list[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node | list[fx.Node]:
    return copies[value] if isinstance(value, fx.Node) else [copies[node] for node in value]


def _give(node: fx.Node, given: dict[str, object]) -> None:
    """Give an operation other adapters; a backward is told that their gradients are wanted in fp32 all the same."""
    names = _names(node)
    node.args = tuple(given.get(name, old) for name, old in zip(names, node.args))
    if GRAD_DTYPE in names:
        node.kwargs = {**node.kwargs, GRAD_DTYPE: WIDE}
