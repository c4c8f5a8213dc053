"""Steps of one shape recorded as CUDA graphs and replayed: the GPU no longer waits for Python to launch its kernels.

A step of a small model takes the host longer to launch than the GPU to run. Once batches of one shape have come in
`SETTLED` steps one after another, forward and backward of the loss are recorded, each as one graph, and later batches
of that shape are copied into the recorded inputs and replayed. A batch of another shape runs as before; it lets go of
the recording, and with it of the memory that the recording holds. Where the GPU takes longer than the host does to
launch its work, nothing would be won, and nothing is recorded: after `ASKED` steps of a shape that said so it is not
asked again, since asking waits for the GPU.

Nothing is recorded either while the loss of the step before is still referred to: its autograd graph would tie the
parameters to the stream on which it ran.
"""

import sys
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor, nn

from fastft.graph.capture import quant_state_tensors
from fastft.graph.head import unwrapped
from fastft.state import get_state, planned_of
from fastft.train import dropping

SETTLED = 3
# Steps of a shape whose times are compared: a single one may have met a GPU that others used or that had idled.
ASKED = 3
MODES = ("auto", "always", "never")
# Share of a forward's time on the device that the host took to launch it, from which on the host is what one waits for.
HOST_BOUND = 0.5
# Bytes of gradients up to which steps are recorded: a recording holds them once more.
MOST_GRADIENTS = 1 << 29
# `valid_rows` is a bound, known to the host; rounded up to a share of all rows, and the most of batches that are else
# alike, it seldom changes.
ROWS_SHARE = 16

Loss = Callable[[Mapping[str, Any], Tensor], Tensor]


@frozen(eq=False)
class Recording:
    """Forward and backward of one shape of batch, with the tensors that they read and write.

    `state` is what of the model they were recorded for (`state_of`). `weights` keep the memory that they read from
    being given to others (`read_by`): the forward is replayed before the model is asked whether it is still the same.

    `gradients` holds those of all `parameters` one after the other, a flat tensor for each dtype; `places` says for
    each parameter which of them, from where and how many elements, None where it has no gradient.
    """

    shape: tuple[Any, ...]
    state: tuple[Any, ...]
    weights: tuple[Tensor, ...]
    inputs: Mapping[str, Tensor]
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    loss: Tensor
    upstream: Tensor
    parameters: tuple[nn.Parameter, ...]
    gradients: tuple[Tensor, ...]
    places: tuple[tuple[int, int, int] | None, ...]


class _Replay(torch.autograd.Function):
    """The loss of a forward that was just replayed, and its backward."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, *parameters: Tensor) -> Tensor:
        ctx.recording = recording
        return recording.loss.detach().clone()  # the next replay overwrites it

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        recording = ctx.recording
        recording.upstream.copy_(upstream)
        recording.backward.replay()
        # A few large copies: autograd takes their parts over as gradients, and the next replay may write its own.
        made = [flat.clone() for flat in recording.gradients]
        parts = [
            None if place is None else made[place[0]].narrow(0, place[1], place[2]).view_as(parameter)
            for place, parameter in zip(recording.places, recording.parameters, strict=True)
        ]
        return None, *parts


@define(eq=False)
class Replayer:
    """Calls `loss(batch, num_items)` for a model; on a GPU, recorded and replayed once the batches' shape has settled.

    `loss` takes a batch of tensors and plain values, and the number of targets as a scalar tensor, and returns a scalar
    that depends on nothing else; its gradients are those of the model's trainable parameters. `mode` is "auto" (where
    launching takes the host long), "always" (wherever it can be) or "never". `replayed` counts steps, `why_not` says
    what kept the last settled step from being recorded. `refused` has the reasons that stand, by shape, `waited` how
    often the GPU was what a step of a shape waited for.
    """

    model: Any
    loss: Loss
    mode: str = "auto"
    recording: Recording | None = None
    replayed: int = 0
    why_not: str = ""
    refused: dict[Any, str] = field(factory=dict)
    waited: dict[Any, int] = field(factory=dict)
    seen: tuple[Any, int] = (None, 0)
    most: tuple[Any, int] = (None, 0)
    before: Any = None
    launched: tuple[float, torch.cuda.Event, torch.cuda.Event] | None = None

    def __call__(self, batch: Mapping[str, Any], num_items: Tensor) -> Tensor:
        """Return the loss of `batch`, an fp32 scalar that can be gone backward from, once."""
        if self.mode == "never" or num_items.device.type != "cuda" or not torch.is_grad_enabled():
            return self.loss(batch, num_items)
        with uncached_autocast():
            batch = {**batch, "num_items": num_items, **_rounded(batch)}
            alike = self._of_most(batch)
            shape = shape_of(alike)
            if self.recording is not None and (loss := self._replayed(alike, shape)) is not None:
                return loss
            kind = (shape, state_of(self.model))
            self.recording = self._try_to_record(alike, kind) if self._settled(kind) else None
            if self.recording is not None and (loss := self._replayed(alike, shape)) is not None:
                return loss
            return self._plain(batch) if kind in self.refused else self._timed(batch)

    def _replayed(self, batch: Mapping[str, Any], shape: tuple[Any, ...]) -> Tensor | None:
        """Return the loss from the recording; None, and let go of it, where it is one of another shape or state.

        The state is asked for while the GPU works: that takes the host milliseconds, and is seldom another.
        """
        recording = self.recording
        if recording.shape == shape:
            for name, tensor in recording.inputs.items():
                tensor.copy_(batch[name], non_blocking=True)
            recording.forward.replay()
            if recording.state == state_of(self.model):
                self.replayed += 1
                return _Replay.apply(recording, *recording.parameters)
        self.recording = None
        return None

    def told(self) -> dict[str, Any]:
        """Return what a run's record says: how many micro-batches were replayed, and why not if none is now."""
        return {"replayed": self.replayed, **({} if self.recording or not self.why_not else {"why_not": self.why_not})}

    def _of_most(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the batch with the most `valid_rows` of those in a row that are like it in all else."""
        if "valid_rows" not in batch:
            return batch
        shape = shape_of({**batch, "valid_rows": None})
        before = self.most[1] if self.most[0] == shape else 0
        self.most = (shape, max(before, batch["valid_rows"]))
        return {**batch, "valid_rows": self.most[1]}

    def _settled(self, shape: tuple[Any, ...]) -> bool:
        last, times = self.seen
        self.seen = (shape, times + 1 if shape == last else 1)
        return self.seen[1] > SETTLED

    def _try_to_record(self, batch: Mapping[str, Any], shape: tuple[Any, ...]) -> Recording | None:
        """Return the recording, None where `why_not` says what is in the way; a recording that fails is the last."""
        self.why_not = self.refused.get(shape) or self._in_the_way(shape)
        if self.why_not:
            return None
        handled = sys.exception()  # by whoever takes this step: none of the recording's
        try:
            return self._record(batch, shape)
        except RuntimeError as error:
            self.mode, self.why_not = "never", f"recording failed: {chain_of(error, handled)}"
            warnings.warn(f"fastft: steps are not replayed as CUDA graphs: {self.why_not}", stacklevel=4)
            return None

    def _in_the_way(self, shape: tuple[Any, ...]) -> str:
        """Return what keeps this step from being recorded, "" if nothing does; note what will keep all of its shape.

        The cheapest question comes first; that of the model's modules is asked once.
        """
        if self._held_before():
            return "the loss of the step before is still referred to"
        share = self._host_share() if self.mode == "auto" else 1.0
        if share < HOST_BOUND:
            why = f"the GPU is what a step waits for: launching takes {share:.0%} of its time"
            self.waited[shape] = self.waited.get(shape, 0) + 1
            final = self.waited[shape] >= ASKED
        else:
            why, final = obstacle(self.model), True
        if why and final:
            self.refused[shape] = why
        return why

    def _held_before(self) -> bool:
        """Say whether the loss of the step before is still referred to."""
        return self.before is not None and self.before() is not None

    def _timed(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss, and take the times that `_host_share` compares."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        if self.mode == "auto" and self.seen[1] >= SETTLED and not self._held_before():
            start.synchronize()  # behind a device that is busy yet, launching would take as long as the device does
        began = time.perf_counter()
        loss = self._plain(batch)
        self.launched = (time.perf_counter() - began, start, end)
        end.record()
        self.before = weakref.ref(loss)
        return loss

    def _host_share(self) -> float:
        """Return the host's time to launch the last plain forward over the device's time for it."""
        if self.launched is None:
            return 0.0
        seconds, start, end = self.launched
        end.synchronize()  # of the step before: long past, unless the device is far behind
        return seconds / max(start.elapsed_time(end) / 1e3, 1e-9)

    def _plain(self, batch: Mapping[str, Any]) -> Tensor:
        given = {name: value for name, value in batch.items() if name != "num_items"}
        return self.loss(given, batch["num_items"])

    def _record(self, batch: Mapping[str, Any], shape: tuple[Any, ...]) -> Recording:
        inputs = {name: value.clone() for name, value in batch.items() if isinstance(value, Tensor)}
        parameters = tuple(parameter for parameter in self.model.parameters() if parameter.requires_grad)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a graph's memory is its own: what earlier steps left cannot serve it
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        offloader, now = _offloader(self.model), torch.cuda.stream(torch.cuda.current_stream())
        # `now`: where a recording fails, `torch.cuda.graph` leaves its own stream the current one.
        with offloader.recorded() if offloader else nullcontext([]) as buffers, now:
            # Other threads (a data loader's) may use CUDA meanwhile: what they do is none of the recording's.
            with torch.cuda.graph(forward, capture_error_mode="thread_local"):
                loss = self._plain({**batch, **inputs})
                if offloader:
                    offloader.join()
            upstream = torch.ones_like(loss)
            with torch.cuda.graph(backward, pool=forward.pool(), capture_error_mode="thread_local"):
                gradients = torch.autograd.grad(loss, parameters, upstream, allow_unused=True)
                places, parts = places_of(gradients)
                flat = tuple(torch.cat([part.flatten() for part in group]) for group in parts)
                if offloader:
                    offloader.join()
                del gradients, parts
        made = Recording(
            *shape, read_by(self.model), inputs, forward, backward, loss, upstream, parameters, flat, places
        )
        for buffer in buffers:
            weakref.finalize(made, offloader.pool.give, buffer).atexit = False
        return made


def chain_of(error: BaseException, handled: BaseException | None = None) -> str:
    """Return the first line of an error, and those of the errors that it came after, up to the one that is `handled`.

    The end of a recording that failed raises an error of its own, which says no more than that there was one before.
    """
    lines, one = [], error
    while one is not None and one is not handled:
        lines.append((str(one).splitlines() or [type(one).__name__])[0])
        one = one.__context__
    return ", after: ".join(lines)


def places_of(
    gradients: Sequence[Tensor | None],
) -> tuple[tuple[tuple[int, int, int] | None, ...], list[list[Tensor]]]:
    """Return the place of every gradient among all of its dtype, and the gradients of each dtype in that order."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    sizes: dict[torch.dtype, int] = {}
    places: list[tuple[int, int, int] | None] = []
    for gradient in gradients:
        if gradient is None:
            places.append(None)
            continue
        groups.setdefault(gradient.dtype, []).append(gradient)
        start = sizes.get(gradient.dtype, 0)
        places.append((list(groups).index(gradient.dtype), start, gradient.numel()))
        sizes[gradient.dtype] = start + gradient.numel()
    return tuple(places), list(groups.values())


def uncached_autocast() -> torch.autocast:
    """Return autocast on the GPU as it is set, without its cache of cast weights, which no graph may hold."""
    return torch.autocast(
        "cuda", dtype=torch.get_autocast_dtype("cuda"), enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False
    )


def obstacle(model: Any) -> str:
    """Return why steps of `model` cannot be recorded, "" if they can."""
    if unwrapped(model) is not model:
        return f"{type(model).__name__} wraps the model: its own hooks run on the host"
    compiled = get_state(model).compiled
    if compiled is None or not compiled.layers:
        return "its layers are not compiled"
    if torch.utils.deterministic.fill_uninitialized_memory and torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for"
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    if gradients > MOST_GRADIENTS:
        return f"its gradients take {gradients / 1e9:.2f} GB, which a recording would hold once more"
    return _random(model)


def read_by(model: nn.Module) -> tuple[Tensor, ...]:
    """Return all tensors of a model that a step may read: parameters, buffers, quantisation states, and copies."""
    planned = planned_of(model)
    states = [part for module in model.modules() for part in quant_state_tensors(module).values()]
    copies = [] if planned is None else planned.weights.of(list(planned.weights.copies.keys()))
    return (*(one.detach() for one in model.parameters()), *model.buffers(), *states, *copies)


def moves_activations(model: Any) -> bool:
    """Say whether the memory plan of a compiled model moves activations to the CPU."""
    planned = planned_of(model)
    return planned is not None and any(mode.offload for mode in planned.modes)


def _offloader(model: Any) -> Any:
    """Return what moves the activations of a compiled model, None before it has moved any."""
    planned = planned_of(model)
    return None if planned is None else planned.offloader


def _random(model: Any) -> str:
    if dropped := dropping.first_on(model):
        return f"dropout in {dropped}: every step draws its own random numbers"
    for name, module in model.named_modules():
        if module._forward_hooks and isinstance(module, nn.Embedding):
            return f"a hook on {name}: it may draw random numbers"
    return ""


def shape_of(batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what of a batch a recording is made for: names, shapes and types of tensors, and all plain values.

    It can be hashed; a value that cannot makes a shape that equals no other.
    """
    return tuple(
        (name, tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (name, _hashable(value))
        for name, value in sorted(batch.items())
    )


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return object()
    return value


def state_of(model: Any) -> tuple[Any, ...]:
    """Return what of a model a recording depends on: where its parameters are, and which of them are trained.

    And which weights are dequantised, and of what: a recording reads the copies where they are and as they were made.
    """
    parameters = _parameters(model)
    planned = planned_of(model)
    return (
        None if planned is None else planned.weights.state(),
        model.training,
        hash(tuple([parameter.data_ptr() for parameter in parameters])),
        hash(tuple([parameter.requires_grad for parameter in parameters])),
    )


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return what `model.parameters()` does, shared ones once for each place; without names, for it is asked each step.

    The modules are walked each time: they may be others than before.
    """
    modules, found = [model], []
    for module in modules:
        if module is not None:
            found += module._parameters.values()
            modules += module._modules.values()
    return [parameter for parameter in found if parameter is not None]


def _rounded(batch: Mapping[str, Any]) -> dict[str, int]:
    """Return `valid_rows` rounded up, if the batch has it."""
    rows = batch.get("valid_rows")
    if rows is None:
        return {}
    total = batch["input_ids"].numel()
    share = max(1, -(-total // ROWS_SHARE))
    return {"valid_rows": min(total, -(-rows // share) * share)}
