"""Unsloth's GRPO, through its own loader. It replaces parts of other packages, so it is imported before any of them."""

import unsloth  # isort: skip
from typing import Any

import torch
import trl

from benchmarks.arms.unsloth import TARGETS
from benchmarks.grpo.job import Deadline, Job, StepClock, Timed, dataset_of, reward
from benchmarks.weights import fill_adapter
from fastft.train.grpo.phases import Phases


def run(job: Job, device: str) -> dict[str, Any]:
    """Train and return the seconds of every step by phase; vLLM is what Unsloth calls fast inference."""
    fast = job.engine == "vllm"
    length = job.prompt + job.completion
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        job.folder,
        max_seq_length=length,
        dtype=torch.bfloat16,
        load_in_4bit=job.mode == "nf4",
        use_exact_model_name=True,
        fast_inference=fast,
        max_lora_rank=max(8, job.rank),
        gpu_memory_utilization=job.engine_options.get("gpu_memory_utilization", 0.5),
    )
    checkpointing = "unsloth" if job.arm.endswith("checkpoint") else False
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=job.rank,
        lora_alpha=job.rank,
        lora_dropout=0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing=checkpointing,
        max_seq_length=length,
    )
    fill_adapter(model)
    settings = job.settings() | ({"use_vllm": True} if fast else {})
    phases = Phases()

    class Trainer(Timed, trl.GRPOTrainer):  # the class that Unsloth has put into trl
        """Unsloth's trainer, timed."""

    Trainer.phases = phases
    clock = StepClock(phases)
    trainer = Trainer(
        model=model,
        reward_funcs=[reward],
        args=trl.GRPOConfig(**settings),
        train_dataset=dataset_of(job),
        processing_class=tokenizer,
        callbacks=[clock, Deadline(job.until)],
    )
    trainer.train()
    history = [row for row in trainer.state.log_history if "reward" in row]
    return {
        "steps": clock.steps,
        "reward": [row["reward"] for row in history],
        "completion_tokens": [row.get("completions/mean_length") for row in history],
    }
