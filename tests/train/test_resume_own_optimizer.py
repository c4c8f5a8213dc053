"""Optimizers that a config does not tell of: given to the trainer, or made by a subclass of it."""

import pytest
import torch
from resuming import STEPS, trainer

from fastft.errors import UsageError
from fastft.train import lineage
from fastft.train.sft.config import SFTConfig
from fastft.train.sft.trainer import SFTTrainer


class MakesItsOwn(SFTTrainer):
    def create_optimizer(self, *args):
        self.optimizer = own_optimizer(self.model)
        return self.optimizer


class ChoosesItsOwn(SFTTrainer):
    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        return torch.optim.AdamW, {"lr": 1e-2}


def own_optimizer(model):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW([{"params": trained}, {"params": []}], lr=1e-2)


def with_own_optimizer(how, model, args, **more):
    if how in (MakesItsOwn, ChoosesItsOwn):
        return how(model, args, **more)
    if how == "argument":
        return SFTTrainer(model, args, optimizers=(own_optimizer(model), None), **more)
    if how == "class":
        return SFTTrainer(model, args, optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-2}), **more)
    made = SFTTrainer(model, args, **more)
    made.optimizer = own_optimizer(model)
    return made


@pytest.mark.parametrize("how", ["argument", "class", "later", MakesItsOwn, ChoosesItsOwn])
def test_an_optimizer_of_the_users_own_is_not_the_configs(how, run, build_model, tokenizer, dataset, settings):
    """What the config says of the optimizer means nothing then; of the run before either, if it was given there."""
    args = SFTConfig(**{**settings, **STEPS, "max_steps": 3, "optim": "sgd"})
    more = {"train_dataset": dataset, "processing_class": tokenizer, "compile": False}
    assert lineage.record_of(run / "checkpoint-2")["optimizer_given"] is False
    made = with_own_optimizer(how, build_model(), args, **more)
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 3
    assert lineage.record_of(run / "checkpoint-3")["optimizer_given"] is True
    by_config = trainer(build_model(), tokenizer, dataset, settings, max_steps=4, optim="adamw_torch")
    by_config.train(resume_from_checkpoint=True)
    assert by_config.state.global_step == 4
    assert lineage.record_of(run / "checkpoint-4")["optimizer_given"] is False


@pytest.mark.parametrize("changes", [{}, {"loraplus_ratio": 4.0}], ids=["plain", "groups"])
def test_an_optimizer_that_the_trainer_has_made_itself_is_the_configs(
    changes, run, build_model, tokenizer, dataset, settings, tmp_path
):
    """A trainer keeps its optimizer for its next run."""
    other = {**settings, "output_dir": str(tmp_path / "other"), "optim": "sgd", **changes}
    made = trainer(build_model(), tokenizer, dataset, other)
    made.train()
    assert made.optimizer is not None
    assert lineage.record_of(tmp_path / "other" / "checkpoint-2")["optimizer_given"] is False
    with pytest.raises(UsageError, match="SFTConfig optim: expected 'adamw_torch"):
        made.train(resume_from_checkpoint=str(run / "checkpoint-2"))
