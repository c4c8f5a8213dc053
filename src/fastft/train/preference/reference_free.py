"""ORPO and CPO (SimPO among its losses): preferences without a reference.

Nothing of TRL is replaced: its losses and metrics are computed by it, on log-probabilities from hidden states.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastft.data.bars import bars_if_large
from fastft.errors import Problem, UsageError
from fastft.noise import between_libraries
from fastft.train import settings, step
from fastft.train.preference import data as preference_data
from fastft.train.preference.base import Preferring
from fastft.train.preference.config import PreferenceSettings, has_no_effect
from fastft.train.preference.sequence_logprobs import SequenceLogprobs, sequence_logprobs

with between_libraries():
    from trl.experimental import cpo, orpo

TOKEN_METRICS = ("logits/chosen", "logits/rejected")


@dataclasses.dataclass
class ORPOConfig(PreferenceSettings, orpo.ORPOConfig):
    """TRL's ORPOConfig with the shared fields of fastft's configs, `max_prompt_length` and `token_metrics`.

    `max_completion_length` has no effect, and a line says so.
    """

    LOSS: ClassVar[str] = "orpo"

    def __post_init__(self) -> None:
        has_no_effect(self, "max_completion_length", None, "max_length cuts prompt and answer together")
        super().__post_init__()


@dataclasses.dataclass
class CPOConfig(PreferenceSettings, cpo.CPOConfig):
    """TRL's CPOConfig with the shared fields of fastft's configs, `max_prompt_length` and `token_metrics`.

    SimPO is `loss_type="simpo"` with `cpo_alpha=0.0`. `max_completion_length` has no effect, and a line says so.
    """

    LOSS: ClassVar[str] = "cpo"

    def __post_init__(self) -> None:
        has_no_effect(self, "max_completion_length", None, "max_length cuts prompt and answer together")
        super().__post_init__()


class ReferenceFree(Preferring):
    """The shared half of the trainers that have no reference."""

    SEQUENCES = (("chosen_input_ids",), ("rejected_input_ids",))
    PROMPT = "prompt_input_ids"

    def __init__(
        self, model: Any = None, args: Any = None, *positional: Any, compile: bool = True, **kwargs: Any
    ) -> None:
        kwargs = settings.by_name(self.THEIRS, positional, kwargs)
        self.construct(model, args, compile, kwargs)

    def before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Refuse what these trainers of TRL cannot do, and streams, which they would read whole."""
        for name in ("train_dataset", "eval_dataset"):
            rows = kwargs.get(name)
            if isinstance(rows, dict):
                raise UsageError(
                    Problem(name, f"several data sets ({', '.join(rows)})", "one", "Use DPOTrainer for several.")
                )
            if rows is not None and not hasattr(rows, "__len__"):
                raise UsageError(
                    Problem(name, "a stream", "a data set that is no stream", "Use DPOTrainer for streams.")
                )
        config = kwargs.pop("peft_config", None)
        if config is not None:  # TRL would change the dtypes of a quantised model on the way
            from peft import get_peft_model

            with between_libraries():
                kwargs["model"] = get_peft_model(model, config)
        args.remove_unused_columns = False  # the collator makes the batch of other columns than the model's

    def after(self) -> None:
        """Leave out rows with long prompts and those of which no answer is left, and say what is cut."""
        limit = self.args.max_length
        for name in ("train_dataset", "eval_dataset"):
            rows = getattr(self, name)
            if rows is None:
                continue
            short = name.removesuffix("_dataset")
            if limit:  # the mean over an empty answer would be no number
                given = rows
                with bars_if_large(given):
                    rows = given.filter(_has_answers, input_columns=["chosen_labels", "rejected_labels"])
                preference_data.tell_left_out(given, rows, short, f"a prompt that fills max_length={limit}")
            rows = preference_data.without_long_prompts(rows, self.PROMPT, self.args.max_prompt_length, short)
            setattr(self, name, rows)
            # TRL has cut them already: a row that fills the length has most likely been
            preference_data.tell_cut(rows, self.SEQUENCES, limit - 1 if limit else None, short)

    def score(self, model: Any, batch: Any, pad: int, whole_chosen: bool) -> tuple[SequenceLogprobs, Tensor, int]:
        """Return what there is of every token of a batch, the mask of answers `[2 B, T - 1]`, and B.

        whole_chosen: for chosen rows, prompt and answer have labels.
        """
        both = self.concatenated_inputs(
            batch, is_encoder_decoder=False, padding_value=pad, device=self.accelerator.device
        )
        ids, mask, labels = (both[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels"))
        chosen = batch["chosen_labels"].shape[0]
        self.count(ids, mask, labels)
        wanted = labels
        if whole_chosen:
            wanted = torch.cat([ids[:chosen].masked_fill(mask[:chosen] == 0, step.IGNORE), labels[chosen:]])
        statistics = self.args.token_metrics or not self.model.training
        with self.accelerator.autocast():
            found = sequence_logprobs(model, ids, mask, wanted, statistics, share_prompts=not whole_chosen)
        return found, labels[:, 1:].ne(step.IGNORE), chosen

    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: str = "train") -> Any:
        """Return loss and metrics of a batch, without those of tokens where they were not measured."""
        loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
        if train_eval == "train" and not self.args.token_metrics:
            metrics = {name: value for name, value in metrics.items() if name not in TOKEN_METRICS}
        return loss, metrics


def mean_logits(found: SequenceLogprobs, answers: Tensor) -> Tensor:
    """Return the mean logits of the tokens of answers, which is all that TRL takes from logits; 0 if not measured."""
    return found.log_probs.new_zeros(1) if found.mean_logits is None else found.mean_logits[answers]


class ORPOTrainer(ReferenceFree, orpo.ORPOTrainer):
    """A TRL ORPOTrainer that trains through fastft: log-probabilities come from hidden states, never from all logits.

    TRL's loss, metrics and data formats; `logits/chosen` and `logits/rejected` are means over the tokens of answers
    (TRL's also count prompts and padding). `compile=True` compiles the model's layers. It also takes what older scripts
    pass: `tokenizer`, `beta`, `max_length`, `max_prompt_length` and others.

    Raises `UsageError` for unknown arguments and combinations that cannot work, `DataError` for rows without the
    columns, `SaveError`.
    """

    THEIRS, CONFIG, METHOD = orpo.ORPOTrainer, ORPOConfig, "orpo"

    def concatenated_forward(self, model: Any, batch: Any) -> tuple[Tensor, ...]:
        """Return mean log-probabilities and mean logits of chosen and rejected answers, and the loss of chosen rows."""
        found, answers, chosen = self.score(model, batch, self.padding_value, whole_chosen=True)
        logps = (found.log_probs * answers).sum(-1) / answers.sum(-1)
        whole = batch["chosen_attention_mask"][:, 1:].sum()
        logits = [mean_logits(_rows(found, part), answers[part]) for part in (slice(chosen), slice(chosen, None))]
        return logps[:chosen], logps[chosen:], *logits, -found.log_probs[:chosen].sum() / whole


class CPOTrainer(ReferenceFree, cpo.CPOTrainer):
    """A TRL CPOTrainer that trains through fastft: log-probabilities come from hidden states, never from all logits.

    Every `loss_type` of TRL's CPOConfig, SimPO and AlphaPO among them. What `ORPOTrainer` says holds here too.
    """

    THEIRS, CONFIG, METHOD = cpo.CPOTrainer, CPOConfig, "cpo"

    def concatenated_forward(self, model: Any, batch: Any) -> tuple[Tensor, ...]:
        """Return log-probabilities and mean logits of chosen and rejected answers, and the loss of chosen answers."""
        found, answers, chosen = self.score(model, batch, self.pad_token_id, whole_chosen=False)
        logps = (found.log_probs * answers).sum(-1)
        loss = -logps[:chosen].sum() / answers[:chosen].sum() if self.cpo_alpha else logps.new_zeros(())
        if self.loss_type in ("ipo", "simpo"):
            logps = logps / answers.sum(-1)
        logits = [mean_logits(_rows(found, part), answers[part]) for part in (slice(chosen), slice(chosen, None))]
        return logps[:chosen], logps[chosen:], *logits, loss


def _has_answers(chosen: list[int], rejected: list[int]) -> bool:
    return all(labels and labels[-1] != step.IGNORE for labels in (chosen, rejected))


def _rows(found: SequenceLogprobs, part: slice) -> SequenceLogprobs:
    mean = None if found.mean_logits is None else found.mean_logits[part]
    return SequenceLogprobs(found.log_probs[part], mean_logits=mean)
