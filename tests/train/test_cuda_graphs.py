"""Recording steps: when, what for, and on a GPU that a replayed step is the step."""

import contextlib

import pytest
import torch

import fastft
from fastft.data.collate import collate
from fastft.memory.offload import Offloader
from fastft.state import get_state
from fastft.train import cuda_graphs, step

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: graphs cannot be recorded")


def batch(rows=2, length=8, **more):
    ids = torch.arange(rows * length).view(rows, length)
    return {"input_ids": ids, "labels": ids, **more}


def test_a_shape_settles_after_three_steps_of_it_in_a_row():
    replayer = cuda_graphs.Replayer(None, None)
    shapes = ["a", "a", "b", "b", "b", "b", "b", "a", "a", "a", "a"]
    assert [replayer._settled(shape) for shape in shapes] == [False] * 5 + [True, True] + [False] * 3 + [True]


def test_the_shape_tells_batches_apart_that_need_graphs_of_their_own():
    shapes = [
        batch(),
        batch(length=9),
        {**batch(), "labels": batch()["labels"].int()},
        batch(valid_rows=4),
        batch(valid_rows=5),
        batch(attention_mask=torch.ones(2, 8)),
    ]
    assert len({cuda_graphs.shape_of(one) for one in shapes}) == len(shapes)
    assert cuda_graphs.shape_of(batch()) == cuda_graphs.shape_of({**batch(), "input_ids": torch.zeros(2, 8).long()})
    listed = [cuda_graphs.shape_of(batch(pixels=[torch.zeros(2)])) for _ in range(2)]
    assert len(set(listed)) == 2  # a recording would not know of another list's tensors


@pytest.mark.parametrize("rows, rounded", [(0, 0), (1, 16), (16, 16), (17, 32), (255, 256), (256, 256)])
def test_valid_rows_are_rounded_up_to_a_sixteenth(rows, rounded):
    assert cuda_graphs._rounded(batch(8, 32, valid_rows=rows)) == {"valid_rows": rounded}
    assert cuda_graphs._rounded(batch()) == {}


def test_the_state_follows_parameters_and_what_is_trained(build_model):
    model = build_model().train()
    states = [cuda_graphs.state_of(model)]
    weight = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        weight.add_(1.0)
    assert cuda_graphs.state_of(model) == states[0]  # the recording reads weights where they lie
    weight.data = weight.data.clone()
    states.append(cuda_graphs.state_of(model))
    weight.requires_grad_(False)
    states.append(cuda_graphs.state_of(model))
    states.append(cuda_graphs.state_of(model.eval()))
    layer = model.train().get_base_model().model.layers[0]
    layer.more = torch.nn.Linear(2, 2)
    states.append(cuda_graphs.state_of(model))
    assert len(set(states)) == 5
    assert {id(p) for p in cuda_graphs._parameters(model)} == {id(p) for p in model.parameters()}


def test_what_keeps_a_model_from_being_recorded(build_model, monkeypatch):
    model = build_model().train()
    assert "not compiled" in cuda_graphs.obstacle(model)
    fastft.compile(model, backend="aot_eager")
    assert cuda_graphs.obstacle(model) == ""
    layer = model.get_base_model().model.layers[0]
    layer.mlp.noise = torch.nn.Dropout(0.1)
    assert "mlp.noise" in cuda_graphs.obstacle(model)
    layer.mlp.noise = torch.nn.Dropout(0.0)
    assert cuda_graphs.obstacle(model) == ""
    assert not cuda_graphs.moves_activations(model)
    fastft.compile(model, plan="offload", backend="aot_eager")
    assert cuda_graphs.obstacle(model) == "" and cuda_graphs.moves_activations(model)
    monkeypatch.setattr(cuda_graphs, "MOST_GRADIENTS", 1000)
    assert "gradients" in cuda_graphs.obstacle(model)


def test_on_a_cpu_the_loss_is_called_as_it_is(build_model, build_rows):
    model, rows = build_model().train(), collate(build_rows(3))
    replayer = cuda_graphs.Replayer(model, lambda given, items: step.loss(model, given, items))
    items = torch.tensor(11)
    losses = [replayer(rows, items).item() for _ in range(6)]
    assert losses == [step.loss(model, rows, items).item()] * 6 and replayer.replayed == 0


class Clocked:
    """Stands for `torch.cuda.Event` on a device that takes `device` seconds for a forward; counts who waits for it."""

    device, made, waits = 0.0, 0, 0

    def __init__(self, enable_timing):
        Clocked.made += enable_timing

    def record(self):
        pass

    def synchronize(self):
        Clocked.waits += 1

    def elapsed_time(self, other):
        return 1e3 * self.device


class OnGpu:
    """Stands for the number of targets."""

    device = torch.device("cuda")


@pytest.fixture
def standing(monkeypatch):
    """Return a replayer without a GPU, a function that takes steps with it, and the models asked for an obstacle."""
    replayer, items, asked = cuda_graphs.Replayer(torch.nn.Linear(2, 2), lambda *_: torch.ones(())), OnGpu(), []
    for name in ("made", "waits"):
        monkeypatch.setattr(Clocked, name, 0)
    monkeypatch.setattr(torch.cuda, "Event", Clocked)
    monkeypatch.setattr(cuda_graphs, "uncached_autocast", contextlib.nullcontext)
    monkeypatch.setattr(cuda_graphs, "obstacle", lambda model: asked.append(model) or "there is one")

    def take(count, length, device):
        monkeypatch.setattr(Clocked, "device", device)
        for _ in range(count):
            replayer(batch(length=length), items)

    return replayer, take, asked


def test_where_a_step_waits_for_the_gpu_it_is_asked_three_times_for_a_shape(standing):
    replayer, take, asked = standing
    settled, times = cuda_graphs.SETTLED, cuda_graphs.ASKED
    take(settled + times - 1, 8, 100.0)
    assert Clocked.waits == times - 1 + times and not replayer.refused  # each time before its launching, and behind it
    take(20, 8, 100.0)
    assert Clocked.waits == 2 * times and asked == []
    assert Clocked.made == 2 * (settled + times - 1)  # nor are later steps timed
    assert "the GPU is what a step waits for: launching takes 0%" in replayer.told()["why_not"]
    take(settled + 20, 9, 100.0)
    take(settled + 20, 8, 100.0)  # a shape that comes again is known
    assert Clocked.waits == 4 * times and asked == []


def test_what_is_in_the_way_of_a_shape_is_looked_for_once(standing):
    replayer, take, asked = standing
    take(20, 8, 1e-9)
    assert asked == [replayer.model] and Clocked.waits == 2 and replayer.told()["why_not"] == "there is one"
    replayer.mode = "always"
    take(20, 9, 100.0)
    assert len(asked) == 2 and Clocked.waits == 2
    take(20, 8, 1e-9)
    replayer.model.weight.requires_grad_(False)
    take(20, 8, 1e-9)
    assert len(asked) == 3


def test_a_recording_that_fails_is_told_with_what_came_first(standing, monkeypatch):
    def record(*_):
        try:
            raise RuntimeError("CUDA error: dependency created on uncaptured work\nCompile with more")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error\nCompile with more")

    replayer, take, _ = standing
    replayer.mode = "always"
    monkeypatch.setattr(cuda_graphs, "obstacle", lambda model: "")
    monkeypatch.setattr(cuda_graphs.Replayer, "_record", record)
    told = "operation failed due to a previous error, after: CUDA error: dependency created on uncaptured work$"
    with pytest.warns(UserWarning, match=told):
        try:
            raise ValueError("what the user is handling meanwhile")
        except ValueError:
            take(6, 8, 1e-9)
    assert replayer.mode == "never" and replayer.recording is None


def test_batches_of_fewer_targets_are_like_those_of_more(monkeypatch):
    """One bound serves all of a length in a row; what is launched has its own."""
    launched, shapes, items = [], [], OnGpu()
    replayer = cuda_graphs.Replayer(torch.nn.Linear(2, 2), lambda given, _: launched.append(given) or torch.ones(()))
    replayer.mode = "always"
    monkeypatch.setattr(torch.cuda, "Event", Clocked)
    monkeypatch.setattr(cuda_graphs, "uncached_autocast", contextlib.nullcontext)
    monkeypatch.setattr(cuda_graphs, "obstacle", lambda model: "")
    monkeypatch.setattr(cuda_graphs.Replayer, "_settled", lambda _, shape: shapes.append(shape))
    for length, rows in ((32, 100), (32, 60), (32, 255), (32, 3), (16, 5), (32, 3)):
        replayer(batch(8, length, valid_rows=rows), items)
    told = [value for shape, _ in shapes for name, *rest in shape if name == "valid_rows" for value in rest]
    assert told == [112, 112, 256, 256, 8, 16]
    assert [given["valid_rows"] for given in launched] == [112, 64, 256, 16, 8, 16]
    assert cuda_graphs.Replayer(None, None)._of_most(batch()).keys() == batch().keys()


class Replayed:
    """Stands for a recorded graph; counts its replays."""

    def __init__(self):
        self.count = 0

    def replay(self):
        self.count += 1


def recorded(model, given):
    """Return a recording of `given` for `model` whose loss is 5 and whose gradient is that of its only parameter."""
    parameters = tuple(model.parameters())
    flat = torch.arange(float(sum(p.numel() for p in parameters)))
    places, start = [], 0
    for parameter in parameters:
        places.append((0, start, parameter.numel()))
        start += parameter.numel()
    inputs = {name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
    return cuda_graphs.Recording(
        cuda_graphs.shape_of(given), cuda_graphs.state_of(model), (), inputs, Replayed(), Replayed(),
        torch.tensor(5.0), torch.ones(()), parameters, (flat,), tuple(places),
    )  # fmt: skip


def test_a_model_that_is_another_than_recorded_is_gone_through_anew():
    model = torch.nn.Linear(2, 2)
    given = {**batch(), "num_items": torch.tensor(16)}
    replayer = cuda_graphs.Replayer(model, lambda *_: torch.ones(()), recording=recorded(model, given))
    made, shape = replayer.recording, cuda_graphs.shape_of(given)
    loss = replayer._replayed({**given, "input_ids": given["input_ids"] + 1}, shape)
    loss.backward()
    assert loss.item() == 5.0 and (made.forward.count, made.backward.count) == (1, 1)
    assert torch.equal(made.inputs["input_ids"], given["input_ids"] + 1)
    assert model.weight.grad.flatten().tolist() == [0, 1, 2, 3] and model.bias.grad.tolist() == [4, 5]
    assert replayer._replayed(given, (*shape, "other")) is None and replayer.recording is None
    assert made.forward.count == 1  # a batch of another shape is not even begun with
    replayer.recording = made
    model.weight.requires_grad_(False)
    assert replayer._replayed(given, shape) is None and replayer.recording is None and replayer.replayed == 1


def test_one_slow_measurement_is_no_verdict(standing):
    replayer, take, asked = standing
    take(cuda_graphs.SETTLED + 1, 8, 100.0)
    assert asked == [] and replayer.why_not
    take(1, 8, 1e-9)
    assert len(asked) == 1


def test_gradients_lie_one_after_the_other_by_dtype():
    made = [torch.full((2, 3), 1.0), None, torch.full((4,), 2.0).double(), torch.full((5,), 3.0)]
    places, groups = cuda_graphs.places_of(made)
    flat = [torch.cat([part.flatten() for part in group]) for group in groups]
    assert [f.dtype for f in flat] == [torch.float32, torch.float64] and places[1] is None
    for place, gradient in zip(places, made, strict=True):
        if gradient is not None:
            assert torch.equal(flat[place[0]].narrow(0, *place[1:]).view_as(gradient), gradient)


class Graph:
    """Stands for `torch.cuda.CUDAGraph`, whose recording is a launch here."""

    def pool(self):
        return None


def test_a_recording_has_host_buffers_of_its_own_and_gives_them_back_at_its_end(build_model, build_rows, monkeypatch):
    model, rows, items = build_model().train(), collate(build_rows(3)), torch.tensor(11)
    fastft.compile(model, plan="offload", backend="aot_eager")
    offloader = get_state(model).compiled.planned.offloader = Offloader(torch.device("cpu"), least_bytes=512)
    for name in ("synchronize", "empty_cache", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    replayer = cuda_graphs.Replayer(model, lambda given, items: step.loss(model, given, items), "always")

    def free():
        return sum(buffer.numel() for buffers in offloader.pool.free.values() for buffer in buffers)

    recording = replayer._record({**rows, "num_items": items}, ((), ()))
    held = {one.untyped_storage().data_ptr() for one in recording.weights}
    assert {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())} == held
    size = offloader.moved_bytes
    assert size > 0 == free()
    step.loss(model, rows, items).backward()  # a step that is launched takes others
    assert free() == size and offloader.pool.allocated_bytes == 2 * size
    for place, parameter in zip(recording.places, recording.parameters, strict=True):
        made = recording.gradients[place[0]].narrow(0, *place[1:]).view_as(parameter)
        torch.testing.assert_close(made, parameter.grad)
    del recording
    assert free() == 2 * size


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@gpu
@needs_gpu
@pytest.mark.parametrize(("mode", "plan"), [("lora", "keep"), ("full", "keep"), ("lora", "offload")])
def test_a_replayed_step_is_the_step(mode, plan, build_model, build_rows):
    model = build_model(lora=mode == "lora").train().cuda()
    fastft.compile(model, plan=plan)
    offloader = get_state(model).compiled.planned.offloader = Offloader(torch.device("cuda"), least_bytes=512)
    replayer = cuda_graphs.Replayer(model, lambda given, items: step.loss(model, given, items), "always")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    made = torch.Generator().manual_seed(0)
    for index in range(8):
        ids = torch.randint(1, 60, (2, 24), generator=made).cuda()
        given, items = {"input_ids": ids, "labels": ids, "valid_rows": 46}, torch.tensor(40 + index, device="cuda")
        plain = step.loss(model, given, items)
        plain.backward()
        plain, wanted = plain.item(), gradients(model)
        model.zero_grad()
        for _ in range(2):  # two micro-batches add up
            loss = replayer(given, items)
            loss.backward()
            loss = loss.item()
        assert abs(loss - plain) <= 1e-6 * abs(plain)
        for name, gradient in gradients(model).items():
            assert (gradient / 2 - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-9, name
        optimizer.step()
        model.zero_grad()
    assert replayer.replayed >= 12 and replayer.why_not == ""
    assert (offloader.moved_bytes > 0) == (plan == "offload")
    short = {"input_ids": ids[:, :20], "labels": ids[:, :20]}
    kept = [replayer(short, items) for _ in range(6)]
    torch.testing.assert_close(kept[-1], step.loss(model, short, items), rtol=1e-6, atol=0)
    assert replayer.recording is None  # another shape lets go of it, and a loss that is held is in the way of another
    assert "still referred to" in replayer.why_not
