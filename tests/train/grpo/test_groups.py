"""Completions of a prompt stand in one micro-batch where that changes no update, and only there."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import Dataset
from grpo_runs import GivenRollouts, even
from transformers import TrainerCallback

from fastft.graph import attention
from fastft.state import base_model
from fastft.train.grpo.config import LOSSES, GRPOConfig
from fastft.train.grpo.groups import arranged, micro_batches_of_an_update, put_together
from fastft.train.grpo.trainer import GRPOTrainer

# Of unequal length, so that a token's weight shows which denominator it had.
PROMPTS = [" ".join(f"w{(5 * i + j) % 89}" for j in range(2 + i % 3)) for i in range(8)]
GROUP, SIZE = 4, 4


class Shuffled(GRPOTrainer):
    """Micro-batches as TRL orders them."""

    _prepare_inputs = trl.GRPOTrainer._prepare_inputs


class Gradients(TrainerCallback):
    """Keep the gradients of every update, where its micro-batches end, and these with the backbone's tokens."""

    def __init__(self, trainer):
        self.updates, self.ends, self.batches, self.tokens = [], [], [], []
        own = trainer._compute_loss
        trainer._compute_loss = lambda model, inputs: self.batches.append(inputs) or own(model, inputs)
        trainer.model.get_input_embeddings().register_forward_pre_hook(
            lambda module, args: self.tokens.append(args[0].numel()) if torch.is_grad_enabled() else None
        )

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.ends.append(len(self.batches))
        self.updates.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@pytest.fixture
def run(build_model, tokenizer, tmp_path):
    """Train a step or more with either order and return the trainer and what was seen."""

    def make(kind=GRPOTrainer, **changes):
        settings = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 1,
            "per_device_train_batch_size": SIZE,
            "gradient_accumulation_steps": 4,
            "num_generations": GROUP,
            "max_completion_length": 9,
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "report_to": "none",
            "vllm_importance_sampling_mode": "token_truncate",  # the only one that every loss takes
            "seed": 5,
        }
        attention.register()
        model = build_model(num_hidden_layers=1)
        base_model(model).set_attn_implementation(attention.NAME)
        rows = Dataset.from_list([{"prompt": text} for text in PROMPTS])
        made = kind(
            model,
            [even],
            GRPOConfig(**settings | changes),
            train_dataset=rows,
            processing_class=tokenizer,
            engine=GivenRollouts(),
            compile=False,
        )
        seen = Gradients(made)
        made.add_callback(seen)
        made.recorder.picture = ("reward.png", lambda *_: None)  # not looked at here
        made.train()
        return made, seen

    return make


def rows_of(batches):
    """Return the completions of micro-batches as (prompt, completion), in order."""
    return [
        (tuple(prompt[seen.bool()].tolist()), tuple(completion.tolist()))
        for batch in batches
        for prompt, seen, completion in zip(
            batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], strict=True
        )
    ]


def apart(got, wanted):
    """Return how far gradients are from those wanted, of the norm of these."""
    off = sum((got[name] - value).double().square().sum() for name, value in wanted.items())
    return (off / sum(value.double().square().sum() for value in wanted.values())).sqrt().item()


# ---- the update


def assert_the_same_updates(together, shuffled):
    assert rows_of(shuffled.batches) != rows_of(together.batches)
    assert sorted(rows_of(shuffled.batches)) == sorted(rows_of(together.batches))
    assert apart(together.updates[0], shuffled.updates[0]) < 1e-6
    # Adam's step divides by the gradient's own size: rounding of gradients near 0 comes back larger
    assert apart(together.updates[1], shuffled.updates[1]) < 1e-4


TWICE = {"num_iterations": 2, "max_steps": 2, "learning_rate": 1e-2, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "bnpo"])
def test_the_update_is_that_of_trls_order(run, loss):
    """One generation in two micro-batches, learnt from twice, with KL, clipping and unequal lengths."""
    settings = {"loss_type": loss, "beta": 0.1, **TWICE}
    _, shuffled = run(Shuffled, **settings)
    _, together = run(**settings)
    assert_the_same_updates(together, shuffled)


def with_tools(kind):
    """Return the trainer with masks of tools, tokens that a tool gave, which follow from each completion."""

    class WithTools(kind):
        def _generate_and_score_completions(self, inputs):
            made = super()._generate_and_score_completions(inputs)
            return made | {"tool_mask": (made["completion_ids"] % 3 != made["completion_ids"][:, :1] % 3).long()}

    return WithTools


def test_sequence_level_ratios_and_tool_masks_move_with_their_rows(run):
    """Ratios of sequences that are not 1 in the second update, under masks that differ by row."""
    settings = {"loss_type": "grpo", "importance_sampling_level": "sequence", "mask_truncated_completions": True}
    _, shuffled = run(with_tools(Shuffled), **settings | TWICE)
    _, together = run(with_tools(GRPOTrainer), **settings | TWICE)
    assert_the_same_updates(together, shuffled)


@pytest.mark.parametrize(
    "changes",
    [{"loss_type": "bnpo"}, {"entropy_coef": 0.1}, {"use_adaptive_entropy": True}, {"top_entropy_quantile": 0.5}],
    ids=lambda changes: next(iter(changes)),
)
def test_where_a_micro_batch_is_a_mean_of_its_own_the_order_is_trls(run, changes):
    _, shuffled = run(Shuffled, gradient_accumulation_steps=2)
    _, ours = run(**changes, gradient_accumulation_steps=2)
    assert rows_of(ours.batches) == rows_of(shuffled.batches)


@pytest.mark.parametrize(
    ("generation", "accumulated", "update"),
    [(4, 4, 4), (4, 2, 2), (4, 1, 1), (2, 4, 2), (4, 6, 2), (6, 4, 2), (3, 2, 1)],
)
def test_micro_batches_of_an_update(generation, accumulated, update):
    args = SimpleNamespace(steps_per_generation=generation, gradient_accumulation_steps=accumulated)
    assert micro_batches_of_an_update(args) == update


@pytest.mark.parametrize(("generation", "accumulated"), [(4, 2), (2, 4), (4, 6), (6, 4), (3, 2)])
def test_no_completion_leaves_its_update(run, generation, accumulated):
    """However generations and updates lie over each other: each update learns from what TRL's shuffle gave it."""
    settings = {"steps_per_generation": generation, "gradient_accumulation_steps": accumulated, "max_steps": 3}
    _, shuffled = run(Shuffled, **settings)
    made, together = run(**settings)
    assert together.ends == shuffled.ends and len(together.ends) == 3
    for part in map(slice, [0, *shuffled.ends], shuffled.ends):
        assert sorted(rows_of(together.batches[part])) == sorted(rows_of(shuffled.batches[part]))
    assert apart(together.updates[0], shuffled.updates[0]) < 1e-6
    changed = rows_of(together.batches) != rows_of(shuffled.batches)
    assert changed == (micro_batches_of_an_update(made.args) > 1)


# ---- what is computed


@pytest.mark.parametrize(("size", "accumulated", "prompts"), [(4, 4, 4), (2, 4, 4), (8, 2, 4), (6, 4, 8), (16, 1, 4)])
def test_prompts_are_computed_as_seldom_as_can_be(run, size, accumulated, prompts):
    made, seen = run(per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)
    kinds = [{prompt for prompt, _ in rows_of([batch])} for batch in seen.batches]
    assert sum(map(len, kinds)) == prompts
    wanted = [
        sum(map(len, kind)) + int(batch["completion_mask"].sum())
        for kind, batch in zip(kinds, seen.batches, strict=True)
    ]
    if size > 2:
        assert seen.tokens == wanted
    told = made.recorder.record["logprobs"]
    assert told["layout"] == "shared" and told["why_not_shared"] is None
    assert told["tokens"]["computed"] == sum(seen.tokens)
    cells = [batch["prompt_ids"].numel() + batch["completion_ids"].numel() for batch in seen.batches]
    assert told["tokens"]["padded"] == sum(cells)


@pytest.mark.parametrize(("group", "size"), [(4, 4), (4, 2), (4, 8), (4, 6), (8, 5), (5, 8), (3, 7), (12, 5), (16, 2)])
def test_groups_of_one_size_need_no_more_prompts_than_any_arrangement(group, size):
    """Prompts and micro-batches are the nodes of a graph, a prompt in a micro-batch an edge. A part that hangs together
    has at least its nodes less 1 edges and whole micro-batches of whole groups, so it has no less than lcm rows."""
    whole = math.lcm(group, size)
    for parts in (1, 2, 3):
        prompts = [name for name in range(parts * whole // group) for _ in range(group)]
        for seed in range(5):
            torch.manual_seed(seed)
            shuffled = [prompts[place] for place in torch.randperm(len(prompts))]
            found = arranged(shuffled, size)
            assert sorted(itertools.chain(*found)) == list(range(len(prompts)))
            assert {len(rows) for rows in found} == {size}
            edges = sum(len({shuffled[row] for row in rows}) for rows in found)
            assert edges == parts * (whole // group + whole // size - 1)


@pytest.mark.parametrize(
    ("prompts", "edges"),
    [("aaabccdd", 4), ("abcdabca", 4), ("aabbbccc", 4), ("abcdefgh", 8), ("aaaaaaab", 3), ("aaabbbcc", 4)],
)
def test_groups_that_the_shuffle_tore(prompts, edges):
    found = arranged(prompts, 4)
    assert sorted(itertools.chain(*found)) == list(range(8)) and [len(rows) for rows in found] == [4, 4]
    assert sum(len({prompts[row] for row in rows}) for rows in found) == edges


def test_every_entry_of_a_row_goes_with_it():
    """Tensors, lists, numbers and None; equal tokens under another mask are another prompt."""
    ids = torch.tensor([[0, 1], [5, 1], [0, 1], [0, 1]])
    mask = torch.tensor([[0, 1], [1, 1], [1, 1], [0, 1]])
    batches = [
        {
            "prompt_ids": ids[part],
            "prompt_mask": mask[part],
            "values": torch.arange(4)[part, None] * torch.ones(1, 3),
            "names": [["a", "b", "c", "d"][row] for row in part],
            "count": torch.tensor(7),
            "nothing": None,
        }
        for part in ([0, 1], [2, 3])
    ]
    first, second = put_together(batches, 2)
    assert first["names"] == ["a", "d"] and second["names"] == ["b", "c"]
    assert first["values"][:, 0].tolist() == [0, 3] and second["prompt_ids"].tolist() == [[5, 1], [0, 1]]
    assert first["count"] == 7 and second["nothing"] is None
    assert put_together(batches, 1) == batches
