"""Is the fused model the same model? The same weights and batches, fused and compiled against plain transformers."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from attrs import frozen
from torch import nn

from fastft.errors import DataError, Problem
from fastft.state import get_state
from fastft.train import step

# Largest relative difference allowed: (a loss, a gradient norm, the mean residual of either).
# The first two follow from the rounding of the dtype over a few layers; the mean residual is bias, not noise, and is
# held to a fraction of them. Plain PEFT keeps adapters in fp32, the fused path uses the model's dtype: bf16 allows it.
THRESHOLDS = {
    torch.float64: (1e-9, 1e-8, 1e-9),
    torch.float32: (1e-5, 1e-4, 1e-5),
    torch.float16: (3e-3, 2e-2, 3e-3),
    torch.bfloat16: (1e-2, 5e-2, 1e-2),
}


@frozen
class Comparison:
    """One batch: loss and gradient norm, fused and in plain transformers."""

    loss: float
    reference_loss: float
    grad_norm: float
    reference_grad_norm: float


@frozen
class VerifyReport:
    """What `verify` found. Differences are relative to the reference; residuals are signed means (bias)."""

    comparisons: tuple[Comparison, ...]
    dtype: str
    compiled: bool
    head: str
    largest_loss_difference: float
    largest_grad_norm_difference: float
    mean_loss_residual: float
    mean_grad_norm_residual: float
    thresholds: tuple[float, float, float]
    ok: bool

    def __str__(self) -> str:
        verdict = "agrees" if self.ok else "DIFFERS"
        how = "compiled" if self.compiled else "not compiled"
        loss, norm, mean = self.thresholds
        return (
            f"{len(self.comparisons)} batches, {self.dtype}, {how}, head {self.head}: {verdict} with transformers\n"
            f"loss: largest difference {self.largest_loss_difference:.2e} (allowed {loss:g}), "
            f"mean residual {self.mean_loss_residual:+.2e} (allowed {mean:g})\n"
            f"gradient norm: largest difference {self.largest_grad_norm_difference:.2e} (allowed {norm:g}), "
            f"mean residual {self.mean_grad_norm_residual:+.2e} (allowed {norm / 2:g})"
        )


def verify(model: Any, batches: Iterable[Mapping[str, Any]], steps: int | None = None) -> VerifyReport:
    """Compare the first `steps` batches (all, if None) as they would be trained with plain transformers.

    Every batch (`input_ids`, `labels`, and `attention_mask` or `position_ids`; see `fastft.data.collate`) goes forward
    and backward twice at the model's present weights: as fastft trains it, and through transformers' own layers,
    attention and loss. Nothing is trained: weights, gradients, modes and random state are as before. Dropout is off in
    both, since the two draw other random numbers. NaN or infinity is a failure. Raises `DataError` without batches.
    """
    pairs = []
    device = model.get_input_embeddings().weight.device
    with _undisturbed(model):
        for number, batch in enumerate(batches):
            if steps is not None and number >= steps:
                break
            pairs.append(_compare(model, {key: _to(value, device) for key, value in batch.items()}))
    if not pairs:
        raise DataError(Problem("verify batches", 0, "at least one batch"))
    return _report(model, tuple(pairs))


def _compare(model: Any, batch: Mapping[str, Any]) -> Comparison:
    from fastft.graph.compile import uncompiled

    ours = _loss_and_norm(model, lambda: step.loss(model, batch))
    with uncompiled(model):
        theirs = _loss_and_norm(model, lambda: _reference(model, batch))
    return Comparison(ours[0], theirs[0], ours[1], theirs[1])


def _reference(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    inputs = {**step.without_labels(batch), "labels": step.document_labels(batch)}
    return model(**inputs, use_cache=False).loss


def _loss_and_norm(model: Any, compute: Any) -> tuple[float, float]:
    model.zero_grad(set_to_none=True)
    loss = compute()
    loss.backward()
    gradients = [parameter.grad.float() for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm() if gradients else torch.zeros(())
    model.zero_grad(set_to_none=True)
    return loss.item(), norm.item()


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Train mode with dropout off; gradients, modes and random state come back."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    cuda = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=cuda):
        try:
            model.train()
            for module in model.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, gradient in gradients:
                parameter.grad = gradient


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _relative(ours: float, theirs: float) -> float:
    return (ours - theirs) / abs(theirs or 1.0)


def _report(model: Any, pairs: tuple[Comparison, ...]) -> VerifyReport:
    dtype = model.get_input_embeddings().weight.dtype
    thresholds = THRESHOLDS.get(dtype, THRESHOLDS[torch.bfloat16])
    losses = torch.tensor([_relative(p.loss, p.reference_loss) for p in pairs], dtype=torch.float64)
    norms = torch.tensor([_relative(p.grad_norm, p.reference_grad_norm) for p in pairs], dtype=torch.float64)
    largest_loss, largest_norm = losses.abs().max().item(), norms.abs().max().item()
    mean_loss, mean_norm = losses.mean().item(), norms.mean().item()
    # written so that NaN fails
    ok = largest_loss <= thresholds[0] and largest_norm <= thresholds[1]
    ok = ok and abs(mean_loss) <= thresholds[2] and abs(mean_norm) <= thresholds[1] / 2
    check, state = step.head_check(model), get_state(model).compiled
    return VerifyReport(
        pairs,
        str(dtype).removeprefix("torch."),
        bool(state is not None and state.layers),
        "fused" if check.fused else f"transformers' own ({check.reason})",
        largest_loss,
        largest_norm,
        mean_loss,
        mean_norm,
        thresholds,
        ok,
    )
