"""TRL's own GRPOTrainer on transformers and PEFT, with vLLM in its process (colocate) or transformers' generate."""

from typing import Any

import torch
import transformers
import trl
from peft import LoraConfig, get_peft_model

from benchmarks.grpo.job import Deadline, Job, StepClock, Timed, dataset_of, reward
from benchmarks.weights import fill_adapter
from fastft.train.grpo.phases import Phases


class Trainer(Timed, trl.GRPOTrainer):
    """TRL's trainer, timed."""

    phases = Phases()


def run(job: Job, device: str) -> dict[str, Any]:
    """Train and return the seconds of every step by phase. The arm "trl-checkpoint" recomputes, as TRL does unasked."""
    quantised = job.mode == "nf4"
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job.folder, dtype=torch.bfloat16, device_map=device, quantization_config=config if quantised else None
    )
    lora = LoraConfig(r=job.rank, lora_alpha=job.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    fill_adapter(model)
    vllm = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_enable_sleep_mode": True,
        "vllm_max_model_length": job.prompt + job.completion,
        "vllm_gpu_memory_utilization": job.engine_options.get("gpu_memory_utilization", 0.3),
    }
    args = trl.GRPOConfig(
        **job.settings(),
        **(vllm if job.engine == "vllm" else {}),
        gradient_checkpointing=job.arm.endswith("checkpoint"),
    )
    Trainer.phases = Phases()
    clock = StepClock(Trainer.phases)
    trainer = Trainer(
        model,
        [reward],
        args,
        train_dataset=dataset_of(job),
        processing_class=transformers.AutoTokenizer.from_pretrained(job.folder),
        callbacks=[clock, Deadline(job.until)],
    )
    trainer.train()
    history = [row for row in trainer.state.log_history if "reward" in row]
    return {
        "steps": clock.steps,
        "reward": [row["reward"] for row in history],
        "completion_tokens": [row["completions/mean_length"] for row in history],
        "logprob_difference": {
            name: [row.get(f"sampling/sampling_logp_difference/{name}") for row in history] for name in ("mean", "max")
        },
    }
