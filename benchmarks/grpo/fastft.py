"""fastft's GRPOTrainer."""

import json
from pathlib import Path
from typing import Any

import fastft
from benchmarks.grpo.job import PHASES, Deadline, Job, dataset_of, reward, tokenizer_of
from benchmarks.shapes import shape_of
from benchmarks.weights import build


def run(job: Job, device: str) -> dict[str, Any]:
    """Train and return the seconds of every step by phase, and what the record says of the engine."""
    model = build(job.cell, device)
    if job.backend != "inductor":  # which is the trainer's own choice, with a memory plan for its batches
        model = fastft.compile(model, backend=job.backend)
    config = fastft.GRPOConfig(**job.settings(), engine=job.engine, engine_options=dict(job.engine_options))
    tokenizer = tokenizer_of(shape_of(job.shape).vocabulary)
    trainer = fastft.GRPOTrainer(
        model,
        [reward],
        config,
        train_dataset=dataset_of(job),
        processing_class=tokenizer,
        callbacks=[Deadline(job.until)],
        compile=True,
    )
    try:
        trainer.train()
    finally:
        trainer.engine.close()
    lines = [json.loads(line) for line in (Path(job.output) / "metrics.jsonl").read_text().splitlines()]
    rows = [line for line in lines if "phases" in line]
    steps = [{"seconds": row["train_seconds"], **{p: row["phases"].get(p, 0.0) for p in PHASES}} for row in rows]
    return {
        "steps": steps,
        "reward": [row["reward"] for row in rows],
        "completion_tokens": [row["completions/mean_length"] for row in rows],
        "logprob_difference": {
            name: [row.get(f"logprob_difference/{name}") for row in rows] for name in ("mean", "max", "kl")
        },
        "plan": str(fastft.report(model).plan),
    }
