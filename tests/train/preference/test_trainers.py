"""DPO, KTO, ORPO, CPO and SimPO: losses, metrics and gradients are TRL's own, without its logits."""

import copy
import dataclasses
import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastft
from fastft.demo import MODEL_FOLDER
from fastft.errors import DataError, UsageError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental import cpo, orpo

TRAINERS = {
    "dpo": (fastft.DPOTrainer, fastft.DPOConfig, trl.DPOTrainer, trl.DPOConfig),
    "kto": (fastft.KTOTrainer, fastft.KTOConfig, trl.KTOTrainer, trl.KTOConfig),
    "orpo": (fastft.ORPOTrainer, fastft.ORPOConfig, orpo.ORPOTrainer, orpo.ORPOConfig),
    "cpo": (fastft.CPOTrainer, fastft.CPOConfig, cpo.CPOTrainer, cpo.CPOConfig),
}
DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
    "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
CASES = {
    **{f"dpo {loss}": ("dpo", {"loss_type": [loss], "beta": 0.3}) for loss in DPO_LOSSES},
    "dpo exo": ("dpo", {"loss_type": ["exo_pair"], "label_smoothing": 0.1}),
    "dpo robust": ("dpo", {"loss_type": ["robust"], "label_smoothing": 0.1}),
    "dpo mixed": ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.5]}),
    "dpo weighted": ("dpo", {"use_weighting": True}),
    "dpo length": ("dpo", {"ld_alpha": 0.4}),
    "dpo alpha": ("dpo", {"f_divergence_type": "alpha_divergence"}),
    "dpo precomputed": ("dpo", {"precompute_ref_log_probs": True}),
    "kto": ("kto", {"desirable_weight": 1.3}),
    "kto apo": ("kto", {"loss_type": "apo_zero_unpaired"}),
    "orpo": ("orpo", {"beta": 0.4}),
    "cpo": ("cpo", {"cpo_alpha": 0.5, "label_smoothing": 0.1}),
    "cpo hinge": ("cpo", {"loss_type": "hinge", "cpo_alpha": 0.0}),
    "cpo ipo": ("cpo", {"loss_type": "ipo"}),
    "simpo": ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}),
    "alphapo": ("cpo", {"loss_type": "simpo", "alpha": 0.2}),
}
MEAN_LOGITS = ("logits/chosen", "logits/rejected")


def pairs(count=8, seed=3):
    generator = torch.Generator().manual_seed(seed)

    def text(low, high):
        size = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(f"w{int(i)}" for i in torch.randint(0, 89, (size,), generator=generator))

    return [{"prompt": text(2, 9), "chosen": " " + text(1, 12), "rejected": " " + text(1, 12)} for _ in range(count)]


def fresh_model(build_model, lora):
    """A model whose adapter does nothing yet; its weights are large enough for losses to differ from ln 2."""
    model = build_model(lora=lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    return model


def move(model):
    """Change the trained weights, so that the model is not its reference."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def build(kind, ours, model, tokenizer, settings, options, **arguments):
    trainer_class, config_class, *theirs = TRAINERS[kind]
    extra: dict = {"compile": False} if ours else {}
    if not ours:
        trainer_class, config_class = theirs
        extra["train_dataset"] = Dataset.from_list(pairs())
    settings = {**settings, "per_device_train_batch_size": 4, "gradient_checkpointing": False, **options}
    args = config_class(**settings)
    given = {"train_dataset": pairs(), "processing_class": tokenizer, **extra, **arguments}
    return trainer_class(model, args=args, **given)


def measured(trainer):
    """Return loss, metrics and gradients of the first batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    batch = trainer._prepare_inputs(batch)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None and ".ref." not in name
    }
    stored = trainer._metrics if hasattr(trainer, "_metrics") else trainer._stored_metrics
    return loss.item(), {name: values[-1] for name, values in stored["train"].items()}, gradients


def compare(ours, theirs, left_out=()):
    (loss, metrics, gradients), (loss0, metrics0, gradients0) = measured(ours), measured(theirs)
    assert loss == pytest.approx(loss0, rel=2e-5, abs=1e-6)
    assert metrics.keys() == metrics0.keys()
    for name in metrics.keys() - set(left_out):
        assert metrics[name] == pytest.approx(metrics0[name], rel=1e-4, abs=2e-5), name
    assert gradients.keys() == gradients0.keys() and gradients
    for name, gradient in gradients.items():
        scale = gradients0[name].norm()
        assert (gradient - gradients0[name]).norm() <= 2e-4 * scale + 1e-7, name
    return loss


@pytest.mark.parametrize("case", CASES)
def test_loss_metrics_and_gradients_are_those_of_trl(case, build_model, tokenizer, settings):
    kind, options = CASES[case]
    made = [build(kind, ours, fresh_model(build_model, True), tokenizer, settings, options) for ours in (True, False)]
    for trainer in made:
        move(trainer.model)
    loss = compare(*made, left_out=MEAN_LOGITS if kind in ("orpo", "cpo") else ())
    assert loss != pytest.approx(0.6931, abs=1e-3)


# ---- the reference


def test_an_adapter_that_does_nothing_is_switched_off(build_model, tokenizer, settings):
    model = fresh_model(build_model, True)
    for name, parameter in model.named_parameters():
        if "layers.0" in name and "lora_A" in name:
            parameter.requires_grad_(False)  # a user's choice, which switching adapters must not undo
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer = build("dpo", True, model, tokenizer, settings, {})
    assert list(model.peft_config) == ["default"] and trainer.ref_model is None and not trainer.precompute_ref_logps
    measured(trainer)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert model.active_adapter == "default"


def test_a_start_that_is_refused_leaves_the_model_as_it_was(build_model, tokenizer, settings):
    model, losses = fresh_model(build_model, True), []
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with pytest.raises(DataError):
        build("dpo", True, model, tokenizer, {**settings, "max_length": 2}, {})
    assert list(model.peft_config) == ["default"] and model.active_adapter == "default"
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    for given in (model, fresh_model(build_model, True)):
        losses.append(measured(build("dpo", True, given, tokenizer, settings, {}))[0])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_trained_adapter_is_its_own_reference(kind, build_model, tokenizer, settings, capsys):
    """TRL keeps a frozen copy of it; here its log-probabilities are computed before training."""
    made = [build(kind, ours, build_model(), tokenizer, settings, {}) for ours in (True, False)]
    assert "the reference is the model as it is now" in capsys.readouterr().out
    assert "ref" not in made[0].model.peft_config and "ref" in made[1].model.peft_config
    for trainer in made:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(9)
            for name, parameter in trainer.model.named_parameters():
                if ".default." in name:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    compare(*made)
    with pytest.raises(UsageError, match="rows whose reference was computed before training"):
        made[0].evaluate(Dataset.from_list(pairs(seed=5)))


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("given", [False, True])
def test_all_weights(kind, given, build_model, tokenizer, settings):
    """Without a second model, and with one that is given, as TRL with one."""
    made = []
    for ours in (True, False):
        model, extra = build_model(lora=False), {}
        if kind in ("dpo", "kto") and (given or not ours):
            extra["ref_model"] = copy.deepcopy(model)
        made.append(build(kind, ours, model, tokenizer, settings, {}, **extra))
    assert kind not in ("dpo", "kto") or (made[0].ref_model is None) is not given
    for trainer in made:
        move(trainer.model)
    compare(*made, left_out=MEAN_LOGITS if kind in ("orpo", "cpo") else ())


# ---- whole runs


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_run_is_that_of_trl(kind, build_model, tokenizer, settings):
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 2, "max_length": 16}
    histories = []
    for ours in (True, False):
        trainer = build(kind, ours, fresh_model(build_model, True), tokenizer, settings, options)
        trainer.train()
        histories.append([row for row in trainer.state.log_history if "loss" in row])
    left_out = MEAN_LOGITS if kind in ("orpo", "cpo") else ()
    for ours, theirs in zip(*histories, strict=True):
        assert set(theirs) - set(ours) == set()
        for name in set(theirs) - set(left_out):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-5), name


@pytest.mark.parametrize("kind", TRAINERS)
def test_mean_logits_are_those_of_the_answers(kind, build_model, tokenizer, settings):
    trainer = build(kind, True, fresh_model(build_model, True), tokenizer, settings, {})
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    stored = trainer._metrics if hasattr(trainer, "_metrics") else trainer._stored_metrics
    if kind in ("orpo", "cpo"):
        ids, labels, mask = (batch[f"chosen_{name}"] for name in ("input_ids", "labels", "attention_mask"))
        present = labels[:, 1:] != -100
    else:
        rows = slice(4) if kind == "dpo" else batch["label"]
        ids, mask, present = batch["input_ids"][rows], batch["attention_mask"][rows], batch["completion_mask"][rows]
        present = present[:, 1:].bool()
    with torch.no_grad():
        logits = trainer.model(ids, attention_mask=mask).logits[:, :-1].mean(-1)
    assert stored["train"]["logits/chosen"][-1] == pytest.approx(logits[present].mean().item(), abs=1e-5)


@pytest.mark.parametrize("kind", TRAINERS)
def test_token_metrics_can_be_left_out_of_training(kind, build_model, tokenizer, settings):
    options = {"token_metrics": False, "max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = build(
        kind, True, fresh_model(build_model, True), tokenizer, settings, options, eval_dataset=pairs(4, seed=8)
    )
    trainer.train()
    trained, evaluated = (
        next(row for row in trainer.state.log_history if name in row) for name in ("loss", "eval_loss")
    )
    assert not {"entropy", "mean_token_accuracy", *MEAN_LOGITS} & trained.keys() and "rewards/chosen" in trained
    assert evaluated["eval_logits/chosen"] != 0 and math.isfinite(evaluated["eval_loss"])


# ---- memory


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("kind", TRAINERS)
def test_logits_are_never_whole(kind, build_model, tokenizer, settings):
    vocabulary, tokens = 16_384, 1200
    long = [{"prompt": "w1", "chosen": " w2" * 100, "rejected": " w3" * 100}] * 12
    options = {"per_device_train_batch_size": 12 if kind == "kto" else 6, "max_length": 128}

    def largest(ours):
        model = build_model(vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        rows = long if ours else Dataset.from_list(long)
        trainer = build(kind, ours, model, tokenizer, settings, options, train_dataset=rows)
        with Largest() as seen:
            measured(trainer)
        return seen.elements

    assert largest(True) < vocabulary * tokens / 3
    if kind == "orpo":  # the judge can fail
        assert largest(False) >= vocabulary * tokens


# ---- compiled, checkpointed, by name


def test_compiled_is_the_same(build_model, tokenizer, settings):
    losses = []
    for compiled in (True, False):
        model = fresh_model(build_model, True)
        if compiled:
            fastft.compile(model, backend="aot_eager")
        trainer = build("dpo", True, model, tokenizer, settings, {"max_steps": 3}, compile=compiled)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        if compiled:  # of the reference and of the update: the layers' (the first one's apart) and the last norm's
            assert [graph.gradients for graph in fastft.report(model).graphs] == [False, False, True, True, True]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][2] != pytest.approx(losses[0][0], rel=1e-3)


@pytest.mark.parametrize("kind", TRAINERS)
def test_resumed_runs_go_on_with_the_same_curve(kind, build_model, tokenizer, settings):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = build(kind, True, fresh_model(build_model, True), tokenizer, settings, options)
    whole.train()
    folder = f"{settings['output_dir']}/checkpoint-2"
    again = build(kind, True, fresh_model(build_model, True), tokenizer, settings, options)
    again.train(resume_from_checkpoint=folder)
    curves = [[row["loss"] for row in made.state.log_history if "loss" in row] for made in (whole, again)]
    assert curves[0][2:] == curves[1][2:] and len(curves[1]) == 4
    record = json.loads((Path(settings["output_dir"]) / "run.json").read_text())
    assert record["method"] == whole.METHOD and record["tokens"]["loss_bearing"] > 0


def test_scripts_of_older_versions(build_model, tokenizer, settings, capsys):
    """As they are written for Unsloth, with its import line exchanged."""
    from transformers import TrainingArguments

    from fastft import DPOConfig, DPOTrainer, ORPOConfig, ORPOTrainer

    arguments = {name: value for name, value in settings.items() if name != "max_length"}
    trainer = DPOTrainer(
        model=fresh_model(build_model, True),
        ref_model=None,
        args=TrainingArguments(**{**arguments, "per_device_train_batch_size": 2, "max_steps": 1}),
        beta=0.3,
        train_dataset=Dataset.from_list(pairs()),
        tokenizer=tokenizer,
        max_length=24,
        max_prompt_length=8,
        compile=False,
    )
    assert (trainer.beta, trainer.args.max_length, type(trainer.args)) == (0.3, 24, DPOConfig)
    trainer.train()
    out = capsys.readouterr().out
    assert "DPOTrainer(beta=...) is now DPOConfig(beta=...)" in out
    sizes = {"max_length": 24, "max_prompt_length": 12, "max_completion_length": 12, "beta": 0.1}
    args = ORPOConfig(**{**arguments, **sizes, "per_device_train_batch_size": 2, "max_steps": 1})
    model = fresh_model(build_model, True)
    trainer = ORPOTrainer(model=model, train_dataset=pairs(), tokenizer=tokenizer, args=args, compile=False)
    trainer.train()
    assert "ORPOConfig(max_completion_length=...) has no effect" in capsys.readouterr().out


def test_nothing_is_left_out_in_silence(build_model, tokenizer, settings, capsys):
    rows = [*pairs(4), {"prompt": "w1 " * 30, "chosen": " w2", "rejected": " w3"}]
    rows += [{"prompt": "w1 " * 70, "chosen": " w2", "rejected": " w3"}]
    rows += [{"prompt": "w1", "chosen": " w2" * 80, "rejected": " w3"}]
    for kind in TRAINERS:
        build(
            kind, True, fresh_model(build_model, True), tokenizer, settings, {"max_prompt_length": 20},
            train_dataset=rows,
        )  # fmt: skip
        out = capsys.readouterr().out
        assert "max_prompt_length=20" in out and "left out" in out, kind
        assert "what is longer is cut off" in out, kind
        assert kind != "dpo" or "1 of 7 rows have a prompt that fills max_length=64: left out" in out


@pytest.mark.parametrize("kind", ["orpo", "cpo"])
def test_rows_without_an_answer_are_left_out(kind, build_model, tokenizer, settings, capsys):
    """The mean over an answer of which `max_length` leaves nothing would be NaN, and so would every weight."""
    rows = [*pairs(3), {"prompt": "w1 " * 70, "chosen": " w2", "rejected": " w3"}]
    options = {"loss_type": "simpo"} if kind == "cpo" else {}
    trainer = build(kind, True, fresh_model(build_model, True), tokenizer, settings, options, train_dataset=rows)
    assert "train: 1 of 4 rows have a prompt that fills max_length=64: left out." in capsys.readouterr().out
    assert len(trainer.train_dataset) == 3
    assert math.isfinite(measured(trainer)[0])


def test_wrong_use(build_model, tokenizer, settings):
    model = fresh_model(build_model, True)
    with pytest.raises(UsageError, match="did you mean 'simpo'"):
        fastft.preference(model, tokenizer, pairs(), loss="simp")
    with pytest.raises(UsageError, match="'orpo' has no reference"):
        fastft.preference(model, tokenizer, pairs(), settings["output_dir"], loss="orpo", ref_model=model)
    with pytest.raises(UsageError, match=r"a fastft\.DPOConfig"):
        fastft.preference(model, tokenizer, pairs(), config=fastft.KTOConfig("x"), loss="dpo")
    with pytest.raises(UsageError, match="unknown argument 'betta'; did you mean 'beta'"):
        fastft.preference(model, tokenizer, pairs(), betta=1)
    with pytest.raises(DataError, match="'chosen', 'rejected'"):
        build("dpo", True, model, tokenizer, settings, {}, train_dataset=[{"prompt": "w1", "completion": "w2"}])
    stream = Dataset.from_list(pairs()).to_iterable_dataset()
    with pytest.raises(UsageError, match="stream"):
        build("dpo", True, build_model(), tokenizer, settings, {}, train_dataset=stream)
    with pytest.raises(UsageError, match="stream"):
        build("orpo", True, model, tokenizer, settings, {}, train_dataset=stream)
    with pytest.raises(UsageError, match=r"eval_dataset: expected one, got 'several data sets \(a, b\)'"):
        build("cpo", True, model, tokenizer, settings, {}, eval_dataset={"a": pairs(), "b": pairs()})


@pytest.mark.parametrize(
    ("loss", "options", "told"),
    [
        ("kto", {"loss_type": "ipo"},
         "preference loss_type: expected one of kto, apo_zero_unpaired, got 'ipo'. "
         "preference(loss='dpo') and preference(loss='cpo') have it."),
        ("dpo", {"loss_type": "sigmiod"}, "did you mean 'sigmoid'?"),
        ("dpo", {"loss_type": ["sigmoid", "kto"]}, "got 'kto'. preference(loss='kto') has it."),
        ("cpo", {"loss_type": "kto_pair"}, "expected one of sigmoid, hinge, ipo, simpo, alphapo, got 'kto_pair'"),
        ("dpo", {"loss_type": 5}, "or a list of some, got 5"),
        ("dpo", {"loss_type": []}, "or a list of some, got []"),
        ("kto", {"loss_type": 5}, "preference loss_type: expected one of kto, apo_zero_unpaired, got 5"),
        ("cpo", {"loss_type": ["sigmoid"]}, "one of sigmoid, hinge, ipo, simpo, alphapo, got ['sigmoid']"),
        ("dpo", {"beta": -1}, "preference beta: expected a finite number above 0, got -1"),
        ("kto", {"beta": 0.0}, "preference beta: expected a finite number above 0, got 0.0"),
        ("simpo", {"beta": "2"}, "preference beta: expected a finite number above 0, got '2'"),
        ("orpo", {"beta": -0.1}, "preference beta: expected a finite number of at least 0, got -0.1"),
    ],
)  # fmt: skip
def test_losses_that_there_are_not(loss, options, told, build_model, tokenizer, settings):
    with pytest.raises(UsageError) as caught:
        fastft.preference(build_model(), tokenizer, pairs(), settings["output_dir"], loss=loss, **options)
    assert len(caught.value.problems) == 1 and told in str(caught.value)


def test_the_losses_are_those_of_trl(tmp_path):
    from fastft.train.preference.config import LOSS_TYPES

    help = next(one for one in dataclasses.fields(trl.DPOConfig) if one.name == "loss_type").metadata["help"]
    assert set(LOSS_TYPES["dpo"]) == set(re.findall(r"`'(\w+)'`", help))
    for config, names in ((fastft.DPOConfig, "dpo"), (fastft.KTOConfig, "kto"), (fastft.CPOConfig, "cpo")):
        for name in LOSS_TYPES[names]:
            config(output_dir=str(tmp_path), loss_type=name)
    assert fastft.ORPOConfig(output_dir=str(tmp_path), beta=0).beta == 0


@pytest.mark.parametrize("loss", ["dpo", "kto", "orpo", "simpo"])
def test_preferred_answers_become_more_likely(loss, tmp_path):
    """The demo model learns to end its sums with a word it has not been taught to end them with."""
    model, tokenizer = fastft.load(MODEL_FOLDER)
    model = fastft.add_lora(model, r=8)
    rows = [
        {"prompt": f"What is {a} + 11?", "chosen": f"{a} + 11 = {a + 11}, matey!", "rejected": f"{a} + 11 = {a + 11}."}
        for a in range(10, 42)
    ]
    result = fastft.preference(
        model,
        tokenizer,
        rows[:24],
        tmp_path / "run",
        rows[24:],
        loss=loss,
        steps=8,
        batch_size=8,
        learning_rate=2e-3,
        eval_every=4,
        schedule="constant",
        compile=False,
    )
    history = json.loads((tmp_path / "run" / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    margins = [row["eval_rewards/margins"] for row in history if "eval_rewards/margins" in row]
    assert margins[1] > margins[0] > result.margins[0][1] and len(result.losses) == 8, (result.margins, margins)
    assert result.record["method"] == ("cpo" if loss == "simpo" else loss)
