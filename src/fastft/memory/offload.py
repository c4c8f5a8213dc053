"""Saved activations in pinned CPU memory: copied out behind the forward, fetched ahead of the backward.

Double buffered on one side stream. A layer's tensors stay on the device until the layer after it has run, so at most
two layers' worth wait; the backward of a layer begins with the copies of the layer before it, also where its own
results stay. On a CPU the same happens with plain copies. Buffers come from a pool: steps of one size allocate in the
first of them alone, and with steps of other sizes the pool holds no more than the largest of them took.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor

# Tensors below this size stay: row sums and LoRA's inner activations are not worth a copy of their own.
LEAST_BYTES = 1 << 20


@define(eq=False)
class Pool:
    """Host buffers by size, taken and given back; pinned where there is a GPU to copy from.

    `most_taken`: the most bytes that were out at once. `allocated_bytes` never exceed it: for a buffer of a new size,
    free ones of others are let go of.
    """

    pinned: bool
    free: dict[int, list[Tensor]] = field(factory=dict)
    allocated_bytes: int = 0
    taken_bytes: int = 0
    most_taken: int = 0

    def take(self, size: int) -> Tensor:
        """Return a buffer of exactly `size` bytes."""
        self.taken_bytes += size
        self.most_taken = max(self.most_taken, self.taken_bytes)
        if size in self.free:
            return self._free(size)
        while self.free and self.allocated_bytes + size > self.most_taken:
            # The size given back longest ago. For copies that still read it the pinned allocator waits.
            self.allocated_bytes -= self._free(next(iter(self.free))).numel()
        self.allocated_bytes += size
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back. Copies that still read it are on the same stream as those that will write it."""
        self.taken_bytes -= buffer.numel()
        self.free.setdefault(buffer.numel(), []).append(buffer)

    def _free(self, size: int) -> Tensor:
        buffer = self.free[size].pop()
        if not self.free[size]:
            del self.free[size]
        return buffer


@define(eq=False)
class Group:
    """What one call of a layer parked, if anything; its backward fetches ahead what the group `before` parked."""

    before: "weakref.ref[Group] | None"
    parked: list["weakref.ref[Parked]"] = field(factory=list)
    leaving: list[Tensor] = field(factory=list)
    left: Any = None
    begun: bool = False


@define(eq=False)
class Parked:
    """One tensor that was moved: its bytes on the host and its form; `back` is its copy on the device once fetched."""

    group: Group
    host: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    back: Tensor | None = None
    arrived: Any = None


@frozen(eq=False)
class Stayed:
    """One tensor of a layer that moves nothing, whose backward begins where it is asked for.

    `version`: how often it had been written to. PyTorch does not look where hooks are set.
    """

    group: Group
    tensor: Tensor
    version: int


class Offloader:
    """Parks what the layers of one model save; `least_bytes` is the smallest tensor that is moved."""

    def __init__(self, device: torch.device, least_bytes: int = LEAST_BYTES) -> None:
        if device.type == "cuda" and device.index is None:  # no tensor says that it is on such a device
            device = torch.device("cuda", torch.cuda.current_device())
        self.device, self.least_bytes = device, least_bytes
        self.pool = Pool(pinned=device.type == "cuda")
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._groups: list[Group] = []
        self._recorded: list[Tensor] | None = None
        self.moved_bytes = 0

    @contextmanager
    def layer(self, stays: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
        """Park what is saved for the backward within the context, which is one call of a layer.

        `stays` returns the tensors that are there anyway: parameters, and arguments that all layers share.
        """
        previous = self._groups[-1] if self._groups else None
        group = Group(weakref.ref(previous) if previous else None)
        known: list[frozenset[int]] = []

        def pack(tensor: Tensor) -> Any:
            if not self._movable(tensor):
                return tensor
            if not known:
                known.append(frozenset(given.untyped_storage().data_ptr() for given in stays()))
            if tensor.untyped_storage().data_ptr() in known[0]:
                return tensor
            return self._park(tensor, group)

        with _untraced_hooks(pack, self._unpack):
            yield
        self._settle(group)

    @contextmanager
    def follow(self) -> Iterator[None]:
        """Run one call of a layer within the context that moves nothing, behind others that may have.

        What the layer before it parked is let go of, and fetched ahead when this one's backward begins.
        """
        if not self._groups:
            yield
            return
        group = Group(weakref.ref(self._groups[-1]))
        with _untraced_hooks(lambda t: Stayed(group, t, t._version), self._unpack):
            yield
        self._settle(group)

    def join(self) -> None:
        """Have the current stream wait for every copy that was begun; between a forward and its backward, or after it.

        A recorded CUDA graph must end so: what one graph has begun, another cannot wait for.
        """
        for group in self._groups:
            self._let_go(group)
        if self.stream is None:
            return
        recording = torch.cuda.is_current_stream_capturing()
        with torch.cuda.stream(self.stream):
            recorded = torch.cuda.is_current_stream_capturing()
        if recorded or not recording:  # a recording may not wait for a stream outside it, on which it has begun nothing
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """Give the buffers that are taken within, where forward and backward of a step are recorded as CUDA graphs.

        They are the graphs', which write and read them in every replay: whoever holds the graphs gives them back to
        `pool` once those are gone. What earlier steps have begun is let go of first, since a recording can neither wait
        for it nor fetch what it parked. A recording that fails leaves nothing behind.
        """
        self.join()
        self._groups.clear()
        self._recorded = taken = []
        try:
            yield taken
        except BaseException:
            self._groups.clear()
            for buffer in taken:
                self.pool.give(buffer)
            raise
        finally:
            self._recorded = None

    def _movable(self, tensor: Tensor) -> bool:
        whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
        large = tensor.untyped_storage().nbytes() >= self.least_bytes
        # In 8 bits too, but for the state of a random generator, which has one dimension.
        numbers = tensor.is_floating_point() or (tensor.dtype == torch.uint8 and tensor.dim() > 1)
        return large and whole and numbers and tensor.device == self.device

    def _park(self, tensor: Tensor, group: Group) -> Parked:
        """Begin to copy `tensor` to the host."""
        tensor = tensor.detach()
        size = tensor.untyped_storage().nbytes()
        host = self.pool.take(size)
        parked = Parked(group, host, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
        if self._recorded is not None:
            self._recorded.append(host)
        else:
            weakref.finalize(parked, self.pool.give, host).atexit = False
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with self._beside():
            self._view(host, parked).copy_(tensor, non_blocking=True)
        group.parked.append(weakref.ref(parked))
        group.leaving.append(tensor)
        self.moved_bytes += size
        return parked

    def _settle(self, group: Group) -> None:
        """Note that the group's copies are queued, and let go of the tensors of the group before it.

        Without copies there is nothing to wait for; and a recording may not wait for a stream that it has not reached.
        """
        if self.stream is not None and group.leaving:
            group.left = self.stream.record_event()
        last = self._groups[-1] if self._groups else None
        if last is not None:
            self._let_go(last)
        self._groups = [group]

    def _let_go(self, group: Group) -> None:
        if group.left is not None:
            torch.cuda.current_stream(self.device).wait_event(group.left)  # before their memory is used again
            group.left = None
        group.leaving.clear()

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, Parked | Stayed):
            return packed
        self._begin(packed.group)
        if isinstance(packed, Stayed):
            if packed.tensor._version != packed.version:
                raise RuntimeError("a tensor that the backward needs was changed by an in-place operation")
            return packed.tensor
        if packed.back is None:
            self._fetch(packed)
        if packed.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(packed.arrived)
        tensor, packed.back, packed.arrived = packed.back, None, None
        return tensor

    def _begin(self, group: Group) -> None:
        """Fetch what a layer parked, if it is not on its way already, and what the layer before it did."""
        if group.begun:
            return
        group.begun = True
        self._groups.clear()
        self._let_go(group)
        before = group.before() if group.before is not None else None
        for reference in [*group.parked, *(before.parked if before else ())]:
            other = reference()
            if other is not None and other.back is None:
                self._fetch(other)

    def _fetch(self, parked: Parked) -> None:
        """Begin to copy a parked tensor back, into memory of the stream that computes."""
        parked.back = torch.empty_strided(parked.shape, parked.stride, dtype=parked.dtype, device=parked.device)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with self._beside():
            parked.back.copy_(self._view(parked.host, parked), non_blocking=True)
        if self.stream is not None:
            parked.arrived = self.stream.record_event()

    def _beside(self) -> Any:
        return torch.cuda.stream(self.stream) if self.stream is not None else nullcontext()

    @staticmethod
    def _view(host: Tensor, parked: Parked) -> Tensor:
        return host.view(parked.dtype).as_strided(parked.shape, parked.stride)


def _untraced_hooks(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> AbstractContextManager[None]:
    """Return the context that sets these hooks, which Dynamo is not to trace.

    Of a layer that is captured in pieces it traces what runs between the pieces, hooks included.
    """
    untraced = torch.compiler.disable
    return torch.autograd.graph.saved_tensors_hooks(untraced(pack), untraced(unpack))
