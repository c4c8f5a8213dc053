"""Runs that are broken off and gone on with: SFT on a tiny model, with a checkpoint of each step."""

from fastft.train.sft.config import SFTConfig
from fastft.train.sft.trainer import SFTTrainer

STEPS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}


def trainer(model, tokenizer, dataset, settings, **changes):
    args = SFTConfig(**{**settings, **STEPS, **changes})
    return SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, compile=False)
