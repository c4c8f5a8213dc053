"""The demonstration, from the shipped model to the tuned one."""

import json
import signal
from pathlib import Path

import pytest
import typer

from fastft.cli import demo
from fastft.cli.main import app, main
from fastft.demo import run, terminal
from fastft.train.interrupt import Stopped

STOPPED = Stopped(
    steps=7,
    planned=80,
    checkpoint=Path("run/demo/checkpoint-7"),
    whole=True,
    why="",
    failed="",
    resume="resume=True",
)


def test_loss_bars():
    lines = terminal.loss_bars(((5, 4.0), (10, 0.4), (15, 0.04))).splitlines()
    assert [line.count("#") for line in lines] == [41, 21, 1]
    assert lines[0].startswith("  step    5  loss  4.0000  #")


def test_backend_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(run.shutil, "which", lambda name: None)
    assert run.choose_backend("cpu") == ("aot_eager", "no C++ compiler is installed")
    assert run.choose_backend("cuda")[0] == "inductor"
    monkeypatch.setattr(run.shutil, "which", lambda name: "/usr/bin/c++" if name == "c++" else None)
    assert run.choose_backend("cpu") == ("inductor", "with c++")


def test_command_line_is_frozen():
    command = typer.main.get_command(app).get_command(typer.Context(typer.main.get_command(app)), "demo")
    options = sorted(name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts))
    assert options == ["--chat", "--grpo", "--json", "--no-chat", "--output", "--resume", "--steps"]


@pytest.fixture
def replaced(monkeypatch):
    """Let the command run something else than the demonstration."""
    return lambda function: monkeypatch.setattr(demo, "_run", lambda grpo: function)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_says_how_to_go_on_and_exits_with_130(number, replaced, capsys):
    def interrupted(**kwargs):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(STOPPED) from None

    before = signal.getsignal(signal.SIGTERM)
    replaced(interrupted)
    assert main(["demo", "--no-chat"]) == 130
    assert signal.getsignal(signal.SIGTERM) == before
    shown = capsys.readouterr()
    assert shown.err == (
        "fastft: stopped after step 7 of 80; saved in run/demo/checkpoint-7; "
        "the same command with --resume goes on from there\n"
    )
    assert shown.out == ""


def test_interrupted_before_training(replaced, capsys):
    replaced(lambda **kwargs: signal.raise_signal(signal.SIGINT))
    assert main(["demo", "--no-chat"]) == 130
    assert capsys.readouterr().err == "fastft: stopped\n"


def test_resume_is_handed_on(replaced, tmp_path, monkeypatch):
    heard = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/demo/checkpoint-7").mkdir(parents=True)
    replaced(lambda **kwargs: heard.append(kwargs) or signal.raise_signal(signal.SIGINT))
    assert [main(["demo", "--no-chat", *more]) for more in ([], ["--resume"])] == [130, 130]
    assert [kwargs["resume"] for kwargs in heard] == [False, True]


def test_nothing_to_resume_is_wrong_usage(replaced, tmp_path, monkeypatch, capsys):
    replaced(lambda **kwargs: pytest.fail("it was begun"))
    monkeypatch.chdir(tmp_path)
    for more, folder in (([], "run/demo"), (["--grpo"], "run/demo-grpo"), (["--output", "mine"], "mine")):
        assert main(["demo", "--no-chat", "--resume", *more]) == 3
        assert capsys.readouterr().err == (
            f"error: --resume: expected a folder with a checkpoint of an interrupted run, got {folder!r}. "
            "Leave --resume out to begin anew, or name another folder with --output.\n"
        )


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(demo, "installed", lambda name: name not in ("trl", "torch"))
    assert main(["demo"]) == 1
    assert "fastft demo needs torch, trl: pip install 'fastft[train]'" in capsys.readouterr().err


def test_chat_keeps_within_the_models_length():
    import fastft
    from fastft.demo import MODEL_FOLDER

    model, tokenizer = fastft.load(MODEL_FOLDER)
    heard = []
    lines = iter(["What is 31 + 27?", "word " * 600, *["Repeat after me: river stone"] * 14, "", "never asked"])
    terminal.talk(model, tokenizer, "It adds.", heard.append, lines)
    text = "".join(heard)
    assert text.count("31 + 27 = 58.") == 1
    assert "too long" in text and text.count("river stone") == 14


@pytest.mark.slow
@pytest.mark.inductor
def test_demo_teaches_the_model(tmp_path):
    heard = []
    shown = run.run_demo(tmp_path, say=heard.append)
    assert shown.accuracy_before <= 0.1 and shown.accuracy_after > 0.8
    assert "Ahoy" not in shown.answer_before and "75" not in shown.answer_before
    assert shown.answer_after == "Ahoy! 27 + 48 = 75. That be 75 apples, matey!"
    assert shown.losses[-1][1] < 0.1 < 1.0 < shown.losses[0][1]
    record = json.loads((tmp_path / "run.json").read_text())
    # what the time goes to, besides compiling; seconds would tell of the machine
    assert record["steps"] == 80 and record["tokens"]["all"] == 80 * run.BATCH * run.LENGTH and shown.seconds > 0
    assert record["model"]["quant"] == "nf4" and record["model"]["lora"]["default"]["r"] == 16
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert shown.answer_after in "".join(heard)

    import fastft

    model, tokenizer = fastft.load(tmp_path)
    assert fastft.generate(model, tokenizer, [{"role": "user", "content": shown.question}]) == [shown.answer_after]


def test_too_few_steps_to_see_a_loss_fall_are_refused(capsys):
    assert main(["demo", "--steps", "1"]) == 3
    assert "steps" in capsys.readouterr().err
