"""The update of GRPOTrainer, on given rollouts, and what is held against the engine's log-probabilities."""

import contextlib
import math

import pytest
import tiny
import torch
from attrs import evolve
from grpo_runs import PROMPTS, GivenRollouts, as_second, rows_of, trained
from transformers import TrainerCallback

import fastft
from fastft.errors import EngineError
from fastft.memory.plan import solve
from fastft.state import get_state
from fastft.train.grpo import rollouts


@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_accumulated_is_one_big_batch(trainer, loss):
    """16 completions of 4 prompts, at once and four at a time: the same weights after the step."""
    weights = []
    for rows, times in ((16, 1), (4, 4)):
        made = trainer(
            GivenRollouts(),
            loss_type=loss,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=times,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=1.0,
        )
        before = trained(made.model)
        made.train()
        weights.append({name: value - before[name] for name, value in trained(made.model).items()})
    for name, change in weights[0].items():
        assert change.abs().max() > 1e-6, name
        torch.testing.assert_close(change, weights[1][name], rtol=1e-4, atol=2e-7)


def test_steps_per_generation_reuse_one_generation(trainer):
    engine = GivenRollouts()
    made = trainer(engine, steps_per_generation=2, num_iterations=2, max_steps=4)
    made.train()
    assert engine.calls == 1
    assert [row["step"] for row in rows_of(made.args.output_dir) if "loss" in row] == [1, 2, 3, 4]


def test_engine_is_awake_only_for_rollouts_and_gets_each_steps_weights(trainer):
    engine = GivenRollouts()
    trainer(engine, max_steps=2).train()
    assert engine.log == ["hand_over", "sleep", *2 * ["wake", "hand_over", "generate", "sleep"]]


class Copying(GivenRollouts):
    """Has weights of its own, as engines on another device do, and notes how far they are from the model's."""

    def __init__(self):
        super().__init__()
        self.apart = []

    def hand_over(self, model):
        self.model, self.copied = model, [parameter.detach().clone() for parameter in model.parameters()]
        super().hand_over(model)

    def generate(self, prompts, sampling, count=1):
        pairs = zip(self.copied, self.model.parameters(), strict=True)
        self.apart.append(max((own - theirs).abs().max().item() for own, theirs in pairs))
        return super().generate(prompts, sampling, count)


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_the_engine_samples_from_the_weights_of_the_model_however_they_changed(optim, trainer):
    engine = Copying()
    made = trainer(engine, max_steps=1, optim=optim)
    made.train()
    made.train()  # its steps are counted anew
    made.evaluate([{"prompt": prompt} for prompt in PROMPTS[:4]])
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.mul_(1.5)
    made.evaluate([{"prompt": prompt} for prompt in PROMPTS[:4]])
    assert engine.calls == len(engine.apart) >= 4 and engine.apart == [0.0] * engine.calls
    handed = engine.log.count("hand_over")
    made.evaluate([{"prompt": prompt} for prompt in PROMPTS[:4]])
    assert engine.log.count("hand_over") == handed  # nothing has changed


def test_compiled_is_not_compiled(trainer, build_model):
    """One step, KL to the model without its adapter included, through rewritten layers and transformers' own."""
    ends = []
    for compiled in (False, True):
        model = build_model()
        if compiled:
            fastft.compile(model, backend="aot_eager")
        before = trained(model)
        sgd = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
        made = trainer(GivenRollouts(), model=model, compile=compiled, beta=0.5, max_steps=1, **sgd)
        made.train()
        changes = {name: value - before[name] for name, value in trained(model).items()}
        ends.append((made.state.log_history[0], changes))
    (plain, gradients), (other, rewritten) = ends
    assert plain["kl"] > 1e-3
    for name in ("loss", "kl", "grad_norm", "entropy", "reward"):
        assert other[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-7), name
    for name, value in gradients.items():
        assert value.abs().max() > 1e-6, name
        torch.testing.assert_close(rewritten[name], value, rtol=1e-4, atol=1e-6)


def test_passes_without_gradients_are_compiled_once(trainer, build_model):
    """Reference, policy that sampled, and update, over six steps of three generations: no layer runs uncompiled."""
    model = build_model()
    fastft.compile(model, backend="eager")
    made = trainer(GivenRollouts(), model=model, compile=True, beta=0.5, num_iterations=2, max_steps=6)
    compiled, counts = get_state(model).compiled, []

    class Counting(TrainerCallback):
        def on_step_end(self, *_, **__):
            counts.append([graph.gradients for graph in compiled.backend.graphs])

    made.add_callback(Counting())
    made.train()
    # in TRL's order: of the policy with the last norm's, of the reference, of the update the first layer's, the others'
    # and the last norm's
    assert counts == [[False, False, False, True, True, True]] * 6
    assert compiled.whole and not compiled.eager_calls and not compiled.report().refused()


@pytest.mark.parametrize("shares", [True, False])
def test_dequantised_weights_make_room_for_an_engine_on_the_same_device(trainer, build_model, shares):
    """Two generations, of two updates each: the copies are there in each update, and gone while the engine samples."""
    model = tiny.with_lora(tiny.in_nf4(build_model(lora=False, hidden_size=64, intermediate_size=128)), torch.float32)
    model = fastft.compile(model, plan="fast", backend="eager")
    weights, updates = get_state(model).compiled.planned.weights, []

    class Watching(GivenRollouts):
        shares_memory = shares

        def wake(self):
            self.log.append(weights.bytes)

    class Updates(TrainerCallback):
        def on_step_end(self, *_, **__):
            updates.append((weights.bytes, weights.changes))

    engine = Watching()
    made = trainer(engine, model=model, compile=True, steps_per_generation=2, max_steps=4)
    made.add_callback(Updates())
    made.train()
    held, copies = updates[0][0], 7 * 2
    assert held > 0 and {size for size, _ in updates} == {held}
    again = copies + (1 + copies) * shares  # let go once, and each made again
    assert [changes for _, changes in updates] == [copies, copies, again, again]
    assert [entry for entry in engine.log if isinstance(entry, int)] == [0, 0 if shares else held]


@pytest.mark.parametrize("before", [True, False], ids=["compiled before", "by the trainer"])
def test_the_memory_plan_is_made_for_log_probabilities(trainer, build_model, before):
    model = build_model()
    if before:
        fastft.compile(model, plan="10MB", batch=(2, 16))
    planned = get_state(trainer(GivenRollouts(), model=model, compile=True).model).compiled.planned
    assert (planned.setup.head, planned.setup.answers) == ("logprobs", 4 * 8)
    assert planned.largest == ((2, 16) if before else (4, planned.setup.length))
    assert planned.setup.length == (16 if before else 8 + len(PROMPTS[0].split()))
    fresh = solve(planned.setup, planned.budget) if before else None
    assert not before or planned.modes == fresh.modes


def test_reference_is_the_model_without_its_adapter(trainer, build_model, tokenizer):
    """KL of the first step, by hand from the logits; no second adapter, and the model's own forward afterwards."""
    model, engine = build_model(), GivenRollouts()
    made = trainer(engine, model=model, beta=0.1, max_steps=1, prompts=PROMPTS[:1])
    total = count = 0.0
    prompt = tokenizer(PROMPTS[0])["input_ids"]
    for place in range(4):
        ids = engine.completion(prompt, place, made.sampling()).ids
        whole = torch.tensor([prompt + list(ids)])
        with torch.no_grad():
            new = model(whole).logits.log_softmax(-1)
            with model.disable_adapter():
                old = model(whole).logits.log_softmax(-1)
        for place, token in enumerate(ids, start=len(prompt) - 1):
            gap = (old - new)[0, place, token].item()
            total += torch.tensor(gap).exp().item() - gap - 1
            count += 1
    made.train()
    assert made.state.log_history[0]["kl"] == pytest.approx(total / count, rel=1e-4)
    assert list(model.peft_config) == ["default"]
    assert "forward" not in model.__dict__ and "forward" not in model.get_base_model().__dict__


def test_difference_is_measured(trainer):
    """Log-probabilities of -1 from an engine, against the trainer's: mean, max and KL by hand."""
    made = trainer(GivenRollouts(logprob=-1.0), max_logprob_difference=None, max_steps=1)
    batches = []
    own = made._compute_loss
    made._compute_loss = lambda model, inputs: batches.append(inputs) or own(model, inputs)
    made.train()
    inputs, row = batches[0], made.state.log_history[0]
    assert inputs["importance_sampling_ratio"].shape == (4, 1)  # TRL's correction had what it needs
    gap = (inputs["old_per_token_logps"] + 1.0)[inputs["completion_mask"].bool()]
    assert row["logprob_difference/mean"] == pytest.approx(gap.abs().mean().item(), rel=1e-5)
    assert row["logprob_difference/max"] == pytest.approx(gap.abs().max().item(), rel=1e-5)
    assert row["logprob_difference/kl"] == pytest.approx((gap.exp() - gap - 1).mean().item(), rel=1e-5)
    assert row["logprob_difference/mean"] > 1.0


def test_difference_beyond_the_bound_is_an_error(trainer):
    made = trainer(GivenRollouts(logprob=-1.0))
    before = trained(made.model)
    with pytest.raises(EngineError, match=r"differ from the trainer's by .*max_logprob_difference=0\.25.*last weights"):
        made.train()
    assert all(torch.equal(value, before[name]) for name, value in trained(made.model).items())


class OneApart(GivenRollouts):
    """Near the trainer but for the completions of one prompt, whose log-probabilities are lower by `by`."""

    def __init__(self, by):
        super().__init__(-math.log(96))
        self.by, self.first = by, None

    def completion(self, prompt, place, sampling):
        made = super().completion(prompt, place, sampling)
        self.first = self.first or prompt
        return evolve(made, logprobs=[value - self.by * (prompt == self.first) for value in made.logprobs])


@pytest.mark.parametrize("by", [0.5, 1.5])
def test_the_bound_is_held_against_the_mean_over_an_update(trainer, by):
    """Four micro-batches of a prompt each, one of them beyond the bound; with the larger gap their mean is, too."""
    made = trainer(OneApart(by), gradient_accumulation_steps=4, max_steps=1)
    before, gaps, own = trained(made.model), [], made._compute_loss

    def look(model, inputs):
        loss = own(model, inputs)
        gap = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]).abs()
        gaps.append(gap[inputs["completion_mask"].bool()])
        return loss

    made._compute_loss = look
    if by == 0.5:
        made.train()
    else:
        with pytest.raises(EngineError, match="differ from the trainer's by") as caught:
            made.train()
        assert all(torch.equal(value, before[name]) for name, value in trained(made.model).items())
        mean = float(str(caught.value).split("differ from the trainer's by ")[1].split()[0])
        assert mean == pytest.approx(torch.cat(gaps).mean().item(), rel=1e-2)
    each = sorted(gap.mean().item() for gap in gaps)
    assert len(each) == 4 and each[2] < 0.25 < each[3]
    assert (torch.cat(gaps).mean() > 0.25) == (by == 1.5)


@pytest.mark.parametrize(("mean", "other", "beyond"), [(0.9, 0.1, False), (0.1, 0.9, True)])
def test_every_process_judges_all_of_them(trainer, mean, other, beyond):
    """Of this process 10 tokens, of the other 30: both go on, or both stop."""
    made = as_second(trainer(GivenRollouts(), max_logprob_difference=0.5))
    made.accelerator.gather = lambda row: torch.cat([row, torch.tensor([[other, other, 0.0, 30.0]])])
    made._differences = [rollouts.Difference(mean, mean, 0.0, 4), rollouts.Difference(mean, mean, 0.0, 6)]
    with pytest.raises(EngineError, match=r"by 0\.7 .*40 tokens") if beyond else contextlib.nullcontext():
        made._judge_update()


def test_differences_of_parts_are_together_those_of_all_tokens():
    generator = torch.Generator().manual_seed(3)
    trainer, engine = (torch.randn(6, 5, generator=generator) - 2 for _ in range(2))
    mask = (torch.arange(5) < torch.tensor([5, 1, 0, 3, 2, 4])[:, None]).long()
    engine[4, 0] = math.nan  # a token of which the engine says nothing
    parts = [rollouts.difference(trainer[row], engine[row], mask[row]) for row in range(6)]
    found, whole = rollouts.together(parts), rollouts.difference(trainer, engine, mask)
    assert (found.mean, found.max, found.kl) == pytest.approx((whole.mean, whole.max, whole.kl), rel=1e-6)
    assert found.tokens == whole.tokens == 14
    assert rollouts.together([]).mean == 0.0
    nothing = rollouts.difference(trainer[4], torch.full_like(engine[4], math.nan), mask[4])
    assert math.isnan(rollouts.together([*parts, nothing]).mean)  # a whole part is not lost in the mean
    trainer[5, 0] = math.nan  # of the trainer it is a number that no bound lets pass
    lost = rollouts.together([*parts[:5], rollouts.difference(trainer[5], engine[5], mask[5])])
    assert math.isnan(lost.mean) and math.isnan(lost.max)


def test_a_cut_off_distribution_may_be_higher_than_the_trainers():
    trainer, engine = torch.full((2, 3), -2.0), torch.full((2, 3), -1.0)
    mask = torch.ones(2, 3)
    assert rollouts.difference(trainer, engine, mask).mean == 1.0
    assert rollouts.difference(trainer, engine, mask, truncated=True).mean == 0.0
    assert rollouts.difference(engine, trainer, mask, truncated=True).mean == 1.0
    engine[0, 0] = float("nan")
    assert rollouts.difference(trainer, engine, mask).tokens == 5


def test_an_engine_that_says_no_number_at_all_is_refused():
    nothing, found = torch.full((2, 3), math.nan), torch.full((2, 3), -2.0)
    with pytest.raises(EngineError, match=r"nan nats a token .* 0 tokens"):
        rollouts.refuse_difference(rollouts.difference(found, nothing, torch.ones(2, 3)), 0.25, "given")
    rollouts.refuse_difference(rollouts.difference(found, nothing, torch.zeros(2, 3)), 0.25, "given")


def test_transformers_engine_agrees_with_the_trainer(trainer):
    """Sampled and trained by the same model in fp32: equal to rounding, over lengths that need padding."""
    made = trainer("transformers", prompts=["w1", "w2 w3 w4 w5", *PROMPTS], max_steps=3, per_device_train_batch_size=8)
    made.train()
    assert max(row["logprob_difference/max"] for row in rows_of(made.args.output_dir) if "loss" in row) < 1e-5
