"""Losses that are no numbers: what the log has in their place, on the device, and that it is told."""

import math
from types import SimpleNamespace

import pytest
import torch

from fastft.train.finite import FiniteLosses


def arguments(wanted=True):
    return SimpleNamespace(logging_nan_inf_filter=wanted)


def test_the_sum_is_the_one_that_transformers_makes():
    """transformers: `total += loss`, or where it is no number `total / (1 + steps since the last line)`."""
    args = arguments()
    finite = FiniteLosses(args)
    losses = [2.0, 4.0, math.nan, 1.0, math.inf, -math.inf, 3.0]
    for last_logged, steps in ((0, range(4)), (4, range(4, 7))):
        ours = theirs = 0.0
        for step in steps:
            value = losses[step]
            kept = finite.filtered(torch.tensor(value), step, last_logged).item()
            assert args.logging_nan_inf_filter is False  # what transformers reads next
            (finite.on_substep_end if step % 2 else finite.on_pre_optimizer_step)(args, None, None)
            assert args.logging_nan_inf_filter is True  # what an evaluation or a checkpoint reads
            ours += kept
            theirs += value if math.isfinite(value) else theirs / (1 + step - last_logged)
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert int(finite.left_out) == 3


def test_without_the_filter_a_loss_is_what_it_is():
    args = arguments(False)
    finite = FiniteLosses(args)
    assert math.isnan(finite.filtered(torch.tensor(math.nan), 0, 0).item())
    finite.on_pre_optimizer_step(args, None, None)
    assert args.logging_nan_inf_filter is False and finite.left_out is None


def test_it_is_told_once_and_with_a_line_of_losses(capsys):
    finite = FiniteLosses(arguments())
    state = SimpleNamespace(global_step=2, is_world_process_zero=True)
    for value in (1.0, math.nan):
        finite.filtered(torch.tensor(value), 0, 0)
    finite.on_log(None, state, None, logs={"eval_loss": 1.0})
    assert capsys.readouterr().out == ""
    finite.on_log(None, state, None, logs={"loss": 1.0})
    finite.on_log(None, state, None, logs={"loss": 1.0})
    told = capsys.readouterr().out
    assert told.count("fastft:") == 1 and "the loss of 1 micro-batch up to step 2 was not a number" in told
    finite.on_train_begin(None, state, None)  # another run, that logs nothing but its end
    finite.on_log(None, state, None, logs={"train_loss": 1.0})
    assert capsys.readouterr().out == ""
    for _ in range(300):  # more than bfloat16 can count
        finite.filtered(torch.tensor(math.inf, dtype=torch.bfloat16), 0, 0)
    state.is_world_process_zero = False
    finite.on_log(None, state, None, logs={"train_loss": 1.0})
    assert capsys.readouterr().out == ""
    state.is_world_process_zero = True
    finite.on_log(None, state, None, logs={"train_loss": 1.0})
    assert "the loss of 300 micro-batches up to step 2" in capsys.readouterr().out


def test_a_run_has_a_note_of_all_of_them(capsys):
    noted = []
    finite = FiniteLosses(arguments(), noted.append)
    state = SimpleNamespace(global_step=1, is_world_process_zero=True)
    finite.on_train_begin(None, state, None)
    finite.filtered(torch.tensor(math.nan), 0, 0)
    finite.send()
    finite.on_log(None, state, None, logs={"loss": 0.0})
    for step in (1, 2):
        finite.filtered(torch.tensor(math.nan if step == 2 else 1.0), step, 1)
    state.global_step = 3
    finite.on_log(None, state, None, logs={"loss": 1.0})
    finite.on_log(None, state, None, logs={"train_loss": 1.0})
    assert capsys.readouterr().out.count("fastft:") == 1
    told = "was not a number, and is left out of the losses told here; the model may be no good"
    assert noted == [[], [f"the loss of 2 micro-batches up to step 3 {told}"]]
    finite.on_train_begin(None, state, None)
    finite.filtered(torch.tensor(1.0), 0, 0)
    finite.on_log(None, state, None, logs={"train_loss": 1.0})
    assert noted[2:] == [[]]
