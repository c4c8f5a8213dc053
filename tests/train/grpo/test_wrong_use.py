"""What GRPO refuses, and how it is told."""

import functools
import re

import pytest
from datasets import Dataset
from grpo_runs import PROMPTS, GivenRollouts, even
from transformers import AutoModelForSequenceClassification

import fastft
from fastft.errors import DataError, UsageError
from fastft.rewards import combine, length, number
from fastft.rewards.texts import of_texts
from fastft.train.grpo import checks
from fastft.train.grpo.config import GRPOConfig
from fastft.train.grpo.prompts import prompt_datasets
from fastft.train.grpo.trainer import GRPOTrainer


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"per_device_train_batch_size": 4, "num_generations": 8}, "gradient_accumulation_steps=2"),
        ({"per_device_train_batch_size": 4, "num_generations": 8}, "per_device_train_batch_size=8"),
        ({"per_device_train_batch_size": 4, "num_generations": 8}, "num_generations=4"),
        ({"per_device_train_batch_size": 6, "steps_per_generation": 3, "num_generations": 4}, "steps_per_generation=4"),
        ({"generation_batch_size": 20, "num_generations": 8}, "generation_batch_size=24"),
    ],
)
def test_what_does_not_divide_is_told_with_numbers_that_do(config, fields, told):
    with pytest.raises(UsageError, match=re.escape(told)):
        GRPOConfig(**{**config, **fields})
    name, value = told.split("=")
    GRPOConfig(**{**config, **fields, name: int(value)})


def test_mistakes_are_told_together(config):
    with pytest.raises(UsageError) as caught:
        GRPOConfig(**{**config, "num_generations": 3, "loss_type": "grop", "temperature": 0, "use_liger_kernel": True})
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    for part in ("num_generations=3", "did you mean 'grpo'", "temperature", "use_liger_kernel"):
        assert part in text


def test_whole_numbers_are_told_with_all_else(config):
    wrong = {
        "per_device_train_batch_size": 2.5,
        "num_iterations": 1.5,
        "learning_rate": -1,
        "max_steps": 1.5,
        "beta": -1,
    }
    with pytest.raises(UsageError) as caught:
        GRPOConfig(**{**config, **wrong})
    assert sorted(problem.where for problem in caught.value.problems) == sorted(f"GRPOConfig {name}" for name in wrong)
    with pytest.raises(UsageError) as caught:
        GRPOConfig(**{**config, "num_generations": 3, "temperature": 0, "learning_rate": -1})
    assert len(caught.value.problems) == 3


def test_trainer_tells_what_is_missing_together(config, build_model):
    with pytest.raises(UsageError) as caught:
        GRPOTrainer(build_model(), [], GRPOConfig(**config, reward_weights=[1.0]))
    told = str(caught.value)
    for part in ("reward_funcs", "reward_weights", "train_dataset", "processing_class"):
        assert part in told


def test_rewards_that_are_none_are_told_before_anything_is_sampled(trainer, monkeypatch):
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", None)  # which TRL calls with a name
    with pytest.raises(UsageError) as caught:
        trainer(rewards=["right", 7, even], reward_weights=[1.0])
    assert [problem.where for problem in caught.value.problems] == [
        "rewards[1]",
        "rewards[0]",
        "GRPOConfig reward_weights",
    ]
    assert "Pass the function itself, not its name" in str(caught.value)
    with pytest.raises(UsageError, match=r"number: column: expected one of the data's columns \('answers'\)") as caught:
        rows = [{"prompt": prompt, "answers": 1} for prompt in PROMPTS]
        trainer(prompts=rows, rewards=[number("answer"), combine({number("answer"): 1.0}), length(limit=3)])
    assert len(caught.value.problems) == 2 and "did you mean 'answers'?" in str(caught.value)


def test_a_reward_that_takes_no_other_names_is_told_before_anything_is_sampled(trainer):
    def short(prompts, completions, answer=None):
        return [0.0] * len(completions)

    with pytest.raises(UsageError, match=r"'short\(prompts, completions, answer=None\)'.*end it with \*\*columns"):
        trainer(rewards=[short, even])


def asks(prompts, completions, anwser, **columns):
    return [float(wanted in text) for text, wanted in zip(completions, anwser, strict=True)]


async def later(prompts, completions, *, anwser, trainer_state, **columns):
    return asks(prompts, completions, anwser)


class Asking:
    def __call__(self, prompts, completions, completion, **columns):
        return [0.0 for _ in completions]


def bringing(function):
    """Decorate a function so that it gets what it asks for, whatever the data have."""

    @functools.wraps(function)
    def with_answers(prompts, completions, **columns):
        return function(prompts, completions, anwser=["w1"] * len(completions))

    return with_answers


def test_a_reward_that_asks_for_no_column_of_the_data_is_told_before_anything_is_sampled(
    trainer, build_model, tokenizer, config
):
    rows = [{"prompt": prompt, "answer": "w1"} for prompt in PROMPTS]
    wrong = [asks, functools.partial(asks), combine({asks: 0.5}), later, Asking()]
    with pytest.raises(UsageError) as caught:
        trainer(prompts=rows, rewards=wrong)
    names = ["asks", "asks", "asks", "later", "Asking"]
    assert [problem.where for problem in caught.value.problems] == [f"{name}: parameter" for name in names]
    expected = "expected prompts, completions or one of the data's columns ('answer'), got"
    assert str(caught.value.problems[0]) == f"asks: parameter: {expected} 'anwser'. did you mean 'answer'?"
    assert str(caught.value.problems[4]) == f"Asking: parameter: {expected} 'completion'. did you mean 'completions'?"
    with pytest.raises(UsageError, match=r"asks: parameter: expected prompts, completions or one of the data's"):
        fastft.grpo(build_model(), tokenizer, rows, asks, config["output_dir"], engine=GivenRollouts(), generations=4)


def test_rewards_that_are_given_what_they_ask_for_are_taken(trainer):
    rows = [{"prompt": prompt, "answer": "w1"} for prompt in PROMPTS]

    def given(
        prompts, completions, answer, completion_ids, trainer_state, log_extra, log_metric, anwser=None, **columns
    ):
        return [0.0 for _ in completions]

    decorated = bringing(asks)
    rewards = [given, functools.partial(asks, anwser="w1"), decorated, of_texts(decorated), of_texts(given)]
    assert len(trainer(prompts=rows, rewards=rewards).reward_funcs) == 5


def test_what_a_rollout_function_gives_beside_is_not_known():
    """Its further entries come to the rewards by their names, as columns do."""
    rows = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    with pytest.raises(UsageError, match="asks: parameter"):
        checks.refuse_columns([asks], {"train_dataset": rows})
    checks.refuse_columns([asks, number("score")], {"train_dataset": rows, "rollout_func": print})


def test_one_reward_alone(build_model, tokenizer, config):
    options = {"engine": GivenRollouts(), "compile": False, "generations": 4, "max_new_tokens": 4, "steps": 1}
    result = fastft.grpo(build_model(), tokenizer, PROMPTS, even, config["output_dir"], disable_tqdm=True, **options)
    assert result.record["rewards"] == ["even"] and len(result.rewards) == 1
    with pytest.raises(DataError, match=r"into a list: prompts=\['What is 1 \+ 1\?'\]"):
        fastft.grpo(build_model(), tokenizer, "What is 1 + 1?", even, config["output_dir"], **options)
    with pytest.raises(DataError) as caught:
        fastft.grpo(build_model(), tokenizer, [1, 2, "w1"], even, config["output_dir"], **options)
    assert [problem.where for problem in caught.value.problems] == ["prompts[0]", "prompts[1]"]
    with pytest.raises(UsageError) as caught:
        fastft.grpo(
            build_model(), tokenizer, PROMPTS, even, config["output_dir"], generations="4", batch_size=2.0, accumulate=2
        )
    wrong = ["grpo generations", "grpo batch_size"]
    assert [problem.where for problem in caught.value.problems] == wrong


def test_sampling_that_cannot_be_meant_is_told_before_anything_is_moved(config, tmp_path):
    wrong = {"top_p": 1.5, "top_k": -3, "min_p": 2.0, "repetition_penalty": 0.0}
    with pytest.raises(UsageError) as caught:
        GRPOConfig(**config | wrong)
    assert [(problem.where, problem.value) for problem in caught.value.problems] == [
        (f"GRPOConfig {name}", value) for name, value in wrong.items()
    ]
    GRPOConfig(**config | {"top_p": 0.9, "top_k": 0, "min_p": None, "reward_weights": [1, 0.5]})
    for weights in (["a"], 2.0, "ab", [True]):
        with pytest.raises(UsageError, match="reward_weights: expected a list of numbers, one of each reward"):
            GRPOConfig(**config | {"reward_weights": weights})


def test_a_switch_is_told_before_anything_goes_by_it(config):
    with pytest.raises(UsageError) as caught:
        GRPOConfig(**config | {"use_vllm": "no", "mask_truncated_completions": "yes"})
    wrong = ["GRPOConfig use_vllm", "GRPOConfig mask_truncated_completions"]
    assert sorted(problem.where for problem in caught.value.problems) == sorted(wrong)


def test_merging_wants_a_memory_plan(trainer):
    with pytest.raises(UsageError, match=r"merge_micro_batches: expected None or False with compile=False, got True"):
        trainer(merge_micro_batches=True, compile=False)


def test_prompts_that_cannot_be_used(trainer, build_model):
    with pytest.raises(DataError, match=r"at least the 2 of one generation"):
        trainer(prompts=PROMPTS[:1], gradient_accumulation_steps=2)
    with pytest.raises(DataError, match=r"3 \+ 126 tokens"):
        trainer(max_completion_length=126)
    with pytest.raises(DataError, match=r"a column 'prompt'.*rename_column\('question', 'prompt'\) renames one"):
        trainer(prompts=[{"question": "w1"}])
    with pytest.raises(DataError, match=r"train row 1, prompt.*(?s:.*)train row 2"):
        trainer(prompts=[{"prompt": "w1"}, {"prompt": ""}, {"prompt": 3}])


def test_prompts_of_a_file_are_named_by_file_and_line(tokenizer, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "w1"}\n\n{"prompt": " "}\n')
    with pytest.raises(DataError, match=r"prompts.jsonl, line 3, prompt: expected a text that is not empty"):
        prompt_datasets({"prompts": path}, tokenizer)


def test_unknown_names_are_told(config, build_model, tokenizer):
    with pytest.raises(UsageError, match=r"num_generation'; did you mean 'num_generations'"):
        GRPOConfig(**config, num_generation=4)
    with pytest.raises(UsageError, match=r"reward_fn"):
        GRPOTrainer(build_model(), [even], GRPOConfig(**config), reward_fn=even)
    with pytest.raises(UsageError, match=r"'plan'; fastft\.compile\(model, plan=\.\.\.\) takes it, before"):
        fastft.grpo(build_model(), tokenizer, PROMPTS, [even], config["output_dir"], plan="keep")
    with pytest.raises(UsageError, match=r"engine.*'transformer'"):
        fastft.grpo(
            build_model(), tokenizer, PROMPTS, [even], config["output_dir"], engine="transformer", max_new_tokens=8
        )
