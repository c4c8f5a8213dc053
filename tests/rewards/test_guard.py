"""Rewards that fail: function, row and value are named, the run goes on, and a hung one is an error in time."""

import asyncio
import functools
import logging
import math
import re
import signal
import threading
import time
import traceback

import pytest
import torch

from fastft.errors import RewardError, UsageError
from fastft.rewards import combine, guard
from fastft.rewards.guarding import Call

ROWS = {"prompts": ["p"] * 4, "completions": ["1", "0", "4", "x"]}


def inverse(prompts, completions, **columns):
    return [1 / int(text) for text in completions]


def of(function, **options):
    (guarded,) = guard([function], **options)
    return guarded


def test_an_exception_costs_its_own_rows(caplog):
    guarded = of(inverse)
    assert guarded(**ROWS, column=[1, 2, 3, 4]) == [1.0, None, 0.25, None]
    assert (guarded.last.rows, guarded.last.failures, guarded.last.missing) == (4, 2, 2)
    (record,) = caplog.records
    said = record.getMessage()
    assert record.levelno == logging.WARNING
    for part in ("'inverse'", "2 of 4 rows", "row 1: ZeroDivisionError", "test_guard.py:", "1 / int(text)"):
        assert part in said
    guarded(**ROWS)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("value", "said"),
    [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), ("1", "'1'"), ([1], "[1]"), (10**400, "1000")],
)
def test_what_is_no_number_is_missing_and_named(value, said, caplog):
    guarded = of(lambda completions, **columns: [1, True, value, None])
    assert guarded(**ROWS) == [1.0, 1.0, None, None]
    assert (guarded.last.failures, guarded.last.missing) == (1, 2)
    assert "row 2: it returned " + said in caplog.text


def test_none_is_no_failure(caplog):
    guarded = of(lambda completions, **columns: [None] * 4, failing_calls=1)
    assert guarded(**ROWS) == [None] * 4 and guarded.last.failures == 0 and not caplog.records


@pytest.mark.parametrize("value", [torch.tensor([0.5, 1, 2, 3]), (0.5, 1, 2, 3), torch.tensor([0.5, 1, 2, 3]).numpy()])
def test_tensors_and_arrays(value):
    assert of(lambda completions, **columns: value)(**ROWS) == [0.5, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("value", "said"),
    [([1.0], "1 rewards for 4 rows"), (None, "None instead of a list of 4 numbers"), ("four", "'four' instead")],
)
def test_a_wrong_number_of_rewards(value, said, caplog):
    assert of(lambda completions, **columns: value)(**ROWS) == [None] * 4
    assert said in caplog.text


def test_failing_for_every_row_again_and_again_is_an_error():
    answers = iter([math.nan, math.nan, 1.0, math.nan, math.nan, math.nan])
    guarded = of(lambda completions, **columns: [next(answers)], failing_calls=3)
    row = {"prompts": ["p"], "completions": ["c"]}
    assert [guarded(**row) for _ in range(5)] == [[None], [None], [1.0], [None], [None]]
    with pytest.raises(RewardError, match=r"row 0.*3 calls.*it returned nan.*Correct the function"):
        guarded(**row)


@pytest.mark.parametrize("is_async", [False, True])
def test_the_error_comes_from_the_exception_of_the_first_row(is_async):
    def fails(prompts, completions, **columns):
        return [1 / 0 if text == "c" else float(text) for text in completions]

    async def fails_later(**columns):
        return fails(**columns)

    guarded = of(fails_later if is_async else fails, failing_calls=1)
    with pytest.raises(RewardError, match=r"row 0.*ZeroDivisionError") as caught:
        called = guarded(prompts=["p", "p"], completions=["c", "x"])
        asyncio.run(called) if is_async else None
    cause = caught.value.__cause__
    assert type(cause) is ZeroDivisionError
    frames = [frame.name for frame in traceback.extract_tb(cause.__traceback__)]
    assert frames[0] == ("fails_later" if is_async else "fails")


def test_wrong_use_is_told_at_once():
    def asks(completions, **columns):
        raise UsageError("no such column")

    with pytest.raises(UsageError, match="no such column"):
        of(asks)(**ROWS)
    with pytest.raises(UsageError, match=r"rewards\[1\].*7"):
        guard([inverse, 7])
    for single in (inverse, "inverse", None):
        with pytest.raises(UsageError, match="rewards: expected a list of functions"):
            guard(single)
    for options in ({"time_limit": 0}, {"failing_calls": 0}):
        with pytest.raises(UsageError):
            guard([inverse], **options)


def loops(completions, **columns):
    while True:
        pass


def backtracks(completions, **columns):
    return [bool(re.match(r"(a+)+$", "a" * 60 + "b"))]


def sleeps(completions, **columns):
    try:
        time.sleep(600)
    except Exception:
        return [0.0]


@pytest.mark.parametrize("function", [loops, backtracks, sleeps])
def test_a_hung_reward_is_an_error_in_time(function):
    before = signal.getsignal(signal.SIGALRM)
    started = time.monotonic()
    with pytest.raises(
        RewardError, match=rf"'{function.__name__}'.*no result after 0.3 s for 4 rows.*reward_time_limit"
    ):
        of(function, time_limit=0.3)(**ROWS)
    assert time.monotonic() - started < 120
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_hung_reward_within_a_sum():
    inner = combine({sleeps: 1.0})
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"'sleeps'.*no result after 0.3 s"):
        of(inner, time_limit=0.3)(**ROWS)
    assert time.monotonic() - started < 120


def test_another_alarm_goes_on():
    rung = []
    signal.signal(signal.SIGALRM, lambda number, frame: rung.append(time.monotonic()))
    try:
        started = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 2.0)
        of(lambda completions, **columns: time.sleep(0.5) or [1.0] * 4)(**ROWS)
        assert rung or 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1.5  # what is left of its time, not all of it
        while not rung and time.monotonic() - started < 120:
            time.sleep(0.01)
        assert rung[0] - started >= 2.0
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_in_another_thread():
    caught, never = [], threading.Event()

    def work():
        assert of(inverse)(**ROWS) == [1.0, None, 0.25, None]
        try:
            of(lambda completions, **columns: never.wait(600), time_limit=0.2)(**ROWS)
        except RewardError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    assert len(caught) == 1
    never.set()


async def slowly(prompts, completions, **columns):
    await asyncio.sleep(0.01)
    return inverse(prompts, completions)


def test_async_rewards():
    from trl.trainer.utils import get_callable_name, is_async_callable

    guarded = of(slowly)
    assert is_async_callable(guarded) and get_callable_name(guarded) == "slowly"
    assert not is_async_callable(of(inverse)) and get_callable_name(of(inverse)) == "inverse"
    assert asyncio.run(guarded(**ROWS)) == [1.0, None, 0.25, None]
    assert guarded.last.failures == 2

    async def hangs(completions, **columns):
        await asyncio.sleep(600)

    with pytest.raises(RewardError, match="hangs"):
        asyncio.run(of(hangs, time_limit=0.1)(**ROWS))


def test_what_is_logged_by_a_failed_call_is_forgotten():
    logged = []

    def logs(completions, log_extra, log_metric, **columns):
        log_extra("text", list(completions))
        log_metric("rows", len(completions))
        return inverse([], completions)

    loggers = {"log_extra": lambda *told: logged.append(told), "log_metric": lambda *told: logged.append(told)}
    guarded = of(logs)
    assert guarded(**ROWS, **loggers) == [1.0, None, 0.25, None] and logged == []
    guarded(prompts=["p"], completions=["2"], **loggers)
    assert logged == [("text", ["2"]), ("rows", 1)]


def test_rewards_of_other_kinds_pass():
    module = torch.nn.Linear(1, 1)
    inner = of(inverse)
    assert guard([module, "some/model", inner]) == [module, "some/model", inner]
    assert of(functools.partial(inverse, extra=1)).__name__ == "inverse"
    assert Call(4, 2, 2, 0.1).rows == 4


def test_rewards_of_trl_are_the_same_under_guard():
    from trl.rewards import get_soft_overlong_punishment, think_format_reward

    think = [[{"role": "assistant", "content": text}] for text in ("<think>a</think>b", "b")]
    assert of(think_format_reward)(prompts=[[], []], completions=think) == think_format_reward(think) == [1.0, 0.0]
    overlong = get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=4)
    ids = [[0] * n for n in (0, 6, 7, 9, 10, 99)]
    from fastft.rewards import length

    ours = length(limit=10, buffer=4)(prompts=[""] * 6, completions=[""] * 6, completion_ids=ids)
    assert of(overlong)(prompts=[""] * 6, completions=[""] * 6, completion_ids=ids) == ours
