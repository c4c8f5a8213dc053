"""Regions: all nodes that one module (or one function within it) contributed to a captured graph."""

import hashlib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from attrs import frozen
from torch import fx, nn

from fastft.graph.capture import Binding, module_stack
from fastft.graph.shaped import ShapedTracer

IN_PLACE = frozenset(
    {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.iand}
    | {operator.ior, operator.ixor, operator.ifloordiv, operator.imod, operator.ilshift, operator.irshift}
)


class NotARegionError(Exception):
    """Nodes that cannot be taken out as one piece.

    Something outside depends on a part and feeds another, or they change a tensor from outside in place.
    """


@frozen(eq=False)
class Region:
    """The nodes of one module in a graph, and what crosses their border.

    `inputs` are activations in order of first use; `parameters` maps names relative to the module to placeholders;
    `outputs` are the nodes that are used outside.
    """

    name: str
    module: nn.Module
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    parameters: Mapping[str, fx.Node]
    outputs: tuple[fx.Node, ...]


def collect(
    graph: fx.Graph, binding: Binding, wanted: Callable[[str, nn.Module], bool]
) -> list[tuple[str, nn.Module, list[fx.Node]]]:
    """Return (name, module, nodes) for each call of a module that is `wanted`, in call order."""
    groups: dict[tuple[int, str], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        for key in node.meta.get("nn_module_stack") or {}:
            found = binding.modules.get(int(str(key).split("@")[0]))
            if found and wanted(*found):
                groups.setdefault((id(found[1]), str(key)), []).append(node)
    return [(*binding.modules[ident], nodes) for (ident, _), nodes in groups.items()]


def make_region(name: str, module: nn.Module, nodes: Sequence[fx.Node], binding: Binding) -> Region:
    """Describe `nodes` as a region; raises NotARegionError when they are not convex or change one of their inputs."""
    inside = set(nodes)
    inputs: dict[fx.Node, None] = {}
    parameters: dict[str, fx.Node] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source in inside or source.op == "get_attr":
                continue
            relative = _relative_name(name, binding.names.get(source.name, ())) if source.op == "placeholder" else None
            if relative is None:
                inputs[source] = None
            else:
                parameters[relative] = source
    outputs = tuple(node for node in nodes if any(user not in inside for user in node.users))
    _check_convex(name, nodes, inside)
    _check_effects(name, nodes, (*inputs, *parameters.values()))
    return Region(name, module, tuple(nodes), tuple(inputs), parameters, outputs)


def _relative_name(module_name: str, names: Iterable[str]) -> str | None:
    """Return the tensor's name relative to the module, or its full name when it belongs to another module."""
    names = tuple(names)
    prefix = f"{module_name}." if module_name else ""
    own = [name[len(prefix) :] for name in names if name.startswith(prefix)]
    return own[0] if own else (names[0] if names else None)


def _check_convex(name: str, nodes: Sequence[fx.Node], inside: set[fx.Node]) -> None:
    order = {node: index for index, node in enumerate(nodes[0].graph.nodes)}
    first, last = order[nodes[0]], order[nodes[-1]]
    dependent: set[fx.Node] = set()
    for node, index in order.items():
        if not first < index < last:
            continue
        feeds_on_dependent = any(source in dependent for source in node.all_input_nodes)
        if node in inside:
            if feeds_on_dependent:
                raise NotARegionError(f"{name}: node {node.name} depends on the region through a node outside it")
        elif feeds_on_dependent or any(source in inside for source in node.all_input_nodes):
            dependent.add(node)


def _check_effects(name: str, nodes: Sequence[fx.Node], outside: Sequence[fx.Node]) -> None:
    changed = [(node, target) for node in nodes if (target := _changed_in_place(node)) is not None]
    if not changed:
        return
    storages = {_storage(node) for node in outside}
    for node, target in changed:
        if _storage(target) in storages:
            raise NotARegionError(f"{name}: node {node.name} changes a tensor from outside in place")


def _changed_in_place(node: fx.Node) -> fx.Node | None:
    """Return what `node` writes to, going by how torch names its functions, or None."""
    called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    target = node.kwargs.get("out")
    if node.target in IN_PLACE or (called.endswith("_") and not called.endswith("__")):
        target = node.args[0] if node.args else None
    return target if isinstance(target, fx.Node) else None


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("example_value")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def region_module(owner: fx.GraphModule, region: Region) -> fx.GraphModule:
    """Return the region alone, `f(*inputs, *parameters) -> tuple(outputs)`: the oracle for its replacement."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in (*region.inputs, *region.parameters.values()):
        if node not in mapping:
            mapping[node] = graph.placeholder(node.name)
    for node in region.nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in mapping:
                mapping[source] = graph.node_copy(source)
        mapping[node] = graph.node_copy(node, lambda source: mapping[source])
    graph.output(tuple(mapping[node] for node in region.outputs))
    return fx.GraphModule(owner, graph)


def fingerprint(region: Region) -> str:
    """Return a hash of the region's structure: operations, wiring, float constants, dtypes and what needs a gradient.

    Sizes and names do not enter.
    """
    numbers: dict[fx.Node, str] = {}
    rows: list[str] = []
    for index, node in enumerate((*region.inputs, *region.parameters.values())):
        value = node.meta.get("example_value")
        kind = f"{value.dtype},{value.requires_grad}" if isinstance(value, torch.Tensor) else type(value).__name__
        numbers.setdefault(node, f"in{index}:{kind}")
    for name, node in region.parameters.items():
        rows.append(f"{name}={numbers[node]}")
    for index, node in enumerate(region.nodes):
        arguments = _encode((node.args, node.kwargs), numbers)
        numbers[node] = f"v{index}"
        rows.append(f"{node.op}:{_target_name(node.target)}{arguments}")
    rows.append("out " + ",".join(numbers[node] for node in region.outputs))
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:12]


def _target_name(target: object) -> str:
    return (
        target
        if isinstance(target, str)
        else f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"
    )


def _encode(value: object, numbers: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return numbers.get(value, "attribute")
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(_encode(item, numbers) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_encode(item, numbers)}" for key, item in sorted(value.items())) + "}"
    if isinstance(value, slice):
        return "slice"
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return "n"
    return repr(value)


def emit(
    graph: fx.Graph,
    function: Callable[..., object],
    arguments: Sequence[object],
    anchor: Sequence[fx.Node],
    stack_from: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
) -> None:
    """Insert the nodes that `function(*arguments)` makes, and let them take the place of `outputs`.

    The nodes come after the last of their inputs and not before the first node of `anchor`. Every new node gets the
    metadata of the output it replaces (its module stack from `stack_from`), so that later passes and the memory plan
    still see where it belongs. Plain nodes are inserted, no Python callee, which would miss AOTAutograd's cache.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    sources = _nodes_in(arguments)
    last = max(sources, key=lambda node: order[node])
    point = anchor[0] if order[last] < order[anchor[0]] else last.next
    tracer = ShapedTracer(graph)
    before = set(graph.nodes)
    with graph.inserting_before(point):
        wrapped = fx.node.map_aggregate(tuple(arguments), lambda a: tracer.proxy(a) if isinstance(a, fx.Node) else a)
        results = function(*wrapped)
        if isinstance(results, fx.Proxy):  # an operation's tuple of outputs is one proxy
            results = [results] if len(outputs) == 1 else [results[index] for index in range(len(outputs))]
    for node in graph.nodes:
        if node not in before:
            _copy_meta(stack_from[0], node)
    for old, result, origin in zip(outputs, results, stack_from, strict=True):
        new = result.node
        _copy_meta(origin, new)
        new.meta["example_value"] = old.meta.get("example_value")
        old.replace_all_uses_with(new)


def _nodes_in(arguments: Sequence[object]) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_aggregate(tuple(arguments), lambda a: found.append(a) if isinstance(a, fx.Node) else None)
    return found


def _copy_meta(origin: fx.Node, node: fx.Node) -> None:
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in origin.meta:
            node.meta[key] = origin.meta[key]


def erase(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Erase those of `nodes` that nothing uses any more, last first."""
    for node in reversed(nodes):
        if not node.users:
            graph.erase_node(node)


def without_children(nodes: Iterable[fx.Node], children: Iterable[nn.Module]) -> list[fx.Node]:
    """Return the nodes that belong to none of the modules `children`."""
    idents = {id(child) for child in children}
    return [node for node in nodes if not idents & set(module_stack(node))]
