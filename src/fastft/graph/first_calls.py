"""The first calls of a model's fused operations, for `ahead` to make while nothing waits: they compile Triton kernels.

Triton compiles a kernel at its first launch and builds a launcher for it with a C compiler, most of it outside the
interpreter. The proofs of the first graph make the same calls, one after the other.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from attrs import frozen
from torch import Tensor, nn

from fastft.graph.backend import Settings
from fastft.graph.capture import is_instance_of, quant_state_tensors
from fastft.graph.head import find_head, head_check, plain_linear
from fastft.graph.passes.feed_forward import RULE as FEED_FORWARD
from fastft.graph.passes.feed_forward import fusable_linears
from fastft.graph.passes.lora import FP8_SCALE, active_adapters, is_fp8_linear, not_fp8
from fastft.kernels import layer_norm, lora, lora_glu, rms_norm
from fastft.kernels.linear_ce import linear_cross_entropy
from fastft.kernels.lora_glu.eight_bits import shapes
from fastft.registry.spec import GluPoint, ModelSpec, NormPoint

ROWS = 64
"""Rows of a first call: few, and as many as let a kernel be that of any larger number which 16 divides."""

IN_16_BITS = (torch.bfloat16, torch.float16)


def first_calls(
    model: nn.Module,
    base: nn.Module,
    spec: ModelSpec,
    layer: nn.Module,
    norms: Sequence[nn.Module],
    settings: Settings,
    fp8_head: bool = False,
) -> list[Callable[[], None]]:
    """Return functions that call fused operations, forward and backward, that a training step of `model` will call.

    Those of the gated feed-forwards of `layer`, of the first of `norms`, and of the loss head, unless that is to have
    fp8 factors, which take its whole weight; on the model's own weights, which stay as they are and get no gradient. Of
    a model whose embedding is not in 16 bits there are none: what it computes in is not known here.
    """
    dtype = base.get_input_embeddings().weight.dtype
    if dtype not in IN_16_BITS:
        return []
    found: list[Callable[[], None]] = []
    if FEED_FORWARD not in settings.disable and settings.implementations[FEED_FORWARD] == "op":
        for point in spec.glus:
            gated = [m for m in layer.modules() if is_instance_of(m, point.classes)]
            for module in {tuple(p.shape for p in m.parameters()): m for m in gated}.values():  # one of each size
                found += _feed_forwards(module, point, dtype, settings)
    for point in spec.norms if settings.norm_alone == "op" else ():
        found += [partial(_norm, m, point, dtype) for m in norms[:1] if is_instance_of(m, point.classes)]
    if not fp8_head and head_check(model).fused and plain_linear(find_head(model).module) is not None:
        found.append(partial(_head, model, dtype))
    return found


def _feed_forwards(
    module: nn.Module, point: GluPoint, dtype: torch.dtype, settings: Settings
) -> Iterator[Callable[[], None]]:
    """Yield calls of a gated feed-forward as a step has it, and as its proofs have it, forward and backward apart.

    The kernels of the two ways take the longest to compile, and need not wait for each other.
    """
    linears = fusable_linears(module, point)
    if not linears:
        return
    adapters = [active_adapters(linear)[0] for linear in linears]
    a = [linear.lora_A[name].weight.detach() for linear, name in zip(linears, adapters)]
    b = [linear.lora_B[name].weight.detach() for linear, name in zip(linears, adapters)]
    scales = [float(linear.scaling[name]) for linear, name in zip(linears, adapters)]
    bases = [linear.base_layer for linear in linears]
    weights, states = [base.weight.detach() for base in bases], [list(_states(base)) for base in bases]
    in_fp8 = settings.compute == "fp8" and not any(not_fp8(base, dtype) for base in bases)
    for eight_bits in (False, True)[: 1 + settings.eight_bits]:
        call = _FeedForward(weights, a, b, scales, states, point.activation, dtype, in_fp8, eight_bits)
        yield from (call.backward, call.forward)
    if in_fp8:  # otherwise its backward dequantises as its forward does
        yield call.gradient_of_input


@frozen(eq=False)
class _FeedForward:
    """What `lora_glu.feed_forward` takes beside its input, of which a call has `ROWS` rows of zeros."""

    weights: list[Tensor]
    a: list[Tensor]
    b: list[Tensor]
    scales: list[float]
    states: list[list[Tensor]]
    activation: str
    dtype: torch.dtype
    in_fp8: bool
    eight_bits: bool

    def forward(self) -> None:
        x = self._zeros(ROWS, self.a[0].shape[1])
        weights = (self.weights, self.a, self.b, self.scales, self.states)
        with torch.no_grad():
            lora_glu.feed_forward(x, *weights, self.activation, self.in_fp8, self.eight_bits)

    def backward(self) -> None:
        # Where there are two linears, the first gives gate and up side by side.
        b_gate, b_up = self.b[:2] if len(self.b) == 3 else self.b[0].chunk(2)
        (wide, r_gate), r_up, (narrow, r_down) = b_gate.shape, b_up.shape[1], self.b[-1].shape
        kept = [self._zeros(ROWS, wide), self._zeros(ROWS, wide)]
        if self.eight_bits:
            of_q, of_scale = shapes(ROWS, wide)
            kept = [self._zeros(*of_q).to(torch.uint8), self._zeros(*of_scale).to(torch.float32)]
        torch.ops.fastft.lora_glu_down_backward(
            self._zeros(ROWS, narrow), kept, self._zeros(ROWS, r_gate + r_up), self._zeros(ROWS, r_down),
            b_gate, b_up, self.a[-1], self.b[-1], self.weights[-1], self.states[-1],
            [self.scales[0], self.scales[-2], self.scales[-1]], self.activation, self.in_fp8,
        )  # fmt: skip

    def gradient_of_input(self) -> None:
        x, sizes = self._zeros(ROWS, self.a[0].shape[1]).requires_grad_(), [b.shape[0] for b in self.b[:-1]]
        made = lora.linears(x, self.weights[:-1], self.a[:-1], self.states[:-1], sizes, self.in_fp8)
        torch.autograd.grad(made, (x,), [torch.zeros_like(one) for one in made])

    def _zeros(self, *shape: int) -> Tensor:
        return self.b[0].new_zeros(shape, dtype=self.dtype)


def _states(base: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that say how a linear's weight is quantised, none for one that is not."""
    yield from quant_state_tensors(base).values()
    if is_fp8_linear(base):
        yield base._buffers[FP8_SCALE]


def _norm(norm: nn.Module, point: NormPoint, dtype: torch.dtype) -> None:
    weight = norm._parameters["weight"]
    x = _trained(weight.new_zeros(1, ROWS, weight.shape[0], dtype=dtype))
    weight = weight.detach().requires_grad_(weight.requires_grad)
    epsilon = float(getattr(norm, point.eps))
    if point.kind == "layer":
        y = layer_norm.layer_norm(x, weight, norm._parameters.get("bias"), epsilon)
    else:
        y = rms_norm.rms_norm(x, weight, epsilon, point.offset, point.cast)
    torch.autograd.grad(y, [x, weight][: 1 + weight.requires_grad], torch.zeros_like(y))


def _head(model: nn.Module, dtype: torch.dtype) -> None:
    head = find_head(model)
    weight, bias = head.module.weight.detach(), head.module.bias
    bias = None if bias is None else bias.detach()
    hidden = _trained(weight.new_zeros(ROWS, weight.shape[1], dtype=dtype))
    labels = torch.zeros(ROWS, dtype=torch.int64, device=weight.device)
    loss = linear_cross_entropy(hidden, weight, labels, bias, scale=head.scale, softcap=head.softcap, num_items=ROWS)
    torch.autograd.grad(loss, (hidden,))


def _trained(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()
