"""DPO and KTO: losses against a reference, which is the model itself before training, never a second one.

Nothing of TRL is replaced: its losses and metrics are computed by it, on log-probabilities from hidden states.
"""

import dataclasses
from typing import Any, ClassVar

import torch
import trl
from peft.tuners.tuners_utils import BaseTunerLayer

from fastft.errors import Problem, UsageError
from fastft.train import settings
from fastft.train.preference import data as preference_data
from fastft.train.preference.base import Preferring, completion_labels, same_trainable
from fastft.train.preference.config import PreferenceSettings, has_no_effect
from fastft.train.preference.sequence_logprobs import HeadOfModel

TOKEN_METRICS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")


@dataclasses.dataclass
class DPOConfig(PreferenceSettings, trl.DPOConfig):
    """TRL's DPOConfig with the shared fields of fastft's configs, `max_prompt_length` and `token_metrics`.

    `max_completion_length` and `padding_free` have no effect, and a line says so.
    """

    LOSS: ClassVar[str] = "dpo"

    max_completion_length: int | None = dataclasses.field(default=None, metadata={"help": "No effect."})

    def __post_init__(self) -> None:
        has_no_effect(self, "max_completion_length", None, "max_length cuts prompt and answer together")
        has_no_effect(self, "padding_free", False, "compiled layers run without padding by themselves, where exact")
        super().__post_init__()


@dataclasses.dataclass
class KTOConfig(PreferenceSettings, trl.KTOConfig):
    """TRL's KTOConfig with the shared fields of fastft's configs, `max_prompt_length` and `token_metrics`.

    `max_completion_length` has no effect, and a line says so.
    """

    LOSS: ClassVar[str] = "kto"

    max_completion_length: int | None = dataclasses.field(default=None, metadata={"help": "No effect."})

    def __post_init__(self) -> None:
        has_no_effect(self, "max_completion_length", None, "max_length cuts prompt and answer together")
        super().__post_init__()


class Referenced(Preferring):
    """The shared half of the trainers that have a reference.

    Without a `ref_model` the reference is the model as it is given. With an adapter that does nothing yet it is the
    model with the adapter switched off. Otherwise (an adapter that has been trained, or a model all of whose weights
    are trained) its log-probabilities are computed once, before training, and kept with the data.

    REFERENCE: the entries of a batch that hold what `compute_ref_log_probs` returns, in that order.
    """

    REFERENCE: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        model: Any = None,
        ref_model: Any = None,
        args: Any = None,
        *positional: Any,
        compile: bool = True,
        **kwargs: Any,
    ) -> None:
        kwargs = settings.by_name(self.THEIRS, positional, kwargs, skip=4)
        self.construct(model, args, compile, {**kwargs, "ref_model": ref_model})

    def before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Choose the reference."""
        self._built = False
        fresh = kwargs.get("peft_config") is not None or does_nothing(model)
        self._start_is_lost = kwargs.get("ref_model") is None and not fresh
        if not self._start_is_lost or args.precompute_ref_log_probs:
            return
        data = [kwargs.get("train_dataset"), kwargs.get("eval_dataset")]
        if any(rows is not None and not isinstance(rows, dict) and not hasattr(rows, "__len__") for rows in data):
            remedy = "Give a data set that is no stream, a ref_model, or start from a new adapter."
            raise UsageError(Problem("train_dataset", "a stream", "rows that can be read before training", remedy))
        args.precompute_ref_log_probs = True
        print("fastft: the reference is the model as it is now; its log-probabilities are computed before training.")

    def after(self) -> None:
        """Say from now on that the reference is no more what the model is."""
        self._built = True

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """Return the reference's log-probabilities of a batch, as TRL's method does.

        Raises `UsageError` once the model has changed and is no reference any more.
        """
        if self._built and self._start_is_lost:
            remedy = "Give these rows as eval_dataset to the trainer, or a ref_model."
            raise UsageError(
                Problem("evaluate", "new rows", "rows whose reference was computed before training", remedy)
            )
        with same_trainable(self.model):
            return super().compute_ref_log_probs(HeadOfModel(model, self.accelerator.autocast, False), inputs)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        labels = completion_labels(inputs["input_ids"], inputs["completion_mask"])
        self.count(inputs["input_ids"], inputs["attention_mask"], labels)
        if not self.precompute_ref_logps:
            found = self.compute_ref_log_probs(model if self.ref_model is None else self.ref_model, inputs)
            inputs = {**inputs, **dict(zip(self.REFERENCE, found, strict=True))}
        wanted = self.args.token_metrics or not self.model.training
        head = HeadOfModel(model, self.accelerator.autocast, wanted or getattr(self, "use_weighting", False))
        mode = "train" if self.model.training else "eval"
        computed, self.precompute_ref_logps = self.precompute_ref_logps, True  # TRL takes them from the batch then
        try:
            return super()._compute_loss(head, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = computed
            if not wanted:
                for name in TOKEN_METRICS:
                    self._metrics[mode].pop(name, None)


class DPOTrainer(Referenced, trl.DPOTrainer):
    """A TRL DPOTrainer that trains through fastft: log-probabilities come from hidden states, never from all logits.

    Every `loss_type` of TRL's DPOConfig, its metrics and its data formats. Without a `ref_model` there is no second
    model: the reference is the model with a new adapter switched off, or its log-probabilities before training.
    `compile=True` compiles the model's layers. It also takes what older scripts pass: `tokenizer`, `beta`,
    `max_length`, `max_prompt_length` and others; each is moved into the config with one line.

    Raises `UsageError` for unknown arguments and combinations that cannot work, `DataError` for rows without the
    columns, `SaveError`.
    """

    THEIRS, CONFIG, METHOD = trl.DPOTrainer, DPOConfig, "dpo"
    SEQUENCES = (("prompt_ids", "chosen_ids"), ("prompt_ids", "rejected_ids"))
    PROMPT = "prompt_ids"
    REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        made = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        return _told(self, made, dataset, args, dataset_name)


class KTOTrainer(Referenced, trl.KTOTrainer):
    """A TRL KTOTrainer that trains through fastft: log-probabilities come from hidden states, never from all logits.

    Rows are answers with a verdict (`prompt`, `completion`, `label`) or pairs. What `DPOTrainer` says of the reference,
    older arguments and errors holds here too.
    """

    THEIRS, CONFIG, METHOD = trl.KTOTrainer, KTOConfig, "kto"
    KINDS = (preference_data.VERDICTS, preference_data.PAIRS)
    SEQUENCES = (("prompt_ids", "completion_ids"),)
    PROMPT = "prompt_ids"
    REFERENCE = ("ref_logps", "ref_KL_logps")
    ROWS = 1

    def _compute_kl_logps(self, model: Any, batch: Any) -> Any:
        inner = model.model if isinstance(model, HeadOfModel) else model
        return super()._compute_kl_logps(HeadOfModel(inner, self.accelerator.autocast, False), batch)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        made = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        kept = _told(self, made, dataset, args, dataset_name)
        if kept is made or not self.calculate_KL:
            return kept
        return kept.map(_mismatch, batched=True, batch_size=args.per_device_train_batch_size)


def _mismatch(rows: dict[str, list]) -> dict[str, list]:
    """Give every prompt of a batch its neighbour's answer, from which TRL's KTO estimates the divergence."""
    answers = rows["completion_ids"]
    return {"KL_completion_ids": [answers[-1], *answers[:-1]]}


def _told(trainer: Any, made: Any, given: Any, args: Any, name: str) -> Any:
    """Return tokenised rows without too long prompts, and say what was left out and what is cut."""
    paired = trainer.ROWS == 1 and "chosen" in (given.column_names or ())  # TRL makes two rows of each then
    if not paired:
        preference_data.tell_left_out(given, made, name, f"a prompt that fills max_length={args.max_length}")
    made = preference_data.without_long_prompts(made, trainer.PROMPT, args.max_prompt_length, name)
    preference_data.tell_cut(made, trainer.SEQUENCES, args.max_length, name)
    return made


@torch.no_grad()
def does_nothing(model: Any) -> bool:
    """Say whether the model with its adapter switched off is the model as it is, and stays so in training.

    So it is with LoRA whose B is 0, where nothing but the adapter is trained and copies of whole modules are equal to
    what they were copied from.
    """
    if not hasattr(model, "peft_config"):
        return False
    adapter = {id(p) for name, p in model.named_parameters() if "lora_" in name or ".modules_to_save." in name}
    if any(p.requires_grad and id(p) not in adapter for p in model.parameters()):
        return False
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    second = [p for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    if not layers or not second or any(bool(p.any()) for p in second):
        return False
    return all(_same_as_original(module) for module in model.modules() if hasattr(module, "modules_to_save"))


def _same_as_original(wrapper: Any) -> bool:
    if not isinstance(wrapper.modules_to_save, torch.nn.ModuleDict):
        return True
    original = dict(wrapper.original_module.named_parameters())
    return all(
        name in original and torch.equal(parameter, original[name])
        for copy in wrapper.modules_to_save.values()
        for name, parameter in copy.named_parameters()
    )
