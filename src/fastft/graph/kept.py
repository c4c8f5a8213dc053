"""NF4 weights kept dequantised: copies that a compiled graph reads, made once and not anew in every step.

A rewritten graph of a layer whose mode says so has one more input for each NF4 weight under an adapter. Whoever calls
the graph hands the copies in, found by the weights it hands in anyway; so one graph still serves all layers. The packed
weight stays what the model holds, saves and exports: a copy is no parameter and no buffer, and is gone with its weight.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from fastft.kernels.nf4 import dequantize_into


@frozen(eq=False)
class KeptInput:
    """An input of a graph that takes the copy of `weight`, [out_features, in_features]; `state`: its quantisation."""

    node: fx.Node
    weight: fx.Node
    state: tuple[fx.Node, ...]
    dtype: torch.dtype


@frozen(eq=False)
class Copies:
    """The dequantised copies of one weight by dtype, and what they were made of: `marks` are those of that moment.

    `state` is held so that no other tensor takes its place in memory and passes for it.
    """

    state: tuple[Tensor, ...]
    marks: tuple[Any, ...]
    tensors: dict[torch.dtype, Tensor] = field(factory=dict)


def marks(weight: Tensor, state: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return where a weight and its quantisation state lie, and how often each has been written to.

    What is written through `.data` is not counted by PyTorch, and changes no mark.
    """
    return weight.device, *((part.data_ptr(), part._version) for part in (weight, *state))


@define(eq=False)
class KeptWeights:
    """The copies of one compiled model, by weight. `changes` counts how often one was made or let go.

    `read`: of the weights that graphs were called with, whether one of them reads a copy.
    """

    copies: WeakTensorKeyDictionary = field(factory=WeakTensorKeyDictionary)
    changes: int = 0
    read: WeakTensorKeyDictionary = field(factory=WeakTensorKeyDictionary)

    def copy(self, weight: Tensor, state: Sequence[Tensor], n: int, k: int, dtype: torch.dtype) -> Tensor:
        """Return the NF4 weight [n, k] in `dtype`, from before or made now; `state` as `lora_linears` takes it.

        Raises RuntimeError where it would have to be made while a CUDA graph is recorded: it would be filled by the
        replays alone.
        """
        now, found = marks(weight, state), self.copies.get(weight)
        if found is None or found.marks != now or dtype not in found.tensors:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("a weight that is kept dequantised has no current copy, and a recording makes none")
            if found is None or found.marks != now:
                self.copies.pop(weight, None)  # with all that were made of what it was, before the next one is made
                found = self.copies[weight] = Copies(tuple(state), now)
            self.changes += 1
            self.read[weight] = True
            with torch.no_grad():
                absmax, code2, absmax2, offset = state if len(state) == 4 else (state[0], None, None, None)
                found.tensors[dtype] = dequantize_into(weight.detach(), absmax, code2, absmax2, offset, n, k, dtype)
        return found.tensors[dtype]

    def of(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """Return the copies that there are of these weights."""
        found = [self.copies[weight] for weight in weights if weight in self.copies]
        return [tensor for one in found for tensor in one.tensors.values()]

    def leave(self, weight: Tensor) -> None:
        """Note that a graph reads the weight itself where it could read a copy."""
        self.read.setdefault(weight, False)

    def may_read(self, weight: Tensor) -> bool:
        """Say whether a graph reads a copy of the weight, or none was called with it yet."""
        return self.read.get(weight, True)

    def state(self) -> tuple[Any, ...]:
        """Return what can be hashed and changes with the copies, and with a write to what they were made of."""
        written = [part._version for weight, one in self.copies.items() for part in (weight, *one.state)]
        return self, self.changes, hash(tuple(written))

    def clear(self) -> None:
        """Let go of all copies; the next step that wants them makes them again."""
        if self.copies:
            self.copies.clear()
            self.changes += 1

    @property
    def bytes(self) -> int:
        """Return the bytes of all copies."""
        return sum(tensor.nbytes for one in self.copies.values() for tensor in one.tensors.values())


def kept_input(
    kept: list[KeptInput], weight: fx.Node, state: Sequence[fx.Node], n: int, k: int, dtype: torch.dtype
) -> fx.Node:
    """Return the input of the graph that takes the copy of `weight`, [n, k] in `dtype`, noted in `kept`."""
    for found in kept:
        if found.weight is weight and found.dtype == dtype:
            return found.node
    graph, example = weight.graph, weight.meta["example_value"]
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder(f"kept_{weight.name}_{str(dtype).removeprefix('torch.')}")
    with example.fake_mode:
        node.meta["example_value"] = torch.empty(n, k, dtype=dtype, device=example.device)
    kept.append(KeptInput(node, weight, tuple(state), dtype))
    return node


def finder(
    graph: fx.Graph, kept: Sequence[KeptInput], weights: KeptWeights, left: Sequence[fx.Node] = ()
) -> Callable[[Sequence[Any]], list[Tensor]]:
    """Return what finds the copies for the inputs of `graph` that are not in `kept`.

    `left`: inputs that take weights which the graph reads themselves where it could read copies.
    """
    places = {node: place for place, node in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    wanted = [
        (places[one.weight], [places[part] for part in one.state], *one.node.meta["example_value"].shape, one.dtype)
        for one in kept
    ]
    packed = [places[node] for node in left]

    def find(inputs: Sequence[Any]) -> list[Tensor]:
        for place in packed:
            weights.leave(inputs[place])
        return [
            weights.copy(inputs[weight], [inputs[part] for part in state], n, k, dtype)
            for weight, state, n, k, dtype in wanted
        ]

    return find
