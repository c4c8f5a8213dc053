"""Rewards that see texts where a trainer hands them messages."""

import asyncio
import functools
import inspect

import pytest
import torch

from fastft.rewards import combine, guard, number
from fastft.rewards.guarding import Guarded, GuardedAsync, calls_of, columns_of
from fastft.rewards.texts import of_texts

PROMPTS = [[{"role": "user", "content": "1 + 1?"}], [{"role": "user", "content": "2 + 2?"}]]
COMPLETIONS = [[{"role": "assistant", "content": " 2 "}], [{"role": "assistant", "content": "3"}]]


def stripped(prompts, completions, answer, **columns):
    texts = zip(prompts, completions, answer, strict=True)
    return [float(prompt.endswith("?") and completion.strip() == wanted) for prompt, completion, wanted in texts]


async def later(prompts, completions, **columns):
    return stripped(prompts, completions, **columns)


class Scorer:
    column = "answer"

    def __call__(self, prompts, completions, **columns):
        return stripped(prompts, completions, **columns)


@pytest.mark.parametrize(
    "function", [stripped, Scorer(), functools.partial(stripped)], ids=["def", "object", "partial"]
)
def test_texts_of_messages_are_handed_on_with_everything_else(function):
    made = of_texts(function)
    for prompts, completions in ((PROMPTS, COMPLETIONS), (["1 + 1?", "2 + 2?"], [" 2 ", "3"])):
        assert made(prompts=prompts, completions=completions, answer=["2", "4"]) == [1.0, 0.0]
    assert inspect.signature(made) == inspect.signature(function)
    assert made.__name__ == ("Scorer" if isinstance(function, Scorer) else "stripped")


def test_an_async_reward_stays_one():
    (guarded,) = guard([of_texts(later)])
    assert isinstance(guarded, GuardedAsync)
    assert asyncio.run(guarded(prompts=PROMPTS, completions=COMPLETIONS, answer=["2", "4"])) == [1.0, 0.0]
    assert guarded.last.failures == 0


def test_what_trainers_ask_of_a_reward_is_as_before():
    """Its name, the columns that it looks at, and the figures of a sum's parts."""
    plain = [number("answer"), combine({number("answer"): 1.0, stripped: 0.5}, name="both")]
    made = guard([of_texts(function) for function in plain])
    assert columns_of(made) == columns_of(plain) == [("number", "answer"), ("number", "answer")]
    assert [function.__name__ for function in made] == ["number", "both"]
    assert made[1](prompts=PROMPTS, completions=COMPLETIONS, answer=["2", "4"]) == [1.5, 0.0]
    assert [name for name, _ in calls_of(made)] == ["both", "number", "stripped"]


def test_one_under_guard_has_the_same_guard_and_figures_of_its_own():
    (given,) = guard([stripped], failing_calls=1, time_limit=5.0)
    made = of_texts(given)
    assert isinstance(made, Guarded) and (made._failing_calls, made._time_limit) == (1, 5.0)
    assert made(prompts=PROMPTS, completions=COMPLETIONS, answer=["2", "4"]) == [1.0, 0.0]
    assert made.last.failures == 0 and given.last is None and made.__name__ == "stripped"


def test_models_and_what_is_no_function_stay():
    for other in (torch.nn.Linear(2, 1), "owner/scorer", 3, None):
        assert of_texts(other) is other


@pytest.mark.parametrize("parts", [3, "abc", None, [number()]], ids=["number", "text", "none", "list"])
def test_other_things_that_a_reward_calls_parts_are_no_rewards(parts):
    from fastft.train.grpo.measured import _logs

    class Object:
        def __init__(self):
            self.parts = parts

        def __call__(self, prompts, completions, **columns):
            return [1.0 for _ in completions]

    (guarded,) = guard([Object()])
    assert guarded(["a"], ["b"]) == [1.0]
    assert [name for name, _ in calls_of([guarded])] == ["Object"]
    assert columns_of([guarded, Object()]) == [] and not _logs(guarded)
