"""Copies of NF4 weights that a compiled graph reads, made once and not anew in every step.

A rewritten graph of a layer whose mode says so has more inputs for each NF4 weight under an adapter: one for the weight
dequantised, or, where its products have fp8 factors, three for those. Whoever calls the graph hands the copies in,
found by the weights it hands in anyway; so one graph still serves all layers. The packed weight stays what the model
holds, saves and exports: a copy is no parameter and no buffer, and is gone with its weight. The loss head's weight may
have a copy as fp8 factors beside them, for which the loss asks itself.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from fastft.kernels import fp8
from fastft.kernels.nf4 import dequantize_into

T = TypeVar("T")
FACTORS = fp8.ref.FP8
"""The dtype that stands for copies as fp8 factors."""


@frozen(eq=False)
class Packed(Generic[T]):
    """An NF4 weight [n, k] and its quantisation state as `lora_linears` takes them: nodes of a graph, or tensors."""

    weight: T
    state: tuple[T, ...]
    n: int
    k: int


@frozen(eq=False)
class KeptInput:
    """Inputs of a graph that take the copies of weights which are made together; `nodes`: by weight."""

    packed: tuple[Packed[fx.Node], ...]
    dtype: torch.dtype
    nodes: tuple[tuple[fx.Node, ...], ...]


@frozen(eq=False)
class Copies:
    """The copies of one weight by form, and what they were made of: `marks` are those of that moment.

    The form of a packed weight is a dtype: the copy is the weight [n, k] in it. Or it is `FACTORS` and the rows of all
    weights made together: the values [n, k], the scales of the rows [n] in fp32 and the values as [k, n], as
    `fp8.weight_columns` takes them. `state` is held so that
    no other tensor takes its place in memory and passes for it.
    """

    state: tuple[Tensor, ...]
    marks: tuple[Any, ...]
    tensors: dict[Hashable, tuple[Tensor, ...]] = field(factory=dict)


def marks(weight: Tensor, state: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return where a weight and its quantisation state lie, and how often each has been written to.

    What is written through `.data` is not counted by PyTorch, and changes no mark.
    """
    return weight.device, *((part.data_ptr(), part._version) for part in (weight, *state))


@define(eq=False)
class KeptWeights:
    """The copies of one compiled model, by weight. `changes` counts how often some were made or let go.

    `read`: of the weights that graphs were called with, whether one of them reads a copy.
    """

    copies: WeakTensorKeyDictionary = field(factory=WeakTensorKeyDictionary)
    changes: int = 0
    read: WeakTensorKeyDictionary = field(factory=WeakTensorKeyDictionary)

    def together(self, packed: Sequence[Packed[Tensor]], dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
        """Return the copies of weights of one k in `dtype`, from before or, if one is not there, all made now.

        Raises RuntimeError where they would have to be made while a CUDA graph is recorded: they would be filled by the
        replays alone.
        """
        parts = [(one.weight, one.state) for one in packed]
        # A graph knows the strides of what it is given: those of slices are the rows of all weights made together.
        form = (dtype, sum(one.n for one in packed)) if dtype == FACTORS else dtype
        return self._kept(parts, form, lambda: _made(packed, dtype))

    def of_head(self, weight: Tensor, dtype: torch.dtype, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return what `make` makes of a head's weight in `dtype`, from before or made now; raises as `together`."""
        return self._kept([(weight, ())], ("head", dtype), lambda: [make()])[0]

    @torch.no_grad()
    def _kept(
        self,
        parts: Sequence[tuple[Tensor, tuple[Tensor, ...]]],
        form: Hashable,
        make: Callable[[], list[tuple[Tensor, ...]]],
    ) -> list[tuple[Tensor, ...]]:
        """Return the copies in a form of weights with these states; if one is not there or not current, make all."""
        now = [marks(*part) for part in parts]
        found = [self.copies.get(weight) for weight, _ in parts]
        current = [copies is not None and copies.marks == mark for copies, mark in zip(found, now, strict=True)]
        if not all(there and form in copies.tensors for there, copies in zip(current, found, strict=True)):
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("a weight of which copies are kept has no current one, and a recording makes none")
            for place, (weight, state) in enumerate(parts):  # let go of before they are made anew
                if current[place]:
                    found[place].tensors.pop(form, None)
                else:  # with all that were made of what it was
                    self.copies.pop(weight, None)
                    found[place] = self.copies[weight] = Copies(state, now[place])
                self.read[weight] = True
            self.changes += 1
            for copies, made in zip(found, make(), strict=True):
                copies.tensors[form] = made
        return [copies.tensors[form] for copies in found]

    def of(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """Return the copies that there are of these weights."""
        found = [self.copies[weight] for weight in weights if weight in self.copies]
        return [tensor for one in found for tensors in one.tensors.values() for tensor in tensors]

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
        return sum(tensor.nbytes for tensor in self.of(list(self.copies.keys())))


def _made(packed: Sequence[Packed[Tensor]], dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Return the copies of weights of one k. As factors, the values as [k, n_i] and the scales lie side by side."""
    packed = [evolve(one, weight=one.weight.detach()) for one in packed]
    if dtype != FACTORS:
        return [(_dequantised(one, dtype),) for one in packed]
    rows = [fp8.weight_rows(one.weight, list(one.state), one.n, one.k) for one in packed]
    sizes = [one.n for one in packed]
    turned, scales = fp8.weight_columns([q for q, _ in rows], [[scale] for _, scale in rows], sizes, packed[0].k)
    return [(q, *own) for (q, _), *own in zip(rows, scales.split(sizes), turned.split(sizes, dim=1), strict=True)]


def _dequantised(packed: Packed[Tensor], dtype: torch.dtype) -> Tensor:
    state = packed.state if len(packed.state) == 4 else (packed.state[0], None, None, None)
    return dequantize_into(packed.weight, *state, packed.n, packed.k, dtype)


def kept_inputs(
    kept: list[KeptInput], packed: Sequence[Packed[fx.Node]], dtype: torch.dtype
) -> list[tuple[fx.Node, ...]]:
    """Return, for each weight, the inputs of the graph that take its copy in `dtype`.

    Those that `kept` does not have yet are noted there, to be made together.
    """
    noted = [given for given in kept if given.dtype == dtype]
    there = {one.weight: nodes for given in noted for one, nodes in zip(given.packed, given.nodes, strict=True)}
    new = tuple({one.weight: one for one in packed if one.weight not in there}.values())
    if new:
        nodes = tuple(_inputs(one, sum(other.n for other in new), dtype) for one in new)
        kept.append(KeptInput(new, dtype, nodes))
        there |= {one.weight: own for one, own in zip(new, nodes, strict=True)}
    return [there[one.weight] for one in packed]


def _inputs(packed: Packed[fx.Node], width: int, dtype: torch.dtype) -> tuple[fx.Node, ...]:
    """Return new inputs of the graph for one weight's copy; `width`: the rows of all weights that it is made with.

    A slice of a wider matrix begins where memory is aligned, as a whole one does: sizes that have fp8 products are
    multiples of 16 bytes.
    """
    n, k, (graph, example) = packed.n, packed.k, (packed.weight.graph, packed.weight.meta["example_value"])
    name = f"kept_{packed.weight.name}_{str(dtype).removeprefix('torch.')}"
    parts = [(name, (n, k), (k, 1), dtype)]
    if dtype == FACTORS:
        parts += [(f"{name}_scale", (n,), (1,), torch.float32), (f"{name}_turned", (k, n), (width, 1), dtype)]
    made = []
    for called, shape, strides, of_part in parts:
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        with graph.inserting_after(last):
            made.append(graph.placeholder(called))
        with example.fake_mode:
            fake = torch.empty_strided(shape, strides, dtype=of_part, device=example.device)
        made[-1].meta["example_value"] = fake
    return tuple(made)


def examples(kept: Sequence[KeptInput]) -> list[Tensor]:
    """Return an example of each input in `kept`, in their order in the graph."""
    return [node.meta["example_value"] for one in kept for nodes in one.nodes for node in nodes]


def finder(
    graph: fx.Graph, kept: Sequence[KeptInput], weights: KeptWeights, left: Sequence[fx.Node] = ()
) -> Callable[[Sequence[Any]], list[Tensor]]:
    """Return what finds the copies for the inputs of `graph` that are not in `kept`.

    `left`: inputs that take weights which the graph reads themselves where it could read copies.
    """
    places = {node: place for place, node in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    wanted = [
        ([Packed(places[p.weight], tuple(places[part] for part in p.state), p.n, p.k) for p in one.packed], one.dtype)
        for one in kept
    ]
    packed = [places[node] for node in left]

    def find(inputs: Sequence[Any]) -> list[Tensor]:
        for place in packed:
            weights.leave(inputs[place])
        found = []
        for group, dtype in wanted:
            given = [Packed(inputs[p.weight], tuple(inputs[part] for part in p.state), p.n, p.k) for p in group]
            for tensors in weights.together(given, dtype):
                found += tensors
        return found

    return find
