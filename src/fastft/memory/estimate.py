"""The memory that a training step takes at its peak, and its time, from sizes alone. Needs no torch.

Peak = what is always there (weights, adapter, optimizer) + the most that any moment of the step adds: at the loss head
every layer's saved results and the head's own, in the backward of layer i the results of the layers up to i, the
layer's own temporaries, and the gradients made so far; in the first step the proofs of the rewrites.
"""

from collections.abc import Iterator, Sequence
from math import log2

from attrs import evolve, field, frozen, validators

from fastft.memory.devices import Device
from fastft.memory.levels import LEVELS, keeps_wide
from fastft.memory.shape import Shape

# NF4 with double quantisation: a nibble a weight, a byte for 64 of them, 4 bytes for 256 of those.
# fp8 and int8 have 4 bytes more for each row, which are left out.
BYTES_PER_WEIGHT = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0, "fp8": 1.0}
# How products with frozen weights are computed in training steps (`fastft.compile` says what each means).
COMPUTE = ("exact", "fp8", "fp8+head")
# With fp8 factors, in one profile of Llama 8B's layers on an H200: the time of the linears and of quantising what goes
# into them, by that of the exact ones; of the loss head likewise, computed from the rates of its GEMMs. In widths a
# token, the gradients of gate and up in fp8, and those of queries, keys and values.
FP8_TIME, FP8_HEAD_TIME, FP8_WIDE, FP8_ATTENTION = 0.62, 0.56, 1.0, 0.5
# Of weights kept as fp8 factors, the bytes of a weight: values as rows and as columns. The 4 bytes of a row's scale are
# left out. Making factors of NF4 in passing takes so many times as long as reading and writing their bytes (one profile
# of Llama 8B on an H200: 13.8 ms of a step). Those of the loss head take the bytes of its weight in 16 bits, read for
# its largest number and for its values, and these written, read and written transposed (there 1.1 ms).
FP8_COPY, FP8_MADE, FP8_HEAD_MADE = 2, 2.7, 2 + 2 + 1 + 1 + 1
# A number in 8 bits, and its share of the scale of 64 of them in fp32; what the forward of a feed-forward holds while
# it makes them, in widths a token: gate, up and their product. What making and reading them takes longer than in 16
# bits, as bytes a width and token that pass through the memory (docs/benchmarks/2026-11-27-kernels.md).
EIGHT_BITS, EIGHT_BITS_MADE, EIGHT_BITS_TIME = 1 + 4 / 64, 3.0, 6.0
# Logits at once in the loss head (fastft.kernels.linear_ce), and in that of log-probabilities (.linear_logprob).
CHUNK_BYTES, LOGPROB_CHUNK_BYTES = 512 << 20, 256 << 20
# What a step asks of the model's head: the loss of all tokens, or log-probabilities of completions.
HEADS = ("loss", "logprobs")
# AdamW keeps two numbers a parameter, in the parameter's dtype; in 8 bits a byte each and a scale for 256.
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0 + 8 / 256}
# What torch's allocator rounds up, as a part of the peak, and cuBLAS's workspace.
SLACK, WORKSPACE = 0.005, 64 << 20
# Temporaries, in widths a token, fitted to one H200 (docs/benchmarks/2026-11-22-memory-plan.md). The backward of the
# feed-forward: the gradients of gate and up (the first written over that of their product), and those two themselves
# where they are computed again; of the residual stream. What is computed again on the way there and wanted once more
# further down stays.
WIDE_KEPT, WIDE_AGAIN, NARROW, OUTPUT_AGAIN, ATTENTION_AGAIN = 2.0, 4.0, 1.3, 2.0, 1.0
ATTENTION = 6.0  # gradients, fp32 sums over queries, keys and values for every head
# The norm before the head by name. "fused": one operation keeps its input and makes that one's gradient from it and its
# result's. "reference": the same in torch code, as on a CPU. "eager": as transformers computes it. These two work in
# fp32: the bytes a width that the backward holds, and those of a tensor, of which "eager" keeps one, another for a
# LayerNorm's mean, another where the weight is trained. Beside the loss head are the norm's result and its gradient.
NORMS = ("fused", "reference", "eager")
NORM_BYTES, FP32_BYTES, FUSED_WIDTHS, HEAD_WIDTHS = 24, 4, 3, 2.0
# The first step proves each rewrite on so many of the batch's tokens; that of the feed-forward takes the most memory.
# At the full length of a long context it would take more than the step that it is for.
# The last norm's comes when all layers' results are there: it takes so many bytes a width, and two of its results.
PROOF, PROOF_TOKENS, NORM_PROOF = 8.0, 4096, 28
LONG_ROW = 512  # from this width on a norm's sums are kept
# Layers whose results are on the device in the backward of one: its own, and those of the one before, fetched ahead.
IN_FLIGHT = 2
# Attention's speed by that of GEMMs at 4096 tokens, what each doubling adds, and its backward's time by its forward's.
ATTENTION_SPEED, ATTENTION_GAIN, ATTENTION_BACKWARD = 0.75, 0.08, 3.2
# Time beside GEMMs and attention, as a part of them: LoRA's products, and elementwise work; of what is computed again,
# and of the loss head, whose GEMMs are larger than those that a device's speed is taken from. Dequantising is apart: it
# takes a weight's bytes through the memory, whatever the tokens (8B on one H200: 0.29 of 27.4 ms a layer; 0.27 so).
LORA_SHARE, REST_SHARE, AGAIN_SHARE, HEAD_SHARE = 0.09, 0.09, 0.08, -0.14


@frozen
class Mode:
    """What a layer keeps (a name of `LEVELS`), and whether that waits in CPU memory.

    `dequantised`: its NF4 weights are kept in 16 bits beside themselves, and not dequantised in every step; or as fp8
    factors where the step has those.
    """

    level: str = "keep"
    offload: bool = False
    dequantised: bool = False

    def __str__(self) -> str:
        return self.told()

    def told(self, fp8: bool = False) -> str:
        """Return the mode in words; `fp8`: of a step with fp8 factors."""
        moved = ", moved to the CPU" if self.offload else ""
        return self.level + moved + (f", {copies_name(fp8)}" if self.dequantised else "")


def copies_name(fp8: bool) -> str:
    """Return what copies of NF4 weights are called; `fp8`: in a step with fp8 factors."""
    return "weights in fp8" if fp8 else "weights dequantised"


@frozen
class Setup:
    """A training step: a model's shape, its batch, and the bytes of what is there all the time.

    `element` is the size in bytes of an activation. `rank` is LoRA's, 0 without; `trained` the number of trained
    parameters and `gradients`, `optimizer` their bytes. `full`: every weight is trained. `compute`: of `COMPUTE`.
    `nf4_weights`: by layer, how many weights are in NF4 under an adapter, of which copies can be kept; () for none.
    `head`: of `HEADS`; `answers`: with "logprobs", the most tokens of a batch that have one, None for all of them.
    `norm`: of `NORMS`, how the norm before the head is computed.
    `eight_bits`: gate and up, where a layer keeps them, are kept in 8 bits; None: they cannot be.
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
    compute: str = "exact"
    nf4_weights: tuple[int, ...] = ()
    head: str = field(default="loss", validator=validators.in_(HEADS))
    answers: int | None = None
    norm: str = field(default="fused", validator=validators.in_(NORMS))
    eight_bits: bool | None = False

    @property
    def keepable(self) -> bool:
        """Say whether any weights can be kept dequantised, or as fp8 factors."""
        return any(self.nf4_weights)

    def kept_weights(self, modes: Sequence[Mode]) -> list[int]:
        """Return how many weights the layers of these modes keep dequantised, the first layer's first."""
        counts = self.nf4_weights if self.keepable else (0,) * len(modes)
        return [count if mode.dequantised else 0 for mode, count in zip(modes, counts)]

    def keeps_head(self, modes: Sequence[Mode]) -> bool:
        """Say whether the loss head's fp8 factors are kept: beside layers of which all keep theirs."""
        return self.fp8_head and bool(modes) and all(mode.dequantised for mode in modes)

    def dequantised_bytes(self, modes: Sequence[Mode]) -> int:
        """Return what the copies of weights take that are kept with layers of these modes."""
        head = FP8_COPY * self.shape.vocabulary * self.shape.hidden if self.keeps_head(modes) else 0
        return (FP8_COPY if self.fp8 else self.element) * sum(self.kept_weights(modes)) + head

    @property
    def fp8(self) -> bool:
        """Say whether products with the layers' weights have fp8 factors: only frozen ones do."""
        return self.compute != "exact" and not self.full

    @property
    def fp8_head(self) -> bool:
        """Say whether the loss head's products have fp8 factors; those of log-probabilities never have."""
        return self.compute == "fp8+head" and not self.full and self.head == "loss"

    @property
    def tokens(self) -> int:
        """Return the tokens of a micro-batch."""
        return self.rows * self.length

    @property
    def head_tokens(self) -> int:
        """Return the tokens of a micro-batch that the head sees."""
        whole = self.head == "loss" or self.answers is None
        return self.tokens if whole else min(self.tokens, self.answers)


@frozen
class Part:
    """One share of the peak."""

    name: str
    bytes: int


@frozen
class Estimate:
    """A prediction: shares of the peak, their sum, host memory, and seconds a step (None: device not known).

    `relative`: the step's time by that of the same batch with everything kept as it is and nothing in fp8.
    """

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
    compute: str = "exact",
) -> Setup:
    """Return the setup of a model that is not loaded: weights by their quantisation, LoRA in fp32 on all linears."""
    linear = shape.layers * shape.layer_weights
    norms = shape.hidden * (shape.layers * (4 if shape.normed_outputs and shape.normed_inputs else 2) + 1)
    embeddings = (shape.embedding_weights + norms) * element
    weights = int(linear * (element if quant is None else BYTES_PER_WEIGHT[quant]) + embeddings)
    trained = linear + shape.embedding_weights + norms if full else shape.lora_parameters(rank)
    size = element if full else 4
    nf4 = (shape.layer_weights,) * shape.layers if quant == "nf4" else ()
    state = OPTIMIZER_BYTES[optimizer] * (size / 4 if optimizer == "adamw" else 1)
    return Setup(
        shape, rows, length, weights, 0 if full else trained * 4, trained * size, int(trained * state),
        0 if full else rank, full, quant, element, compute, nf4,
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
    if keeps_wide(level):
        kept += int(2 * (EIGHT_BITS if setup.eight_bits else e) * shape.intermediate)
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


def temporary_bytes(setup: Setup, mode: Mode, kept: int = 0) -> int:
    """Return the most that the backward of one layer holds besides what was kept, in bytes.

    `kept`: of how many of its weights there are copies.
    """
    shape, again, e = setup.shape, LEVELS[mode.level].again, setup.element
    wide = WIDE_AGAIN if "feed_forward" in again else WIDE_KEPT
    wide += FP8_WIDE if setup.fp8 else 0
    feed_forward = wide * shape.intermediate + NARROW * shape.hidden
    if "output" in again and not shape.parallel:
        feed_forward += OUTPUT_AGAIN * shape.hidden
    if "attention" in again:
        feed_forward += 2 * shape.query + 2 * shape.key + ATTENTION_AGAIN * shape.hidden
    attention = ATTENTION * shape.query + NARROW * shape.hidden
    attention += shape.query + 2 * shape.key if "projection" in again else 0
    attention += FP8_ATTENTION * (shape.query + 2 * shape.key) if setup.fp8 else 0
    made_anew = (setup.quant or setup.fp8) and kept < shape.layer_weights
    weight = made_bytes(setup) if made_anew else 0
    return int(setup.tokens * e * max(feed_forward, attention)) + weight


def made_bytes(setup: Setup) -> int:
    """Return the most that weights take which one product of the backward makes anew.

    As fp8 factors all that read one activation are there at once, and those of 16 bits as rows too while they are
    transposed; dequantised, one weight is.
    """
    shape = setup.shape
    if not setup.fp8:
        return max(given * made for _, given, made in shape.linears) * setup.element
    groups: dict[str, list[int]] = {}
    for role, given, made in shape.linears:
        groups.setdefault(role, []).append(given * made)
    rows = setup.quant is None
    return max(sum(weights) + (max(weights) if rows else 0) for weights in groups.values())


def head_bytes(setup: Setup, factors: bool = False) -> int:
    """Return what the last norm, the head and their gradients hold at once, in bytes.

    `factors`: those of the head in fp8 are there anyway.
    """
    kept, backward = norm_bytes(setup)
    return max(backward, kept + (logprob_bytes(setup) if setup.head == "logprobs" else _loss_bytes(setup, factors)))


def norm_bytes(setup: Setup) -> tuple[int, int]:
    """Return what the last norm keeps for its backward, and the most that this holds with it, in bytes."""
    wide, e = setup.tokens * setup.shape.hidden, setup.element
    kept = FP32_BYTES * (1 + setup.shape.layer_norm + setup.full) if setup.norm == "eager" else e
    return wide * kept, wide * (FUSED_WIDTHS * e if setup.norm == "fused" else NORM_BYTES)


def _loss_bytes(setup: Setup, factors: bool) -> int:
    shape, e = setup.shape, setup.element
    logits = min(CHUNK_BYTES, setup.tokens * shape.vocabulary * e)
    trained = shape.vocabulary * shape.hidden * 4 if setup.full else 0
    if setup.fp8_head:  # the weight as rows and as columns, and a chunk's gradient
        trained += (0 if factors else FP8_COPY * shape.vocabulary * shape.hidden) + logits // e
    return int(setup.tokens * shape.hidden * HEAD_WIDTHS * e) + logits + trained


def logprob_bytes(setup: Setup) -> int:
    """Return what `linear_logprob` and its gradients hold at once, the hidden states of its rows included, in bytes.

    Under a frozen head the forward makes each row's slope in fp32 beside a chunk of logits, and the backward a gradient
    from it. A trained head makes the logits again, beside the gradients of the hidden states and of the weight, which
    is summed in fp32 and then rounded. In the end the rows' gradients go to their places among all tokens.
    """
    shape, e, rows = setup.shape, setup.element, setup.head_tokens
    wide, weight = rows * shape.hidden, shape.vocabulary * shape.hidden if setup.full else 0
    logits = min(LOGPROB_CHUNK_BYTES, rows * shape.vocabulary * e)
    placed = (wide + setup.tokens * shape.hidden + weight) * e
    held = wide * (2 * e if setup.full else e + 4) + weight * 4
    held += 4 * 4 * rows  # log-probability, entropy, largest logit and log of the sum, in fp32
    gradient = wide * e if not setup.full else weight * e if e < 4 else 0
    return max(placed, held + max(logits, gradient))


def estimate(setup: Setup, modes: Sequence[Mode], device: Device | None = None) -> Estimate:
    """Predict the peak and the time of a step whose layers have these modes, the first layer's first."""
    parts = max(_moments(setup, modes), key=lambda parts: sum(part.bytes for part in parts))
    total = sum(part.bytes for part in parts)
    slack = int(SLACK * total)
    moved = sum(saved_bytes(setup, mode.level) for mode in modes if mode.offload)
    known = device is not None and device.flops > 0
    seconds = step_seconds(setup, modes, device) if known else None
    reference = device if known else REFERENCE
    exact = evolve(setup, compute="exact", eight_bits=False)
    keep = step_seconds(exact, [Mode()] * len(modes), reference)
    relative = step_seconds(setup, modes, reference) / keep if keep else 1.0
    return Estimate((*parts, Part("allocator", slack)), total + slack, moved, seconds, relative)


def _moments(setup: Setup, modes: Sequence[Mode]) -> Iterator[tuple[Part, ...]]:
    """Yield the shares of memory at every moment of training that can be its peak."""
    held = {mode.level: saved_bytes(setup, mode.level) for mode in set(modes)}
    saved = [0 if mode.offload else held[mode.level] for mode in modes]
    moved = [held[mode.level] if mode.offload else 0 for mode in modes]
    a_layer = setup.gradients // (len(modes) or 1)
    weights, dequantised = setup.kept_weights(modes), setup.dequantised_bytes(modes)

    def moment(kept: int, temporary: int, gradients: int, optimizer: int = setup.optimizer) -> tuple[Part, ...]:
        return (
            Part("weights", setup.weights),
            *([Part(copies_name(setup.fp8), dequantised)] if dequantised else []),
            Part("adapter", setup.adapter),
            Part("optimizer state", optimizer),
            Part("gradients", gradients),
            Part("kept for the backward", kept),
            Part("temporaries", temporary),
            Part("workspace", WORKSPACE),
        )

    yield moment(sum(saved) + _behind(moved), head_bytes(setup, setup.keeps_head(modes)), 0)
    if setup.eight_bits:
        wide = int(EIGHT_BITS_MADE * setup.tokens * setup.element * setup.shape.intermediate)
        yield moment(sum(saved) + max(moved, default=0), wide, 0)
    temporary = {pair: temporary_bytes(setup, *pair) for pair in set(zip(modes, weights))}
    for index in range(len(modes) - 1, -1, -1):
        waiting = sum(moved[max(0, index - IN_FLIGHT + 1) : index + 1])
        made = a_layer * (len(modes) - index)
        yield moment(sum(saved[: index + 1]) + waiting, temporary[modes[index], weights[index]], made)
    yield moment(0, 0, setup.gradients)  # the optimizer's step
    tokens = setup.rows * min(setup.length, max(1, PROOF_TOKENS // setup.rows))
    proof = int(PROOF * tokens * setup.element * setup.shape.intermediate)
    yield moment(setup.tokens * setup.shape.hidden * setup.element, proof, 0, optimizer=0)
    if setup.norm != "eager":
        proof = ((NORM_PROOF + 2 * setup.element) * tokens + setup.element * setup.tokens) * setup.shape.hidden
        yield moment(sum(saved) + _behind(moved), proof, 0, optimizer=0)


def _behind(moved: Sequence[int]) -> int:
    """Return what of the results that move is still on the device behind the layers: those of the last one."""
    return moved[-1] if moved else 0


REFERENCE = Device("reference", 0, 700e12, 4.1e12, 50e9)


def step_seconds(setup: Setup, modes: Sequence[Mode], device: Device) -> float:
    """Return the seconds of forward and backward with these modes."""
    forward = layer_seconds(setup, device)
    linear, attention = sum(forward.values()) - forward["attention"], forward["attention"]
    backward = linear * (2 if setup.full else 1) + attention * ATTENTION_BACKWARD
    share = REST_SHARE + (LORA_SHARE if setup.rank else 0)
    plain = (linear + attention + backward) * (1 + share)
    plain -= 2 * linear * (1 - FP8_TIME) if setup.fp8 else 0
    total = 0.0
    counted: dict[tuple[Mode, int], float] = {}  # most layers are alike
    for mode, kept in zip(modes, setup.kept_weights(modes), strict=True):
        if (mode, kept) in counted:
            total += counted[mode, kept]
            continue
        again = sum(forward[role] for role in LEVELS[mode.level].again if role in forward and role != "down")
        if setup.shape.normed_outputs and "down" in LEVELS[mode.level].again:
            again += forward["down"]
        again *= (1 + AGAIN_SHARE) * (FP8_TIME if setup.fp8 else 1)
        taken = plain + again + dequantising_seconds(setup, mode, device, kept)
        if setup.eight_bits and keeps_wide(mode.level):
            taken += EIGHT_BITS_TIME * setup.tokens * setup.shape.intermediate / device.bandwidth
        if mode.offload:
            copying = saved_bytes(setup, mode.level) / device.pcie
            taken += max(0.0, copying - (linear + attention) * (1 + share))
            taken += max(0.0, copying - backward - again)
        counted[mode, kept] = taken
        total += taken
    head = 2 * setup.head_tokens * setup.shape.vocabulary * setup.shape.hidden / device.flops
    head *= FP8_HEAD_TIME if setup.fp8_head else 1
    if setup.fp8_head and not setup.keeps_head(modes):
        total += FP8_HEAD_MADE * setup.shape.vocabulary * setup.shape.hidden / device.bandwidth
    products = 2 + setup.full * (2 if setup.head == "logprobs" else 1)
    return total + head * products * (1 + HEAD_SHARE)


def dequantising_seconds(setup: Setup, mode: Mode, device: Device, kept: int = 0) -> float:
    """Return the seconds in which one layer's weights are dequantised in a step: for each time that they are used.

    With fp8, in which NF4 becomes factors, and what is in fp8 is transposed for the backward. All but the `kept`, of
    which it is not known whether they are used twice or thrice.
    """
    if setup.quant not in BYTES_PER_WEIGHT:
        return 0.0
    again = LEVELS[mode.level].again - (set() if setup.shape.normed_outputs else {"down"})
    read = BYTES_PER_WEIGHT[setup.quant]
    forward = backward = read + setup.element
    if setup.fp8 and setup.quant == "nf4":
        forward = backward = FP8_MADE * (read + 1)
    elif setup.fp8 and setup.quant == "fp8":
        forward, backward = 0, read + 1
    passed = sum(
        given * made * (forward * (1 + (role in again)) + backward) for role, given, made in setup.shape.linears
    )
    return passed * (1 - min(1.0, kept / setup.shape.layer_weights)) / device.bandwidth


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
