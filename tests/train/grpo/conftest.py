"""A short GRPO run on the tiny model, with rollouts of the transformers engine unless others are given."""

import pytest
from grpo_runs import PROMPTS, even

from fastft.train.grpo.config import GRPOConfig
from fastft.train.grpo.trainer import GRPOTrainer


@pytest.fixture
def config(tmp_path):
    return {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "report_to": "none",
        "engine": "transformers",
    }


@pytest.fixture
def trainer(config, build_model, tokenizer):
    """Make a trainer with other settings, model, rewards or engine."""

    def make(engine=None, rewards=(even,), model=None, prompts=PROMPTS, compile=False, **changes):
        rows = [prompt if isinstance(prompt, dict) else {"prompt": prompt} for prompt in prompts]
        args = GRPOConfig(**{**config, **changes})
        return GRPOTrainer(
            model or build_model(),
            list(rewards),
            args,
            train_dataset=rows,
            processing_class=tokenizer,
            engine=engine,
            compile=compile,
        )

    return make
