"""A layer's input that needs no gradient, as the first layer's where only adapters are trained: one capture serves all.

Dynamo would capture the layer a second time for it. So it is shown the input as one that needs a gradient, as all other
layers' do. Of what it captures there are two forms, the graph and the graph with that input detached, and the first
layer's calls run the second: they compute no gradient that nobody takes. Regions are proved as both forms have them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from attrs import define
from torch import fx, nn

from fastft.graph.capture import Binding, copy_graph

# What tells layers of the same structure apart.
OWN_NUMBER = "layer_idx"


@define(eq=False)
class FirstInput:
    """The input of the call under way as it is shown to Dynamo; `shown` is None where it is given as it is.

    `layers`: those that share captures where they are of one structure. `numbers`: of each, its structure's, once they
    were asked for.
    """

    layers: Sequence[nn.Module] = ()
    shown: torch.Tensor | None = None
    numbers: tuple[int, ...] = ()

    @contextmanager
    def of(
        self, index: int, args: Sequence[Any], kwargs: Mapping[str, Any], same: Callable[[int], bool]
    ) -> Iterator[tuple[Sequence[Any], Mapping[str, Any]]]:
        """Give the arguments for one call of layer `index`: an input that needs no gradient as one that does.

        Not where no other layer would share the capture: those that are `same` keep the same for the backward, and have
        something trained before them. Hooks of the layer see what the model hands it, so they get it as it is.
        """
        hidden = args[0] if args else kwargs.get("hidden_states")
        plain = type(hidden) is torch.Tensor and hidden.is_floating_point() and not hidden.requires_grad
        if not plain or _hooked(self.layers[index]) or not self._shared(index, same):
            yield args, kwargs
            return
        self.shown = hidden.detach().requires_grad_()
        try:
            yield ((self.shown, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": self.shown})
        finally:
            self.shown = None

    def _shared(self, index: int, same: Callable[[int], bool]) -> bool:
        """Say whether a later layer, whose input needs a gradient, would share the capture."""
        own = self.number(index)
        later = [other for other in range(index + 1, len(self.layers)) if self.number(other) == own and same(other)]
        between = self.layers[index : later[-1]] if later else ()
        return any(parameter.requires_grad for layer in between for parameter in layer.parameters())

    def number(self, index: int) -> int:
        """Return the number of layer `index`'s structure, the same for all that have it."""
        if not self.numbers:  # all at once: some modules note on themselves that they were called
            known: list[tuple[object, ...]] = []
            for layer in self.layers:
                own = structure(layer)
                known += [] if own in known else [own]
                self.numbers = (*self.numbers, known.index(own))
        return self.numbers[index]

    def name(self, binding: Binding) -> str:
        """Return the name of the shown input in a graph, "" where it is none of its inputs."""
        given = binding.activations.items() if self.shown is not None else ()
        return next((name for name, value in given if value is self.shown), "")

    def detached(self, graph_module: fx.GraphModule, name: str) -> fx.GraphModule:
        """Return the graph with the input called `name` detached."""
        new = copy_graph(graph_module)
        (node,) = (node for node in new.graph.nodes if node.op == "placeholder" and node.name == name)
        last = [other for other in new.graph.nodes if other.op == "placeholder"][-1]
        with new.graph.inserting_after(last):
            cut = new.graph.call_method("detach", (node,))
        cut.meta["example_value"] = node.meta["example_value"].detach()
        node.replace_all_uses_with(cut, delete_user_cb=lambda user: user is not cut)
        new.graph.lint()
        new.recompile()
        return new

    def choose(self, whole: Callable[..., Any], detached: Callable[..., Any]) -> Callable[..., Any]:
        """Return what runs the one form or the other, as the call under way has it.

        The second gets the input as it is: one that needs a gradient has a place in the autograd graph, which would
        hold it on the device to the end of the backward.
        """

        def run(*inputs: Any) -> Any:
            if self.shown is None:
                return whole(*inputs)
            return detached(*(given.detach() if given is self.shown else given for given in inputs))

        return run


def _hooked(layer: nn.Module) -> bool:
    """Say whether something is called with what the layer is given: hooks before it, behind it, or on its way back."""
    before, behind = layer._forward_pre_hooks, layer._forward_hooks
    return bool(before or behind or layer._backward_pre_hooks or layer._backward_hooks)


def structure(layer: nn.Module) -> tuple[object, ...]:
    """Return what Dynamo may tell layers apart by: classes, settings, shapes, dtypes and what is trained.

    It need not be all: where a layer turns out to be another after all, one form too many was made, and captures of
    several structures count for one.
    """
    parts: list[object] = []
    for name, module in layer.named_modules():
        settings = {key: repr(value) for key, value in vars(module).items() if _is_setting(key, value)}
        tensors = (*module._parameters.items(), *module._buffers.items())
        kinds = [(key, t.shape, t.dtype, t.requires_grad) for key, t in tensors if t is not None]
        parts.append((name, type(module), settings, kinds))
    return tuple(parts)


def _is_setting(key: str, value: object) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(isinstance(one, (bool, int, float, str)) for one in value.values())
    return isinstance(value, (bool, int, float, str)) and key != OWN_NUMBER
