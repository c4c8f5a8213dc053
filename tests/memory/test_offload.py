"""Saved tensors that wait in CPU memory: the gradients are the same, buffers are reused, and what stays stays."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from fastft.memory.offload import Offloader

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, table):
        return x + self.second(torch.tanh(self.first(x) * table))


def chain(layers, x, table, offloader=None, which=()):
    for index, layer in enumerate(layers):
        if offloader is None:
            x = layer(x, table)
            continue
        moves = index in which
        with offloader.layer(lambda layer=layer: [table, *layer.parameters()]) if moves else offloader.follow():
            x = layer(x, table)
    return x


@pytest.fixture
def problem():
    torch.manual_seed(0)
    layers = nn.ModuleList(Block(64) for _ in range(4)).double()
    return layers, torch.randn(8, 32, 64, dtype=torch.float64, requires_grad=True), torch.rand(128).double()


def gradients(layers, x):
    return [x.grad, *(parameter.grad for parameter in layers.parameters())]


@pytest.mark.parametrize("which", [(0, 1, 2, 3), (0, 1, 2), (1, 3), (2,)])
def test_gradients_are_bitwise_those_without(problem, which):
    layers, x, table = problem
    other, y = copy.deepcopy(layers), x.detach().clone().requires_grad_()
    chain(layers, x, table).square().sum().backward()
    offloader = Offloader(CPU, least_bytes=1024)
    chain(other, y, table, offloader, which).square().sum().backward()
    assert offloader.moved_bytes > 0
    for expected, got in zip(gradients(layers, x), gradients(other, y), strict=True):
        assert torch.equal(expected, got)


def test_copies_that_were_joined_are_waited_for_once(problem):
    layers, x, table = problem
    chain(layers, x, table).sum().backward()
    expected = [gradient.clone() for gradient in gradients(layers, x)]
    x.grad = None
    layers.zero_grad()
    offloader = Offloader(CPU, least_bytes=1024)
    loss = chain(layers, x, table, offloader, range(4)).sum()
    (last,) = offloader._groups
    assert last.leaving
    offloader.join()
    assert not last.leaving and last.left is None  # the tensors are free before the backward begins
    loss.backward()
    offloader.join()
    for wanted, got in zip(expected, gradients(layers, x), strict=True):
        assert torch.equal(wanted, got)


@pytest.mark.parametrize("rest", [1, 2])
def test_layers_behind_the_last_that_moves_let_go_of_its_tensors_and_fetch_them_ahead(problem, rest, monkeypatch):
    layers, x, table = problem
    told = []
    fetch = Offloader._fetch
    monkeypatch.setattr(Offloader, "_fetch", lambda self, parked: (told.append("fetch"), fetch(self, parked)))
    offloader, last = Offloader(CPU, least_bytes=1024), 4 - rest
    for index, layer in enumerate(layers):
        with offloader.layer(lambda layer=layer: [table, *layer.parameters()]) if index < last else offloader.follow():
            x = layer(x, table)
        x.register_hook(lambda _, index=index: told.append(f"backward {index}"))
        (group,) = offloader._groups
        assert bool(group.leaving) == (index < last)  # what moves waits for the next layer, and no longer
    x.sum().backward()
    places = [place for place, word in enumerate(told) if word == "fetch"]
    assert len(places) == last * 3  # a block saves its input, the widened product, and tanh of it
    # The results of the last layer that moves are on their way before the one behind it has gone backward.
    behind, own = told.index(f"backward {last}"), told.index(f"backward {last - 1}")
    assert all(word == "fetch" for word in told[behind + 1 : own]) and own - behind == 4
    assert places[0] > behind


def test_no_buffer_is_made_after_the_first_step(problem):
    layers, x, table = problem
    offloader = Offloader(CPU, least_bytes=1024)
    sizes = []
    for _ in range(3):
        chain(layers, x, table, offloader, range(4)).sum().backward()
        free = sum(buffer.numel() for buffers in offloader.pool.free.values() for buffer in buffers)
        sizes.append((offloader.pool.allocated_bytes, free, offloader.moved_bytes))
    allocated, free, moved = sizes[0]
    assert allocated == free == moved > 0  # every buffer has come back
    assert [size[0] for size in sizes] == [allocated] * 3 and sizes[2][2] == 3 * moved


def test_steps_of_other_sizes_hold_no_more_than_the_largest_took():
    torch.manual_seed(0)
    layers, table = nn.ModuleList(Block(64) for _ in range(4)), torch.rand(128)
    offloader, most = Offloader(CPU, least_bytes=1024), 0
    for rows in (8, 24, 16, 40, 8, 32, 40, 64, 3, 64):
        x = torch.randn(rows, 16, 64, requires_grad=True)
        before = offloader.moved_bytes
        chain(layers, x, table, offloader, range(4)).sum().backward()
        most = max(most, offloader.moved_bytes - before)
        held = sum(buffer.numel() for buffers in offloader.pool.free.values() for buffer in buffers)
        assert offloader.pool.allocated_bytes == held <= most and offloader.pool.taken_bytes == 0
    moved = offloader.pool.allocated_bytes
    chain(layers, x, table, offloader, range(4)).sum().backward()  # the same again allocates nothing
    assert offloader.pool.allocated_bytes == moved == most


def test_what_is_changed_in_place_is_told_also_where_it_stays():
    offloader = Offloader(CPU, least_bytes=1)
    x = torch.randn(8, 8, requires_grad=True)
    with offloader.layer(lambda: [x]):
        y = torch.tanh(x)
    with offloader.follow():
        kept = torch.sigmoid(y)
        out = kept * kept
    kept.mul_(2)
    with pytest.raises(RuntimeError, match="in-place"):
        out.sum().backward()


def test_parameters_shared_and_small_tensors_stay(problem):
    layers, x, table = problem
    offloader = Offloader(CPU, least_bytes=8 * 32 * 128 * 8)  # the widened results alone
    chain(layers, x, table, offloader, range(4)).sum().backward()
    # A block saves: its input, the widened product, and tanh of it; the first is smaller, tables and weights stay.
    assert offloader.moved_bytes == 4 * 2 * 8 * 32 * 128 * 8


def test_a_second_backward_and_a_forward_without_one(problem):
    layers, x, table = problem
    offloader = Offloader(CPU, least_bytes=1024)
    chain(layers, x, table, offloader, range(4))  # dropped
    held = offloader.pool.allocated_bytes
    loss = chain(layers, x, table, offloader, range(4)).square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])
    del loss
    chain(layers, x, table, offloader, range(4)).sum().backward()
    assert offloader.pool.allocated_bytes <= 2 * held


def test_what_views_only_a_part_of_its_memory_stays():
    offloader = Offloader(CPU, least_bytes=1)
    whole = torch.randn(16, 16, requires_grad=True)
    with offloader.layer(lambda: [whole]):
        half = (whole * 2)[:, :8]
        out = (half * half).sum()
    out.backward()
    assert offloader.moved_bytes == 0
    torch.testing.assert_close(whole.grad[:, :8], 8 * whole.detach()[:, :8])


class Recorded:
    """Stands for a recording of a CUDA graph."""

    over = False


class Stream:
    """Stands for a CUDA stream and keeps the rules of recordings: what one begins, another may not wait for."""

    def __init__(self):
        self.recording, self.work, self.joined = None, 0, {}

    def record_event(self):
        return self, self.recording, self.work

    def wait_event(self, event):
        stream, recording, work = event
        if recording is None and self.recording is not None:
            raise RuntimeError("dependency created on uncaptured work in another stream")
        if recording is not None and (recording.over or self.recording not in (None, recording)):
            raise RuntimeError("operation not permitted on an event last recorded in a capturing stream")
        self.recording = recording
        self.joined[stream] = max(work, self.joined.get(stream, 0))

    def wait_stream(self, stream):
        self.wait_event(stream.record_event())


class Streamed(Offloader):
    """Copies on the CPU, on a stream that keeps the rules."""

    def __init__(self, least_bytes):
        super().__init__(CPU, least_bytes)
        self.stream = Stream()

    def _beside(self):
        self.stream.work += 1
        return super()._beside()


@pytest.fixture
def streams(monkeypatch):
    """Return the stream that computes, and a context that records a graph on it as `torch.cuda.graph` does."""
    main = Stream()
    current = [main]

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    @contextlib.contextmanager
    def recording(side):
        main.recording = Recorded()
        yield
        if side.recording is main.recording and main.joined[side] < side.work:
            raise RuntimeError("capturing stream has unjoined work")
        main.recording.over, main.recording, side.recording = True, None, None

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1].recording is not None)
    return main, recording


@pytest.mark.parametrize("which", [range(4), range(3), (1,)])
@pytest.mark.parametrize("least_bytes", [1024, 8 * 32 * 128 * 8, 1 << 30], ids=["all", "some", "none"])
def test_a_recording_waits_for_nothing_that_was_begun_outside_it(problem, streams, least_bytes, which):
    layers, x, table = problem
    _, recording = streams
    chain(layers, x, table).square().sum().backward()
    offloader = Streamed(least_bytes)
    chain(layers, x, table, offloader, which).sum().backward()  # the pool has what a step takes
    held = chain(layers, x, table, offloader, which).sum()  # and this one has not gone backward yet
    with offloader.recorded() as buffers:
        with recording(offloader.stream):
            loss = chain(layers, x, table, offloader, which).square().sum()
            offloader.join()
        with recording(offloader.stream):
            got = torch.autograd.grad(loss, [x, *layers.parameters()])
            offloader.join()
    held.backward()
    x.grad, _ = None, layers.zero_grad()
    chain(layers, x, table).square().sum().backward()
    for wanted, gradient in zip(gradients(layers, x), got, strict=True):
        assert torch.equal(wanted, gradient)
    assert (len(buffers) > 0) == (least_bytes < 1 << 30)


def test_buffers_of_a_recording_are_its_own_until_they_are_given_back(problem):
    layers, x, table = problem
    offloader = Offloader(CPU, least_bytes=1024)
    with offloader.recorded() as buffers:
        chain(layers, x, table, offloader, range(4)).sum().backward()
    mine = {buffer.data_ptr() for buffer in buffers}
    size = sum(buffer.numel() for buffer in buffers)
    assert len(mine) == len(buffers) > 0 and size == offloader.moved_bytes and offloader.pool.free == {}
    chain(layers, x, table, offloader, range(4)).sum().backward()
    assert mine.isdisjoint(buffer.data_ptr() for free in offloader.pool.free.values() for buffer in free)
    for buffer in buffers:
        offloader.pool.give(buffer)
    with pytest.raises(RuntimeError, match="broke"), offloader.recorded():
        loss = chain(layers, x, table, offloader, range(4)).sum()
        raise RuntimeError("broke")
    del loss
    assert offloader.pool.allocated_bytes == 2 * size and offloader._groups == []
    assert sum(buffer.numel() for free in offloader.pool.free.values() for buffer in free) == 2 * size
    chain(layers, x, table, offloader, range(4)).sum().backward()
    assert offloader.pool.allocated_bytes == 2 * size


def test_a_device_without_an_index_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    offloader = Offloader(torch.device("cuda"))
    assert offloader.device == offloader.stream == torch.device("cuda", 3)  # as tensors on it say


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_forward_keeps_two_layers_and_the_gradients():
    torch.manual_seed(0)
    layers = nn.ModuleList(Block(256) for _ in range(12)).cuda()
    x, table = torch.randn(64, 512, 256, device="cuda", requires_grad=True), torch.rand(512, device="cuda")
    chain(layers, x, table).square().sum().backward()
    expected = [gradient.clone() for gradient in gradients(layers, x)]
    x.grad, _ = None, layers.zero_grad()
    offloader = Offloader(x.device)
    for _ in range(3):
        x.grad, _ = None, layers.zero_grad()
        before = torch.cuda.memory_allocated()
        out = chain(layers, x, table, offloader, range(11)).square().sum()
        held = torch.cuda.memory_allocated() - before
        out.backward()
    assert held < 4 * (64 * 512 * 512 * 4 * 2 + 64 * 512 * 256 * 4)
    for wanted, got in zip(expected, gradients(layers, x), strict=True):
        assert torch.equal(wanted, got)
