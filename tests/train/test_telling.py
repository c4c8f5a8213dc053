"""What a short run says: its lines with numbers as numbers, and nothing that only other libraries are to hear."""

import ast
import io
import logging
import math
import re
import subprocess
import sys
import warnings

import pytest

import fastft
from fastft.demo import MODEL_FOLDER
from fastft.noise import between_libraries
from fastft.train import telling

QUIET = {"steps": 1, "batch_size": 4, "compile": False, "log_every": 1}
PAIRS = [{"prompt": f"{n} and one is", "chosen": f" {n + 1}", "rejected": " 9"} for n in range(6)]
ROWS = [{"prompt": f"{n} and one is", "completion": f" {n + 1}"} for n in range(6)]


def test_a_line_has_numbers():
    logs = {
        "loss": 7.104892253875732,
        "learning_rate": 2e-05,
        "n": 158,
        "epoch": 1.0,
        "total_flos": 1.0,
        "x": "a" * 200,
    }
    line = telling.log_line(3, logs)
    assert line.startswith("step    3  {'loss': 7.105, 'learning_rate': 2e-05, 'n': 158, 'epoch': 1.0, 'x': 'aaa")
    assert line.endswith("... (200 characters)'}")
    assert telling.log_line(12345, {"loss": float("nan")}) == "step 12345  {'loss': nan}"
    assert telling.log_line(3, {"train_runtime": 2.5, "train_loss": 1.0}) == "{'train_runtime': 2.5, 'train_loss': 1.0}"


def logged(out):
    """Return step, "" for what is of the whole run, and metrics of every line of a log in what was printed."""
    found = [re.fullmatch(r"(?:step +(\d+)  )?(\{.*\})", line) for line in out.splitlines()]
    return [(one[1] or "", ast.literal_eval(one[2])) for one in found if one]


def begun():
    model, tokenizer = fastft.load(MODEL_FOLDER)
    return fastft.add_lora(model), tokenizer


def run_sft(folder, **options):
    fastft.sft(*begun(), ROWS, folder, eval=ROWS, **QUIET, **options)


def run_grpo(folder, **options):
    def even(completions, **columns):
        return [float(len(text) % 2) for text in completions]

    options |= {"generations": 4, "accumulate": 1, "max_new_tokens": 4, "engine": "transformers"}
    fastft.grpo(*begun(), ROWS, [even], folder, **QUIET, **options)


def preferring(loss):
    def run(folder, **options):
        fastft.preference(*begun(), PAIRS, folder, loss=loss, **QUIET, **options)

    return run


RUNS = {"sft": run_sft, "grpo": run_grpo, **{loss: preferring(loss) for loss in ("dpo", "kto", "orpo", "cpo")}}


@pytest.mark.parametrize("name", RUNS)
def test_nobody_elses_warnings_and_no_bars_of_few_rows(name, tmp_path, capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RUNS[name](tmp_path / "run")
    told = [str(warning.message) for warning in caught]
    assert not [text for text in told if "gradient_checkpointing" in text or "trl.experimental" in text]
    shown = capsys.readouterr()
    bars = ("Map", "Filter", "Tokenizing", "Extracting", "Dropping", "Adding", "Truncating")
    assert not [bar for bar in bars if bar in shown.err]
    lines = logged(shown.out)
    assert lines and all(step == ("" if "train_runtime" in line else "1") for step, line in lines)
    assert all(type(value) in (float, int) for _, line in lines for value in line.values())


def test_printed_lines_have_numbers_too(tmp_path, capsys):
    run_sft(tmp_path / "run", disable_tqdm=True)
    step, first = logged(capsys.readouterr().out)[0]
    assert step == "1" and type(first["loss"]) is float and first["epoch"] == 0.5


def test_importing_the_trainers_without_a_reference_warns_nobody():
    code = "import fastft; fastft.ORPOTrainer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "experimental" not in done.stderr


def test_only_these_warnings_are_kept_back():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with between_libraries():
            warnings.warn(
                "`gradient_checkpointing_enable` is deprecated and will be removed", FutureWarning, stacklevel=1
            )
            warnings.warn("`something` is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("`gradient_checkpointing_enable` is deprecated and will be removed", FutureWarning, stacklevel=1)
    assert [str(warning.message).split("`")[1] for warning in caught] == ["something", "gradient_checkpointing_enable"]


def test_filters_that_are_set_meanwhile_stay():
    with warnings.catch_warnings():
        before = list(warnings.filters)
        with between_libraries():
            held = list(warnings.filters)
            with between_libraries():
                warnings.filterwarnings("error", "mine")
            assert warnings.filters[1:] == held != before  # the inner one has not taken the outer one's away
        assert warnings.filters[1:] == before
        with pytest.raises(FutureWarning, match="mine"):
            warnings.warn("mine", FutureWarning, stacklevel=1)


def test_a_run_that_fails_closes_its_bars(build_model, tokenizer, dataset, settings, monkeypatch):
    args = fastft.SFTConfig(**{**settings, "disable_tqdm": False})
    made = fastft.SFTTrainer(build_model(), args, train_dataset=dataset, processing_class=tokenizer, compile=False)
    bar = next(one for one in made.callback_handler.callbacks if isinstance(one, telling.Progress))
    monkeypatch.setattr(sys, "stderr", io.StringIO())

    def fails(*args, **kwargs):
        assert bar.training_bar is not None
        raise ArithmeticError

    monkeypatch.setattr(made, "training_step", fails)
    with pytest.raises(ArithmeticError):
        made.train()
    assert bar.training_bar is None


def screen(text):
    """Return the lines that a terminal shows of what was written to it."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|.|\n", text, re.DOTALL):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif part == "\x1b[A":
            row -= 1
        elif part == "\r":
            column = 0
        else:
            lines[row] = lines[row].ljust(column)[:column] + part + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def test_what_rewards_say_begins_a_line_of_its_own(tmp_path, monkeypatch):
    """The notice of a failure and what a reward prints, beside the bars of training and of evaluation."""
    terminal = io.StringIO()
    notices = logging.StreamHandler(terminal)
    logger = logging.getLogger("fastft.rewards")
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)

    def even(completions, **columns):
        print("scoring", len(completions), "completions")
        return [*(float(len(text) % 2) for text in completions[1:]), math.nan]

    options = {"generations": 4, "accumulate": 1, "max_new_tokens": 4, "engine": "transformers"}
    options |= {"steps": 2, "eval": ROWS[:2], "eval_every": 1, "eval_batch_size": 4, "disable_tqdm": False}
    logger.addHandler(notices)
    try:
        fastft.grpo(*begun(), ROWS, [even], tmp_path / "run", **QUIET | options)
    finally:
        logger.removeHandler(notices)
    shown = screen(terminal.getvalue())
    assert len([line for line in shown if line.startswith("reward 'even' failed for 1 of 4 rows")]) == 1
    said = [line for line in shown if "scoring" in line]
    assert len(said) == 6 and set(said) == {"scoring 4 completions"}
    assert any("2/2" in line for line in shown)  # the bar of training
