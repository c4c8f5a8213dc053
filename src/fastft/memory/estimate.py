"""The memory that a training step takes at its peak, and its time, from sizes alone. Needs no torch.

Peak = what is always there (weights, adapter, optimizer) + the most that any moment of the step adds: at the loss head
every layer's saved results and the head's own, in the backward of layer i the results of the layers up to i, the
layer's own temporaries, and the gradients made so far; in the first step the proofs of the rewrites.
"""

from collections.abc import Iterator, Sequence
from math import log2

from attrs import evolve, frozen

from fastft.memory.devices import Device
from fastft.memory.levels import LEVELS
from fastft.memory.shape import Shape

# NF4 with double quantisation: a nibble a weight, a byte for 64 of them, 4 bytes for 256 of those.
BYTES_PER_WEIGHT = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
CHUNK_BYTES = 512 << 20  # logits at once in the loss head (fastft.kernels.linear_ce)
# AdamW keeps two numbers a parameter, in the parameter's dtype; in 8 bits a byte each and a scale for 256.
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0 + 8 / 256}
# What torch's allocator rounds up, as a part of the peak, and cuBLAS's workspace.
SLACK, WORKSPACE = 0.005, 64 << 20
# Temporaries, in widths a token, fitted to one H200 (docs/benchmarks/2026-11-22-memory-plan.md). The backward of the
# feed-forward: the gradients of gate and up (the first written over that of their product), and those two themselves
# where they are computed again; of the residual stream. What is computed again on the way there and wanted once more
# further down stays. The last norm and the gradient of its input run in fp32, in eager torch.
WIDE_KEPT, WIDE_AGAIN, NARROW, OUTPUT_AGAIN, ATTENTION_AGAIN = 2.0, 4.0, 1.3, 2.0, 1.0
ATTENTION = 6.0  # gradients, fp32 sums over queries, keys and values for every head
HEAD_BYTES, HEAD_WIDTHS = 24, 4.0
# The first step proves each rewrite on inputs of the batch's size; that of the feed-forward is the largest.
PROOF = 8.0
LONG_ROW = 512  # from this width on a norm's sums are kept
# Tensors of a parked layer's input that may wait for their copies, and of one that is fetched ahead.
IN_FLIGHT = 2
# Attention's speed by that of GEMMs at 4096 tokens, what each doubling adds, and its backward's time by its forward's.
ATTENTION_SPEED, ATTENTION_GAIN, ATTENTION_BACKWARD = 0.75, 0.08, 3.2
# Time beside GEMMs and attention, as a part of them: LoRA's products, and elementwise work and dequantising; of what is
# computed again, and of the loss head, whose GEMMs are larger than those that a device's speed is taken from.
LORA_SHARE, REST_SHARE, AGAIN_SHARE, HEAD_SHARE = 0.09, 0.10, 0.08, -0.14


@frozen
class Mode:
    """What a layer keeps (a name of `LEVELS`), and whether that waits in CPU memory."""

    level: str = "keep"
    offload: bool = False

    def __str__(self) -> str:
        return f"{self.level}, moved to the CPU" if self.offload else self.level


@frozen
class Setup:
    """A training step: a model's shape, its batch, and the bytes of what is there all the time.

    `element` is the size in bytes of an activation. `rank` is LoRA's, 0 without; `trained` the number of trained
    parameters and `gradients`, `optimizer` their bytes. `full`: every weight is trained.
    """

    shape: Shape
    rows: int
    length: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    rank: int = 16
    full: bool = False
    quant: str | None = None
    element: int = 2

    @property
    def tokens(self) -> int:
        """Return the tokens of a micro-batch."""
        return self.rows * self.length


@frozen
class Part:
    """One share of the peak."""

    name: str
    bytes: int


@frozen
class Estimate:
    """A prediction: shares of the peak, their sum, host memory, and seconds a step (None: device not known)."""

    parts: tuple[Part, ...]
    peak: int
    host: int
    seconds: float | None
    relative: float


def setup_of(
    shape: Shape,
    rows: int,
    length: int,
    *,
    quant: str | None = "nf4",
    rank: int = 16,
    full: bool = False,
    element: int = 2,
    optimizer: str = "adamw",
) -> Setup:
    """Return the setup of a model that is not loaded: weights by their quantisation, LoRA in fp32 on all linears."""
    linear = shape.layers * shape.layer_weights
    norms = shape.hidden * (shape.layers * (4 if shape.normed_outputs and shape.normed_inputs else 2) + 1)
    embeddings = (shape.embedding_weights + norms) * element
    weights = int(linear * (element if quant is None else BYTES_PER_WEIGHT[quant]) + embeddings)
    trained = linear + shape.embedding_weights + norms if full else shape.lora_parameters(rank)
    size = element if full else 4
    state = OPTIMIZER_BYTES[optimizer] * (size / 4 if optimizer == "adamw" else 1)
    return Setup(
        shape, rows, length, weights, 0 if full else trained * 4, trained * size, int(trained * state),
        0 if full else rank, full, quant, element,
    )  # fmt: skip


def saved_bytes(setup: Setup, level: str) -> int:
    """Return what one layer keeps for its backward at `level`, its input included, in bytes."""
    return setup.tokens * (setup.shape.hidden * setup.element + own_bytes_per_token(setup, level))


def own_bytes_per_token(setup: Setup, level: str) -> int:
    """Return what one layer keeps a token besides its input: the minimum that its backward needs at `level`."""
    shape, again, e = setup.shape, LEVELS[level].again, setup.element
    kept = 0
    if "projection" not in again:
        kept += e * (shape.query + 2 * shape.key)
        kept += 8 if shape.projection_norm and shape.query >= LONG_ROW else 0
    if "attention" not in again:
        kept += e * shape.query + 4 * shape.heads
    if "output" not in again and not shape.parallel:
        kept += e * shape.hidden
    if "feed_forward" not in again:
        kept += 2 * e * shape.intermediate
    if shape.normed_outputs and "down" not in again:
        kept += e * shape.hidden
    norms = (1 if shape.parallel else 2) + (2 if shape.normed_outputs and shape.normed_inputs else 0)
    kept += 4 * norms * (2 if shape.layer_norm else 1) if shape.hidden >= LONG_ROW else 0
    return kept + e * _inner_ranks(setup, again)


def _inner_ranks(setup: Setup, again: frozenset[str]) -> int:
    """Return the widths of x A^T that are kept: of the linears that do not run again.

    One runs again only if its result is wanted: that of the last linear is where a norm follows it, that of attention's
    last where the feed-forward reads it.
    """
    kept = {role for role in ("projection", "output", "feed_forward", "down") if role not in again}
    kept |= set() if setup.shape.normed_outputs else {"down"}
    kept |= {"output"} if setup.shape.parallel else set()
    return setup.rank * sum(role in kept for role, _, _ in setup.shape.linears)


def temporary_bytes(setup: Setup, level: str) -> int:
    """Return the most that the backward of one layer holds besides what was kept, in bytes."""
    shape, again, e = setup.shape, LEVELS[level].again, setup.element
    wide = WIDE_AGAIN if "feed_forward" in again else WIDE_KEPT
    feed_forward = wide * shape.intermediate + NARROW * shape.hidden
    if "output" in again and not shape.parallel:
        feed_forward += OUTPUT_AGAIN * shape.hidden
    if "attention" in again:
        feed_forward += 2 * shape.query + 2 * shape.key + ATTENTION_AGAIN * shape.hidden
    attention = ATTENTION * shape.query + NARROW * shape.hidden
    attention += shape.query + 2 * shape.key if "projection" in again else 0
    weight = max(given * made for _, given, made in shape.linears) * e if setup.quant else 0
    return int(setup.tokens * e * max(feed_forward, attention)) + weight


def head_bytes(setup: Setup) -> int:
    """Return what the last norm, the loss head and their gradients hold at once, in bytes."""
    shape, e = setup.shape, setup.element
    logits = min(CHUNK_BYTES, setup.tokens * shape.vocabulary * e)
    trained = shape.vocabulary * shape.hidden * 4 if setup.full else 0
    loss = int(setup.tokens * shape.hidden * HEAD_WIDTHS * e) + logits + trained
    return max(setup.tokens * shape.hidden * HEAD_BYTES, loss)


def estimate(setup: Setup, modes: Sequence[Mode], device: Device | None = None) -> Estimate:
    """Predict the peak and the time of a step whose layers have these modes, the first layer's first."""
    parts = max(_moments(setup, modes), key=lambda parts: sum(part.bytes for part in parts))
    total = sum(part.bytes for part in parts)
    slack = int(SLACK * total)
    moved = sum(saved_bytes(setup, mode.level) for mode in modes if mode.offload)
    known = device is not None and device.flops > 0
    seconds = step_seconds(setup, modes, device) if known else None
    reference = device if known else REFERENCE
    keep = step_seconds(setup, [Mode()] * len(modes), reference)
    relative = step_seconds(setup, modes, reference) / keep if keep else 1.0
    return Estimate((*parts, Part("allocator", slack)), total + slack, moved, seconds, relative)


def _moments(setup: Setup, modes: Sequence[Mode]) -> Iterator[tuple[Part, ...]]:
    """Yield the shares of memory at every moment of training that can be its peak."""
    saved = [0 if mode.offload else saved_bytes(setup, mode.level) for mode in modes]
    moved = [saved_bytes(setup, mode.level) if mode.offload else 0 for mode in modes]
    a_layer = setup.gradients // (len(modes) or 1)

    def moment(kept: int, temporary: int, gradients: int, optimizer: int = setup.optimizer) -> tuple[Part, ...]:
        return (
            Part("weights", setup.weights),
            Part("adapter", setup.adapter),
            Part("optimizer state", optimizer),
            Part("gradients", gradients),
            Part("kept for the backward", kept),
            Part("temporaries", temporary),
            Part("workspace", WORKSPACE),
        )

    yield moment(sum(saved) + max(moved, default=0), head_bytes(setup), 0)
    for index in range(len(modes) - 1, -1, -1):
        waiting = sum(moved[max(0, index - IN_FLIGHT + 1) : index + 1])
        made = a_layer * (len(modes) - index)
        yield moment(sum(saved[: index + 1]) + waiting, temporary_bytes(setup, modes[index].level), made)
    yield moment(0, 0, setup.gradients)  # the optimizer's step
    proof = int(PROOF * setup.tokens * setup.element * setup.shape.intermediate)
    yield moment(setup.tokens * setup.shape.hidden * setup.element, proof, 0, optimizer=0)


REFERENCE = Device("reference", 0, 700e12, 4.1e12, 50e9)


def step_seconds(setup: Setup, modes: Sequence[Mode], device: Device) -> float:
    """Return the seconds of forward and backward with these modes."""
    forward = layer_seconds(setup, device)
    linear, attention = sum(forward.values()) - forward["attention"], forward["attention"]
    backward = linear * (2 if setup.full else 1) + attention * ATTENTION_BACKWARD
    share = REST_SHARE + (LORA_SHARE if setup.rank else 0)
    plain = (linear + attention + backward) * (1 + share)
    total = 0.0
    for mode in modes:
        again = sum(forward[role] for role in LEVELS[mode.level].again if role in forward and role != "down")
        if setup.shape.normed_outputs and "down" in LEVELS[mode.level].again:
            again += forward["down"]
        again *= 1 + AGAIN_SHARE
        total += plain + again
        if mode.offload:
            copying = saved_bytes(setup, mode.level) / device.pcie
            total += max(0.0, copying - (linear + attention) * (1 + share))
            total += max(0.0, copying - backward - again)
    head = 2 * setup.tokens * setup.shape.vocabulary * setup.shape.hidden / device.flops
    return total + head * (3 if setup.full else 2) * (1 + HEAD_SHARE)


def layer_seconds(setup: Setup, device: Device) -> dict[str, float]:
    """Return the seconds of one layer's forward by role: GEMMs at the device's speed, attention by its pairs."""
    seconds: dict[str, float] = {"attention": 0.0}
    for role, given, made in setup.shape.linears:
        seconds[role] = seconds.get(role, 0.0) + 2 * setup.tokens * given * made / device.flops
    windows = setup.shape.windows or (None,)
    seen = sum(min(setup.length / 2, window or setup.length) for window in windows) / len(windows)
    speed = ATTENTION_SPEED + ATTENTION_GAIN * log2(setup.length / 4096)
    seconds["attention"] = 4 * setup.tokens * seen * setup.shape.query / (device.flops * min(1.0, max(0.3, speed)))
    return seconds


def longer(setup: Setup, length: int) -> Setup:
    """Return the setup at another length."""
    return evolve(setup, length=length)
