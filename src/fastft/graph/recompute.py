"""Memory levels: which results of a layer's forward are kept for its backward, and which are computed again.

A level says which kinds of costly operations may run again. Within that, a minimum cut of the joint graph finds the
fewest bytes to keep, and every node is tagged for the partitioner accordingly. What a node is follows from its
operation and its place in the graph (does an attention depend on it, does the residual stream take it up).
"""

import operator
from collections.abc import Iterable

import torch
from attrs import frozen
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fastft.memory.levels import LEVELS

# Operations that are neither aten's nor costly: everything else that is not aten's is taken for a matrix product.
CHEAP_CUSTOM = frozenset({"rms_norm", "layer_norm", "rope", "glu", "scale_gradient", "cast_matrices"})
MATMULS = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_scaled_mm", "_int_mm", "_grouped_mm"})
ATTENTIONS = ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "_cudnn_attention", "flex_attention")
PACKED_ATTENTIONS = frozenset({"packed_attention", "shared_attention", "_varlen_attn"})
NAMELESS_VIEWS = frozenset({"_unsafe_view", "_reshape_alias"})
BUILTIN = frozenset({"aten", "prims", "prim", "inductor_prims", "quantized_decomposed"})
# What running a node again is worth in kept bytes. A cheap one, by byte that it reads and writes: ties go to what is at
# hand, and sums of long rows are kept. A costly one that may run again, by byte of its results: a small result beside
# one that is not needed is kept.
CHEAP = 1 / 2048
COSTLY = 1 / 8
FALLBACK_SIZE = 4096


@frozen
class Cut:
    """What a level keeps: `saved` tensors (inputs of the graph left out) and the nodes that run `again`."""

    saved: tuple[fx.Node, ...]
    again: frozenset[fx.Node]


def tag(graph: fx.Graph, level: str) -> None:
    """Tag the nodes of a joint graph for the partitioner, in place, so that it keeps what `level` says and no more."""
    cut = choose(graph, level)
    backward = _backward_nodes(graph)
    for node in graph.nodes:
        if node.op != "call_function" or node in backward or _is_number(node):
            continue
        again = node in cut.again
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE if again else CheckpointPolicy.MUST_SAVE
        node.meta["ac_graph_id"] = 0


def choose(graph: fx.Graph, level: str) -> Cut:
    """Return the cheapest cut of a joint graph at `level`: bytes kept, and a little for each result computed again."""
    import networkx

    allowed = LEVELS[level].again
    backward = _backward_nodes(graph)
    forward = [node for node in graph.nodes if node not in backward and node.op not in ("output", "get_attr")]
    roles = roles_of(forward)
    flow = networkx.DiGraph()
    flow.add_node("source")
    for node in forward:
        into, out = (node, 0), (node, 1)
        flow.add_edge(into, out, **_capacity(_saving(node)))
        if node.op == "placeholder":
            flow.add_edge("source", into)
        else:
            again = _again(node, roles.get(node), allowed)
            if again != 0.0:
                flow.add_edge("source", into, **_capacity(again))
        for user in node.users:
            if user in backward:
                flow.add_edge(out, "sink")
            elif user.op != "output":  # a result of the forward is there for others, not for the backward
                flow.add_edge(out, (user, 0))
    if "sink" not in flow:
        return Cut((), frozenset())
    _, (kept, _) = networkx.minimum_cut(flow, "source", "sink")
    again = frozenset(node for node in forward if (node, 0) not in kept)
    made = [node for node in forward if node not in again and node.op != "placeholder" and (node, 1) not in kept]
    wanted = again | backward
    return Cut(tuple(node for node in made if not wanted.isdisjoint(node.users)), again)


def roles_of(forward: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """Return the role of every costly node of a layer's forward, in graph order.

    attention: mixes tokens. projection: a matrix product that an attention depends on. feed_forward: one whose result
    only another costly node takes up. output: one whose result goes into the residual stream; down: the same behind a
    feed_forward.
    """
    forward = list(forward)
    known = set(forward)
    costly = {node: kind for node in forward if (kind := _kind(node))}
    escapes: dict[fx.Node, bool] = {}
    attended: dict[fx.Node, bool] = {}
    for node in reversed(forward):
        users = [user for user in node.users if user in known or user.op == "output"]
        escapes[node] = any(user.op == "output" or (user not in costly and escapes[user]) for user in users)
        attended[node] = any(costly.get(user) == "attention" or attended.get(user, False) for user in users)
    roles: dict[fx.Node, str] = {}
    behind: dict[fx.Node, bool] = {}  # behind a product of the feed-forward
    for node in forward:
        behind[node] = any(behind.get(given, False) for given in node.all_input_nodes)
        if node not in costly:
            continue
        if costly[node] == "attention":
            roles[node] = "attention"
        elif attended[node]:
            roles[node] = "projection"
        elif escapes[node]:
            roles[node] = "down" if behind[node] else "output"
        else:
            roles[node], behind[node] = "feed_forward", True
    return roles


def size_of(node: fx.Node) -> int:
    """Return the bytes of a node's tensor or tensors; a dynamic size counts as the one it was traced with."""
    value = node.meta.get("val")
    return sum(_bytes(item) for item in (value if isinstance(value, list | tuple) else (value,)))


def _bytes(value: object) -> int:
    if not isinstance(value, torch.Tensor):
        return 0
    count = 1
    for size in value.shape:
        count *= size if isinstance(size, int) else getattr(size.node, "hint", None) or FALLBACK_SIZE
    return count * value.element_size()


def _capacity(value: float | None) -> dict[str, float]:
    return {} if value is None else {"capacity": value}  # an edge without one is never cut


def _saving(node: fx.Node) -> float | None:
    """Return what keeping a node's result costs in bytes; None: it cannot be kept."""
    if node.op == "placeholder" or _is_number(node):
        return 0.0
    if not isinstance(node.meta.get("val"), torch.Tensor) or _is_view(node):
        return None
    return float(size_of(node))


def _again(node: fx.Node, role: str | None, allowed: frozenset[str]) -> float | None:
    """Return what computing a node again costs in bytes' worth; None: it may not be."""
    if _is_number(node) or node.target is operator.getitem or _is_view(node):
        return 0.0
    if _draws_random_numbers(node) or (role is not None and role not in allowed):
        return None
    if role is not None:
        return size_of(node) * COSTLY
    return CHEAP * (size_of(node) + sum(size_of(given) for given in node.all_input_nodes if given.op != "placeholder"))


def _kind(node: fx.Node) -> str | None:
    """Return "attention" or "matmul" for a costly operation, None for any other."""
    if node.op != "call_function" or node.target is operator.getitem:
        return None
    name = _name(node)
    if name.startswith(ATTENTIONS) or name in PACKED_ATTENTIONS:
        return "attention"
    if name == "bmm" or name == "baddbmm":
        return "attention"  # both factors are activations: scores, or what they weigh
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in BUILTIN:
        return "matmul" if name in MATMULS or "convolution" in name else None
    if name in CHEAP_CUSTOM or "dequantize" in name or not isinstance(node.target, torch._ops.OperatorBase):
        return None
    return "matmul"


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    name = schema.name if schema is not None else getattr(node.target, "__name__", "")
    return name.rpartition("::")[2]


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool)


def _is_view(node: fx.Node) -> bool:
    """Say whether a node's result shares its memory with what it was made from."""
    maker = _maker(node)
    schema = getattr(maker.target, "_schema", None)
    if schema is None:
        return False
    aliases = any(entry.alias_info is not None for entry in schema.returns)
    return aliases or _name(maker) in NAMELESS_VIEWS


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
            pending.extend(user for user in node.users if user.op != "output")
    return found
