"""The shipped model learns with fp8 factors as it does without."""

import torch

import fastft
from fastft.demo import MODEL_FOLDER, lesson

STEPS, BATCH = 14, 4


def losses(compute, folder):
    model, tokenizer = fastft.load(MODEL_FOLDER, quant="nf4")
    model = fastft.add_lora(model, r=16, alpha=32)
    train = fastft.chat_dataset(lesson.rows(STEPS * BATCH, 0), tokenizer)
    torch._dynamo.reset()
    fastft.compile(model, backend="eager", compute=compute)
    options = {"batch_size": BATCH, "learning_rate": 2e-3, "warmup_steps": 3, "save_strategy": "no", "log_every": 1}
    result = fastft.sft(model, tokenizer, train, output_dir=folder, pad_to_multiple_of=96, **options)
    assert fastft.report(model).not_in_fp8() == ()
    return torch.tensor([loss for _, loss in result.losses])


def test_the_demo_model_learns_along_the_same_curve(tmp_path):
    exact, got = losses("exact", tmp_path / "exact"), losses("fp8+head", tmp_path / "fp8")
    difference = got - exact
    assert len(exact) == STEPS and exact[-4:].mean() < 0.5 * exact[0]  # it did learn
    assert 0 < difference[0].abs() < 0.01 * exact[0]
    assert difference.abs().max() < 0.05 * exact[0] and difference.mean().abs() < 0.02 * exact.mean()
