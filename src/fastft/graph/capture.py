"""Tie a captured graph back to the model: which module a node came from, which parameter a placeholder is."""

from collections.abc import Mapping, Sequence

import torch
from attrs import frozen
from torch import fx, nn

QUANT_STATE = "quant_state"


@frozen(eq=False)
class Binding:
    """What the nodes of one captured graph stand for.

    `modules` maps `id(module)` to its qualified name and the module; `names` maps a placeholder's name to the
    qualified names of the tensor it carries (several, when tensors are shared); `tensors` maps it to that tensor.
    `activations` maps the other placeholders to the tensors of the call that was captured.
    The tensors of a 4-bit weight's quantisation state are named `<module>.quant_state.<part>`.
    """

    modules: Mapping[int, tuple[str, nn.Module]]
    names: Mapping[str, tuple[str, ...]]
    tensors: Mapping[str, torch.Tensor]
    activations: Mapping[str, torch.Tensor]


def quant_state_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a bitsandbytes 4-bit weight's quantisation state by part, empty for other modules."""
    state = getattr(module._parameters.get("weight"), QUANT_STATE, None)
    if state is None:
        return {}
    parts = {"absmax": state.absmax}
    if state.nested:
        parts |= {"code2": state.state2.code, "absmax2": state.state2.absmax, "offset": state.offset}
    return parts


def bind(graph_module: fx.GraphModule, example_inputs: Sequence[object], root: nn.Module) -> Binding:
    """Bind the placeholders of `graph_module` to the tensors of `root` by identity.

    Dynamo hands a backend the very parameters of the module it traced, so no name needs to be guessed.
    """
    modules: dict[int, tuple[str, nn.Module]] = {}
    owners: dict[int, list[str]] = {}
    for name, module in root.named_modules():
        modules.setdefault(id(module), (name, module))
        prefix = f"{name}." if name else ""
        own = [*module._parameters.items(), *module._buffers.items()]
        own += [(f"{QUANT_STATE}.{part}", tensor) for part, tensor in quant_state_tensors(module).items()]
        for key, tensor in own:
            if tensor is not None:
                owners.setdefault(id(tensor), []).append(prefix + key)
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    given = {node.name: value for node, value in zip(placeholders, example_inputs) if isinstance(value, torch.Tensor)}
    found = {name: value for name, value in given.items() if id(value) in owners}
    return Binding(
        modules=modules,
        names={name: tuple(owners[id(value)]) for name, value in found.items()},
        tensors=found,
        activations={name: value for name, value in given.items() if name not in found},
    )


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy whose graph can be edited; node names, metadata and submodules are those of the original."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(graph_module.graph, mapping)
    old_output = next(node for node in graph_module.graph.nodes if node.op == "output")
    graph.output(result).meta = dict(old_output.meta)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    copied = fx.GraphModule(graph_module, graph)
    copied.meta = dict(graph_module.meta)
    return copied


def find_unit(graph_module: fx.GraphModule, binding: Binding, units: Sequence[nn.Module]) -> nn.Module | None:
    """Return the one of `units` that the graph was captured from: the module that its modules or parameters are in.

    Nothing in the graph names a module that has neither, such as a norm without a weight: it is the one without, if
    there is but one.
    """
    named = {binding.modules[id(unit)][0]: unit for unit in units if id(unit) in binding.modules}
    for node in graph_module.graph.nodes:
        inner = [binding.modules[ident][0] for ident in module_stack(node) if ident in binding.modules]
        for name in (*inner, *binding.names.get(node.name, ())):
            parents = (".".join(name.split(".")[:end]) for end in range(name.count(".") + 1, 0, -1))
            found = next((named[parent] for parent in parents if parent in named), None)
            if found is not None:
                return found
    bare = [unit for unit in named.values() if not unit._modules and not [*unit.parameters(), *unit.buffers()]]
    return bare[0] if len(bare) == 1 else None


def place(graph_module: fx.GraphModule, binding: Binding, unit: nn.Module) -> None:
    """Put the compiled module itself into its nodes' stacks, outermost: Dynamo names those within it alone."""
    entry = {str(id(unit)): (binding.modules[id(unit)][0], type(unit))}
    for node in graph_module.graph.nodes:
        if node.op not in ("placeholder", "output", "get_attr"):
            node.meta["nn_module_stack"] = entry | dict(node.meta.get("nn_module_stack") or {})


def module_stack(node: fx.Node) -> tuple[int, ...]:
    """Return the ids of the modules whose forward made `node`, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(int(str(key).split("@")[0]) for key in stack)


def is_instance_of(module: object, classes: tuple[str, ...]) -> bool:
    """Say whether the module's class or one of its bases has one of these names (FSDP2 makes a renamed subclass)."""
    return any(base.__name__ in classes for base in type(module).__mro__)
