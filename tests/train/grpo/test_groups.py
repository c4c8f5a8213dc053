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

import fastft
from fastft.graph import attention
from fastft.memory.estimate import Mode
from fastft.memory.plan import Plan
from fastft.state import base_model, get_state
from fastft.train.grpo.config import LOSSES, GRPOConfig
from fastft.train.grpo.groups import MOST_TOKENS, arranged, merged, micro_batches_of_an_update, put_together
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
    """Train a step or more with either order and return the trainer and what was seen.

    plan: compile the layers with it.
    """

    def make(kind=GRPOTrainer, plan=None, **changes):
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
        if plan is not None:
            fastft.compile(model, plan=plan, backend="eager")
        rows = Dataset.from_list([{"prompt": text} for text in PROMPTS])
        made = kind(
            model,
            [even],
            GRPOConfig(**settings | changes),
            train_dataset=rows,
            processing_class=tokenizer,
            engine=GivenRollouts(),
            compile=plan is not None,
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


# ---- micro-batches as one


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "bnpo"])
def test_micro_batches_as_one_give_the_same_update(run, loss, capsys):
    """Four of 4 completions as one of 16, with KL and unequal lengths; each prompt is computed once then."""
    settings = {"loss_type": loss, "beta": 0.1, "max_steps": 2, "learning_rate": 1e-2, "plan": "keep"}
    _, apart_from_each_other = run(**settings, merge_micro_batches=False)
    assert "as one" not in capsys.readouterr().out
    made, together = run(**settings, merge_micro_batches=True)
    told = "fastft: 4 micro-batches of 4 completions are computed as one of 16, with the same update; merge_micro_ba"
    assert told in capsys.readouterr().out
    assert (apart_from_each_other.ends, together.ends) == ([4, 8], [1, 2])
    assert sorted(rows_of(apart_from_each_other.batches)) == sorted(rows_of(together.batches))
    assert apart(together.updates[0], apart_from_each_other.updates[0]) < 1e-6
    assert apart(together.updates[1], apart_from_each_other.updates[1]) < 1e-4
    args = made.args
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.steps_per_generation) == (16, 1, 1)
    assert made.recorder.record["merged"] == 4
    assert get_state(made.model).compiled.planned.setup.answers == 16 * 9  # what memory is predicted for


@pytest.mark.parametrize(
    "changes",
    [
        {"merge_micro_batches": None},  # on a GPU alone
        {"loss_type": "bnpo"},
        {"entropy_coef": 0.1},
        {"num_iterations": 2},
        {"steps_per_generation": 8},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
    ],
    ids=str,
)
def test_micro_batches_stay_where_one_would_change_the_update_or_a_checkpoint(run, changes):
    made, seen = run(**{"plan": "keep", "merge_micro_batches": True} | changes)
    accumulated = changes.get("gradient_accumulation_steps", 4)
    assert made.recorder.record["merged"] == 1 and seen.ends == [accumulated]
    assert (made.args.per_device_train_batch_size, made.args.gradient_accumulation_steps) == (SIZE, accumulated)


def test_a_wrong_wish_is_refused(run):
    with pytest.raises(fastft.errors.UsageError, match=r"merge_micro_batches: expected one of \(None, True, False\)"):
        run(merge_micro_batches="auto")


def test_as_many_as_the_plan_keeps_in_memory():
    """A budget that holds 8 rows as they are and 16 only with layers computed again: two and two, and not four."""
    keep, less = (Mode(), Mode()), (Mode("min"), Mode())
    asked = []

    def foreseen(rows, most=8, fits=16):
        asked.append(rows)
        return Plan(keep if rows <= most else less, None, None, rows <= fits)

    assert merged(4, 4, 100, foreseen) == 2 and asked == [4, 16, 8]
    assert merged(4, 4, 100, lambda rows: foreseen(rows, most=16)) == 4
    assert merged(4, 4, 100, lambda rows: foreseen(rows, most=16, fits=12)) == 2
    assert merged(4, 4, 100, lambda rows: foreseen(rows, most=2)) == 4  # they keep less already, and no less then
    assert merged(4, 4, 100, lambda rows: foreseen(rows, fits=2)) == 1
    assert merged(4, 6, 100, lambda rows: foreseen(rows, most=16)) == 3  # four would not divide six
    assert merged(4, 4, MOST_TOKENS // 8, lambda rows: foreseen(rows, most=16)) == 2
    assert merged(4, 4, 100, lambda rows: None) == 1


@pytest.mark.parametrize("plan", ["1GB", "90MB", "keep"])
def test_what_is_foreseen_is_what_is_planned(build_model, plan):
    model = fastft.compile(build_model(hidden_size=64, intermediate_size=256), plan=plan, backend="eager")
    planned, where = get_state(model).compiled.planned, next(model.parameters()).device
    told = planned.foreseen("logprobs", 32 * 9, (32, 60), where)
    before = (planned.largest, planned.modes)
    assert before == ((0, 0), planned.chosen)
    planned.expect("logprobs", 32 * 9, (32, 60), where)
    assert told.modes == planned.modes and told.fits == planned.fits
    assert told.estimate.peak == planned.predicted().peak
