"""Is the fused model the same model? The same weights and batches, fused and compiled against plain transformers."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from attrs import evolve, frozen
from torch import nn

from fastft.errors import DataError, Problem, UsageError
from fastft.given import model_problem, refuse
from fastft.state import get_state
from fastft.train import dropping, rounding, step

# Largest relative difference allowed: (a loss, a gradient norm, the mean residual of either).
# The first two follow from the rounding of the dtype over a few layers; the mean residual is bias, not noise, and is
# held to a fraction of them. Plain PEFT keeps adapters in fp32, the fused path uses the model's dtype: bf16 allows it.
# Where a number is above them, what rounding does to plain transformers itself is measured (`rounding`), and allowed.
THRESHOLDS = {
    torch.float64: (1e-9, 1e-8, 1e-9),
    torch.float32: (1e-5, 1e-4, 1e-5),
    torch.float16: (3e-3, 2e-2, 3e-3),
    torch.bfloat16: (1e-2, 5e-2, 1e-2),
}


@frozen
class Comparison:
    """One batch: loss and gradient norm, fused and in plain transformers.

    The budgets are how far rounding moves the reference itself, relative to it; 0.0 where that was not measured.
    """

    loss: float
    reference_loss: float
    grad_norm: float
    reference_grad_norm: float
    loss_budget: float = 0.0
    grad_norm_budget: float = 0.0


@frozen
class VerifyReport:
    """What `verify` found. Differences are relative to the reference; residuals are signed means (bias).

    `thresholds`: what the dtype allows of a loss, a gradient norm and the mean residual of losses. `budgets`: what
    rounding allows of a loss, a gradient norm and the mean residual of either, the largest of the batches; zeros where
    all is within the thresholds.
    """

    comparisons: tuple[Comparison, ...]
    dtype: str
    compiled: bool
    head: str
    largest_loss_difference: float
    largest_grad_norm_difference: float
    mean_loss_residual: float
    mean_grad_norm_residual: float
    thresholds: tuple[float, float, float]
    budgets: tuple[float, float, float, float]
    ok: bool

    def __str__(self) -> str:
        verdict = "agrees with" if self.ok else "DIFFERS from"
        how = "compiled" if self.compiled else "not compiled"
        loss, norm, mean = self.thresholds
        allowed = [_allowed(*pair) for pair in zip((loss, norm, mean, norm / 2), self.budgets, strict=True)]
        return (
            f"{len(self.comparisons)} batches, {self.dtype}, {how}, head {self.head}: {verdict} transformers\n"
            f"loss: largest difference {self.largest_loss_difference:.2e} ({allowed[0]}), "
            f"mean residual {self.mean_loss_residual:+.2e} ({allowed[2]})\n"
            f"gradient norm: largest difference {self.largest_grad_norm_difference:.2e} ({allowed[1]}), "
            f"mean residual {self.mean_grad_norm_residual:+.2e} ({allowed[3]})"
        )


def _allowed(threshold: float, budget: float) -> str:
    return f"allowed {budget:.2g} by rounding here" if budget > threshold else f"allowed {threshold:g}"


def verify(model: Any, batches: Iterable[Mapping[str, Any]], steps: int | None = None) -> VerifyReport:
    """Compare the first `steps` batches (all, if None) as they would be trained with plain transformers.

    Every batch (`input_ids`, `labels`, and `attention_mask` or `position_ids`; see `fastft.data.collate`) goes forward
    and backward twice at the model's present weights: as fastft trains it, and through transformers' own layers,
    attention and loss. Nothing is trained: weights, gradients, modes and random state are as before. Dropout is off in
    both, since the two draw other random numbers. Where a difference is above what the dtype allows, as happens near a
    loss of zero, the reference is computed eight times more with other roundings, and three times the root mean square
    of what that changes is allowed. NaN or infinity is a failure.

    `fastft verify` on the command line is another thing: it compares an exported model with the one it was made of
    (`fastft.verify_export`). Raises `DataError` without batches, `UsageError` for what are no batches.
    """
    refuse(model_problem(model))
    pairs, taken = [], []
    device = model.get_input_embeddings().weight.device
    with _undisturbed(model):
        for number, batch in enumerate(batches):
            if steps is not None and number >= steps:
                break
            _refuse_rows(batch, number)
            taken.append(batch)
            pairs.append(_compare(model, _on(device, batch)))
        if not pairs:
            raise DataError(Problem("verify batches", 0, "at least one batch"))
        found = _report(model, tuple(pairs))
        if not found.ok:
            measured = (
                _with_budgets(model, pair, _on(device, batch)) for pair, batch in zip(pairs, taken, strict=True)
            )
            found = _report(model, tuple(measured))
    return found


def _refuse_rows(batch: Any, number: int) -> None:
    """Raise `UsageError` for what is no batch: a row of data, or one that is not collated."""
    where = f"verify batches[{number}]"
    remedy = "Of rows that chat_dataset returns, fastft.data.collate.collate([rows[0], rows[1]]) makes one batch."
    if not isinstance(batch, Mapping):
        got = type(batch).__name__
        raise UsageError(Problem(where, got, "a mapping with the tensors input_ids and labels", remedy))
    wrong = [name for name in ("input_ids", "labels") if not _is_2d(batch.get(name))]
    if wrong:
        got = {name: type(value).__name__ for name, value in batch.items()}
        raise UsageError(Problem(where, got, f"{' and '.join(wrong)} as a tensor of [rows, tokens]", remedy))


def _is_2d(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2


def _compare(model: Any, batch: Mapping[str, Any]) -> Comparison:
    from fastft.graph.compile import uncompiled

    ours = _loss_and_norm(model, lambda: step.loss(model, batch))
    with uncompiled(model):
        theirs = _loss_and_norm(model, lambda: _reference(model, batch))
    return Comparison(ours[0], theirs[0], ours[1], theirs[1])


def _with_budgets(model: Any, pair: Comparison, batch: Mapping[str, Any]) -> Comparison:
    """Return `pair` with how far rounding moves loss and gradient norm of plain transformers on its batch."""
    from fastft.graph.compile import uncompiled

    exact, dtype = (pair.reference_loss, pair.reference_grad_norm), model.get_input_embeddings().weight.dtype
    with uncompiled(model):
        loss, norm = rounding.budget(
            model, dtype, exact, lambda: _loss_and_norm(model, lambda: _reference(model, batch))
        )
    return evolve(pair, loss_budget=loss / abs(exact[0] or 1.0), grad_norm_budget=norm / abs(exact[1] or 1.0))


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
            with dropping.off(model):
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, gradient in gradients:
                parameter.grad = gradient


def _on(device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def _relative(ours: float, theirs: float) -> float:
    return (ours - theirs) / abs(theirs or 1.0)


def _report(model: Any, pairs: tuple[Comparison, ...]) -> VerifyReport:
    dtype = model.get_input_embeddings().weight.dtype
    thresholds = THRESHOLDS.get(dtype, THRESHOLDS[torch.bfloat16])
    losses = torch.tensor([_relative(p.loss, p.reference_loss) for p in pairs], dtype=torch.float64)
    norms = torch.tensor([_relative(p.grad_norm, p.reference_grad_norm) for p in pairs], dtype=torch.float64)
    largest_loss, largest_norm = losses.abs().max().item(), norms.abs().max().item()
    mean_loss, mean_norm = losses.mean().item(), norms.mean().item()
    budgets = torch.tensor([(p.loss_budget, p.grad_norm_budget) for p in pairs], dtype=torch.float64)
    # of the mean of independent errors
    mean_budgets = (budgets.square().sum(0).sqrt() / len(pairs)).tolist()
    loss_ok = losses.abs() <= budgets[:, 0].clamp(min=thresholds[0])
    norm_ok = norms.abs() <= budgets[:, 1].clamp(min=thresholds[1])
    # written so that NaN fails
    ok = bool(loss_ok.all() and norm_ok.all())
    ok = ok and abs(mean_loss) <= max(thresholds[2], mean_budgets[0])
    ok = ok and abs(mean_norm) <= max(thresholds[1] / 2, mean_budgets[1])
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
        (*budgets.amax(0).tolist(), *mean_budgets),
        ok,
    )
