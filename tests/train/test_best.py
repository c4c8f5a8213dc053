"""The best weights: by what an evaluation gives, which is known before it, in every trainer."""

import functools
import json
from pathlib import Path

import pytest
from grpo_runs import PROMPTS, GivenRollouts, even
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback

import fastft
from fastft import rewards
from fastft.errors import UsageError
from fastft.train.grpo.measured import measured
from fastft.train.preference.config import MEASURED
from fastft.train.sft.config import MEASURED as OF_SFT

WORDS = [("w1 w2", " w3", " w4 w5"), ("w6", " w7 w8", " w9"), ("w2 w4", " w8", " w1"), ("w3", " w5", " w7")]
PAIRS = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in WORDS]
ROWS = [{"text": f"{prompt}{chosen}{rejected}"} for prompt, chosen, rejected in WORDS]
COMMON = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_num_tokens", "eval_num_targets"}
METHODS = ("dpo", "kto", "orpo", "cpo")
TRAINERS = {
    "sft": (fastft.SFTTrainer, fastft.SFTConfig),
    "dpo": (fastft.DPOTrainer, fastft.DPOConfig),
    "kto": (fastft.KTOTrainer, fastft.KTOConfig),
    "orpo": (fastft.ORPOTrainer, fastft.ORPOConfig),
    "cpo": (fastft.CPOTrainer, fastft.CPOConfig),
    "grpo": (fastft.GRPOTrainer, fastft.GRPOConfig),
}


@pytest.fixture
def made(build_model, tokenizer, tmp_path):
    """Make a trainer of a method that evaluates, with other settings or data."""

    def make(method, kind=None, eval=None, functions=(even,), more=None, **changes):
        own, config = TRAINERS[method]
        if method == "grpo":
            plain = {"num_generations": 2, "max_completion_length": 4, "max_logprob_difference": None}
            changes = {**plain, **changes}
            given, rows = (
                {"reward_funcs": list(functions), "engine": GivenRollouts(logprob=-4.5)},
                [{"prompt": prompt} for prompt in PROMPTS],
            )
        else:
            given, rows = {}, ROWS if method == "sft" else PAIRS
        args = config(
            str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=2, per_device_eval_batch_size=8, bf16=False,
            use_cpu=True, eval_strategy="steps", eval_steps=1, logging_steps=1, disable_tqdm=True, report_to="none",
            **{"save_strategy": "no", **changes},
        )  # fmt: skip
        return (kind or own)(
            build_model(), args=args, train_dataset=rows, eval_dataset=eval or rows, processing_class=tokenizer,
            compile=False, **{**given, **(more or {})},
        )  # fmt: skip

    return make


def given_by(trainer):
    """The metrics of an evaluation, without those of its speed."""
    trainer.train()
    lines = (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()
    (row,) = (row for row in map(json.loads, lines) if "eval_loss" in row)
    return {name.removeprefix("eval_") for name in row if name.startswith("eval_") and name not in COMMON}


@pytest.mark.parametrize("method", METHODS)
def test_what_an_evaluation_of_preferences_gives_is_known_before(method, made):
    assert given_by(made(method)) == {*MEASURED[method].of_each, *MEASURED[method].logged}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta": 0.1},
        {"loss_type": "cispo"},
        {"loss_type": "sapo"},
        {"loss_type": "vespo"},
        {"entropy_coef": 0.01},
        {"use_adaptive_entropy": True},
        {"vllm_importance_sampling_correction": False},
        {"vllm_importance_sampling_mode": "token_truncate"},
    ],
    ids=str,
)
def test_what_an_evaluation_of_grpo_gives_is_known_before(changes, made):
    trainer = made("grpo", **{"vllm_importance_sampling_mode": "token_mask", **changes})
    known = measured(trainer.args, [even], {}, trainer.engine)
    assert given_by(trainer) == {*known.of_each, *known.logged}


@pytest.mark.parametrize("engine", [GivenRollouts(), "transformers"], ids=["given", "transformers"])
def test_what_an_evaluation_of_grpo_gives_of_an_engines_log_probabilities(engine, made):
    """Those of the engine "transformers" are the weights' own: nothing is corrected for them."""
    trainer = made("grpo", more={"engine": engine})
    known = measured(trainer.args, [even], {}, engine)
    of_engine = {name for name in known.logged if name.startswith(("logprob_difference/", "sampling/"))}
    kinds = {name.partition("/")[0] for name in of_engine}
    given = given_by(trainer)
    if engine == "transformers":
        assert kinds == {"logprob_difference"} and of_engine < given
        with pytest.raises(UsageError, match=r"got 'sampling/importance_sampling_ratio/max'"):
            made("grpo", more={"engine": engine}, metric_for_best_model="sampling/importance_sampling_ratio/max")
    else:
        assert kinds == {"logprob_difference", "sampling"} and not of_engine & given
        made("grpo", metric_for_best_model="sampling/importance_sampling_ratio/max")
    assert given | of_engine == {*known.of_each, *known.logged}


@pytest.mark.parametrize("method", METHODS)
def test_a_metric_that_no_evaluation_of_preferences_gives(method, made):
    with pytest.raises(UsageError) as caught:
        made(method, metric_for_best_model="rewards/margin")
    known = ", ".join(f"eval_{name}" for name in ("loss", *MEASURED[method].logged))
    assert str(caught.value) == (
        f"{TRAINERS[method][1].__name__} metric_for_best_model: expected what an evaluation gives: {known}, got "
        "'rewards/margin'. did you mean 'rewards/margins'?"
    )
    for name in ("rewards/margins", "eval_rewards/margins", "loss"):
        made(method, metric_for_best_model=name)


def test_a_metric_that_no_evaluation_of_grpo_gives(made):
    with pytest.raises(UsageError, match=r"GRPOConfig metric_for_best_model: .*, got 'rewards'\. .*names log_metric"):
        made("grpo", metric_for_best_model="rewards")
    with pytest.raises(UsageError, match=r"got 'kl'"):  # nothing is measured against a reference
        made("grpo", metric_for_best_model="kl")
    made("grpo", metric_for_best_model="kl", beta=0.1)
    made("grpo", metric_for_best_model="rewards/even/mean")


def test_a_reward_with_parameters_is_no_model(made):
    class Scaled:
        def __init__(self):
            self.parameters = {"scale": 2.0}

        def __call__(self, completions, **columns):
            return [self.parameters["scale"] * len(one) for one in completions]

    made("grpo", functions=[Scaled()])
    made("grpo", functions=[Scaled()], metric_for_best_model="rewards/Scaled/mean")


def counting(completions, log_metric, scale=1.0, **columns):
    log_metric("words", float(len(completions)))
    return [scale * len(one) for one in completions]


@pytest.mark.parametrize(
    "reward",
    [
        counting,
        *rewards.guard([counting]),
        functools.partial(counting, scale=2.0),
        *rewards.guard([functools.partial(counting, scale=2.0)]),
        functools.partial(*rewards.guard([counting]), scale=2.0),
        rewards.combine({counting: 1.0, even: 2.0}),
    ],
    ids=["plain", "guarded", "partial", "guarded-partial", "partial-guarded", "sum"],
)
def test_a_metric_that_a_reward_logs_itself(reward, made):
    trainer = made("grpo", functions=[reward], metric_for_best_model="words", greater_is_better=True)
    assert "words" in given_by(trainer)


def test_metrics_of_several_data_sets(made):
    """The loss of each has its name; what TRL logs beside it has none."""
    with pytest.raises(UsageError, match=r"gives: eval_a_loss, eval_b_loss, eval_rewards/margins, .*, got 'loss'"):
        made("dpo", eval={"a": PAIRS, "b": PAIRS}, metric_for_best_model="loss")
    named = made("dpo", eval={"a": PAIRS, "b": PAIRS}, metric_for_best_model="b_loss")
    found = named.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_rewards/margins"} < found.keys()


def test_metrics_of_the_users_own_are_not_known_before(made):
    class Own(fastft.DPOTrainer):
        """May add metrics."""

    made("dpo", kind=Own, metric_for_best_model="mine", greater_is_better=True)
    computed = {"compute_metrics": lambda prediction: {"mine": 1.0}}
    made("dpo", more=computed, metric_for_best_model="mine", greater_is_better=True)


class Adding(TrainerCallback):
    """Adds a metric to those of an evaluation."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_mine"] = 0.25


@pytest.mark.parametrize("callback", [Adding, Adding()], ids=["class", "instance"])
def test_metrics_that_a_callback_adds_are_not_known_before(callback, made):
    saved = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "greater_is_better": True}
    trainer = made("dpo", more={"callbacks": [callback]}, metric_for_best_model="mine", **saved)
    trainer.train()
    assert trainer.state.best_metric == 0.25 and trainer.recorder.record["best"]["metric"] == "eval_mine"


def test_callbacks_that_add_no_metrics_change_nothing(made):
    class Watching(EarlyStoppingCallback):
        def on_log(self, args, state, control, **kwargs):
            pass

    known = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "greater_is_better": True}
    for callbacks in ([Watching()], [PrinterCallback], [EarlyStoppingCallback(2)], None):
        with pytest.raises(UsageError, match=r"metric_for_best_model: .*, got 'mine'"):
            made("dpo", more={"callbacks": callbacks}, metric_for_best_model="mine", **known)


def test_what_sft_gives_has_the_name_of_its_data_set_throughout(made):
    found = made("sft", eval={"a": ROWS, "b": ROWS[:2]}).evaluate()
    speed = {*COMMON, "eval_model_preparation_time"}  # the latter of an evaluation before training
    kinds = (*OF_SFT.of_each, *OF_SFT.logged)
    beside = {f"eval_{name}_{kind.removeprefix('eval_')}" for name in "ab" for kind in speed}
    assert set(found) - beside - {"epoch"} == {f"eval_{name}_{kind}" for name in "ab" for kind in kinds}
    for kind in kinds:
        made("sft", eval={"a": ROWS, "b": ROWS}, metric_for_best_model=f"eval_b_{kind}")
        with pytest.raises(UsageError, match=f"gives: eval_a_loss, .*, got 'eval_{kind}'"):
            made("sft", eval={"a": ROWS, "b": ROWS}, metric_for_best_model=f"eval_{kind}")
