"""The loss of GRPOTrainer and all gradients of the adapter against TRL's own trainer, which knows nothing of fastft.

Both compute on the same weights and the same batch in fp32; TRL through its own head, fastft from hidden states.
"""

import copy

import pytest
import torch
import trl

import fastft
from fastft.train.grpo.config import LOSSES, GRPOConfig
from fastft.train.grpo.trainer import GRPOTrainer

# Loss and gradients differ by the order of fp32 sums alone; seen at most 4e-7 and 2e-6 of the largest.
LOSS, GRADIENT = 2e-6, 1e-5
ROWS, PROMPT, COMPLETION = 6, 5, 7


def reward(prompts, completions, **columns):
    return [0.0] * len(completions)


@pytest.fixture
def settings(tmp_path):
    return {
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": ROWS,
        "num_generations": 3,
        "max_completion_length": COMPLETION,
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
        "temperature": 0.7,
    }


def batch_of(corrected, tools, seed=3):
    """A batch as TRL makes it: prompts padded on the left, completions on the right; one is cut off and masked."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    prompt_mask = (torch.arange(PROMPT) >= torch.tensor([0, 0, 0, 2, 2, 2])[:, None]).long()
    sizes = torch.tensor([7, 3, 1, 5, 7, 4])
    completion_mask = (torch.arange(COMPLETION) < sizes[:, None]).long()
    completion_mask[4] = 0
    inputs = {
        "prompt_ids": torch.randint(7, 96, (ROWS, PROMPT), generator=generator) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(7, 96, (ROWS, COMPLETION), generator=generator) * completion_mask,
        "completion_mask": completion_mask,
        "advantages": normal(ROWS),
        "num_items_in_batch": completion_mask.sum().float(),
        # far enough from the model's that some ratios are clipped at either side
        "old_per_token_logps": -4.5 + normal(ROWS, COMPLETION, scale=0.3),
        "ref_per_token_logps": -4.5 + normal(ROWS, COMPLETION, scale=0.3),
    }
    if corrected:
        inputs["importance_sampling_ratio"] = torch.rand(ROWS, COMPLETION, generator=generator) + 0.5
        inputs["sampling_per_token_logps"] = -4.5 + normal(ROWS, COMPLETION, scale=0.3)
    if tools:
        inputs["tool_mask"] = (torch.rand(ROWS, COMPLETION, generator=generator) > 0.3).long()
    return inputs


def make(kind, config, model, tokenizer, settings, **changes):
    rows = [{"prompt": f"w{i} w{i + 1}"} for i in range(4)]
    from datasets import Dataset

    args = config(**{**settings, **changes})
    extra = {"compile": False} if kind is GRPOTrainer else {}
    made = kind(model, [reward], args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **extra)
    made.current_gradient_accumulation_steps = 1
    return made


def loss_and_gradients(trainer, inputs, corrected):
    trainer.use_vllm = corrected
    model = trainer.model.train()
    model.zero_grad()
    loss = trainer._compute_loss(model, copy.copy(inputs))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(settings, build_model, tokenizer, corrected=False, tools=False, prepare=lambda model: None, **changes):
    """Loss and gradients of both trainers, whose metrics must agree as well; return those of fastft's."""
    inputs = batch_of(corrected, tools)
    given = {**changes, "beta": 0.0}  # with a beta, TRL's constructor would copy the adapter
    theirs = make(trl.GRPOTrainer, trl.GRPOConfig, build_model(), tokenizer, settings, **given)
    theirs.beta = changes.get("beta", 0.0)
    model = build_model()
    prepare(model)
    options = {"engine": "transformers", "max_logprob_difference": None}
    ours = make(GRPOTrainer, GRPOConfig, model, tokenizer, settings, **changes, **options)
    wanted, gradients = loss_and_gradients(theirs, inputs, corrected)
    got, found = loss_and_gradients(ours, inputs, corrected)
    assert abs(wanted) > 1e-4 and got == pytest.approx(wanted, rel=LOSS, abs=1e-7)
    wanted_names = {name for name in gradients if "lora_" in name}
    assert {name for name in found if "lora_" in name} == wanted_names and len(wanted_names) == 28
    for name in wanted_names:
        largest = gradients[name].abs().max()
        assert largest > 0, name
        error = (found[name] - gradients[name]).abs().max() / largest
        assert error < GRADIENT, f"{name}: {error:.1e}"
    for name, values in theirs._metrics["train"].items():
        assert ours._metrics["train"][name] == pytest.approx(values, rel=1e-5, abs=1e-7), name
    return ours._metrics["train"]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss, settings, build_model, tokenizer):
    metrics = compare(settings, build_model, tokenizer, loss_type=loss, beta=0.04)
    if loss in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        assert 0 < metrics["clip_ratio/region_mean"][0] < 1  # some ratios are clipped, and some are not


@pytest.mark.parametrize("loss", ["grpo", "luspo", "cispo"])
def test_sequence_level_ratios(loss, settings, build_model, tokenizer):
    """GSPO is the loss "grpo" with ratios of sequences."""
    compare(settings, build_model, tokenizer, loss_type=loss, importance_sampling_level="sequence", beta=0.04)


@pytest.mark.parametrize("loss", LOSSES)
def test_corrected_for_the_engine_with_tool_masks(loss, settings, build_model, tokenizer):
    compare(settings, build_model, tokenizer, corrected=True, tools=True, loss_type=loss)


@pytest.mark.parametrize(
    "changes",
    [
        {"epsilon": 0.1, "epsilon_high": 0.4, "delta": 1.2},
        {"top_entropy_quantile": 0.5},
        {"entropy_coef": 0.01},
        {"off_policy_mask_threshold": 0.1},
        {"beta": 0.1, "use_bias_correction_kl": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_terms(changes, settings, build_model, tokenizer):
    compare(settings, build_model, tokenizer, loss_type="grpo", **changes)


def test_through_compiled_layers(settings, build_model, tokenizer):
    def prepare(model):
        fastft.compile(model, backend="aot_eager")

    compare(settings, build_model, tokenizer, prepare=prepare, loss_type="grpo", beta=0.04)


def test_more_padding_changes_nothing(settings, build_model, tokenizer):
    """Two columns of padding on either side of the batch, and its rows in two chunks: the same log-probabilities."""
    trainer = make(
        GRPOTrainer, GRPOConfig, build_model(), tokenizer, settings, engine="transformers", max_logprob_difference=None
    )
    inputs = batch_of(False, False)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    wide, seen = (torch.nn.functional.pad(tensor, (2, 2)) for tensor in (ids, mask))

    def logprobs(ids, mask, keep, **options):
        return trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, keep, compute_entropy=True, **options
        )

    whole, entropies, _ = logprobs(ids, mask, COMPLETION)
    padded, padded_entropies, _ = logprobs(wide, seen, COMPLETION + 2)
    real = inputs["completion_mask"].bool()
    assert (padded[:, :-2] - whole)[real].abs().max() < 2e-6
    assert (padded_entropies[:, :-2] - entropies)[real].abs().max() < 2e-6
    with torch.no_grad():
        chunked, _, _ = logprobs(ids, mask, COMPLETION, batch_size=4)
    assert (chunked - whole)[real].abs().max() < 2e-6
