"""Ctrl-C: the first lets the step come to its end, saves and stops; the second stops at once; both say how to go on."""

import json
import signal
import threading
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

import fastft
from fastft.demo import MODEL_FOLDER
from fastft.train import checkpoint
from fastft.train.interrupt import Stopped
from fastft.train.sft.config import SFTConfig
from fastft.train.sft.trainer import SFTTrainer


class Ring(TrainerCallback):
    """Sends signals at an event once `step` steps are done."""

    def __init__(self, step, event="on_step_begin", numbers=(signal.SIGINT,)):
        def ring(args, state, control, **kwargs):
            if state.global_step == step:
                for number in numbers:
                    signal.raise_signal(number)

        setattr(self, event, ring)


@pytest.fixture
def trainer(build_model, tokenizer, dataset, settings):
    def make(*callbacks, **changes):
        evaluated = dataset if "eval_strategy" in changes else None
        args = SFTConfig(**{**settings, **changes})
        return SFTTrainer(
            build_model(),
            args,
            train_dataset=dataset,
            eval_dataset=evaluated,
            processing_class=tokenizer,
            callbacks=list(callbacks),
            compile=False,
        )

    return make


@pytest.fixture
def folder(settings):
    return Path(settings["output_dir"])


def interrupted(trainer, **kwargs):
    """Train until the interruption, and return what it says."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.train(**kwargs)
    assert type(caught.value) is KeyboardInterrupt  # for a subclass Python would not end as one that was interrupted
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert caught.value.__suppress_context__
    return str(caught.value)


def saved(folder):
    return [path.name for path in checkpoint.checkpoints(folder)]


def record(folder):
    return json.loads((folder / "run.json").read_text())


def test_the_step_is_finished_and_saved_and_the_curve_goes_on(trainer, folder, capsys):
    told = interrupted(trainer(Ring(1), logging_steps=3))
    assert told == f"stopped after step 2 of 4; saved in {folder}/checkpoint-2; resume=True goes on from there"
    assert "stops when this step is done and saved; Ctrl-C again stops at once" in capsys.readouterr().out
    assert saved(folder) == ["checkpoint-2"] and (folder / "loss.png").is_file()
    assert (record(folder)["status"], record(folder)["steps"]) == ("interrupted", 2)
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()] == [2]
    again = trainer()
    again.train(resume_from_checkpoint=True)
    assert record(folder)["status"] == "finished"
    whole = trainer(output_dir=str(folder.parent / "whole"))
    whole.train()
    end = dict(whole.model.named_parameters())
    assert all(torch.equal(value, end[name]) for name, value in again.model.named_parameters())


def test_a_second_stops_at_once(trainer, folder):
    ring = Ring(2, numbers=(signal.SIGINT, signal.SIGINT))
    told = interrupted(trainer(ring, save_strategy="steps", save_steps=1))
    assert told == f"stopped after step 2 of 4; saved in {folder}/checkpoint-2; resume=True goes on from there"
    told = interrupted(trainer(Ring(3, numbers=(signal.SIGINT, signal.SIGINT))), resume_from_checkpoint=True)
    assert told == (
        f"stopped after step 3 of 4; not saved: it was to stop at once; resume=True goes on from {folder}/checkpoint-2"
    )
    assert saved(folder) == ["checkpoint-1", "checkpoint-2"] and record(folder)["status"] == "interrupted"


def test_nothing_is_there_to_go_on_from(trainer, folder):
    told = interrupted(trainer(Ring(0, numbers=(signal.SIGINT, signal.SIGINT))))
    assert told == "stopped before the first step was done; there is no checkpoint to go on from"
    assert saved(folder) == []


def test_the_last_step_is_not_gone_on_from_but_loaded(trainer, folder):
    told = interrupted(trainer(Ring(3)))
    assert (
        told
        == f"stopped after step 4 of 4; saved in {folder}/checkpoint-4; fastft.load('{folder}/checkpoint-4') loads it"
    )
    told = interrupted(trainer(Ring(4, "on_train_end")))
    assert "stopped after step 4 of 4; saved in" in told and record(folder)["status"] == "interrupted"


def test_an_evaluation_is_finished_and_no_further_step_made(trainer, folder):
    class Once(Ring):
        asked = False

        def on_prediction_step(self, args, state, control, **kwargs):
            if not self.asked:
                self.asked = True
                signal.raise_signal(signal.SIGINT)

    told = interrupted(trainer(Once(99), eval_strategy="steps", eval_steps=2))
    assert "stopped after step 2 of 4; saved" in told
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [(row["step"], "eval_loss" in row) for row in rows] == [(1, False), (2, False), (2, True)]


def test_a_step_that_fails_of_it_leaves_the_last_whole_one(trainer, folder):
    class Fails(Ring):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise RuntimeError("the compiler was killed\nby a signal")

    told = interrupted(trainer(Fails(2), gradient_accumulation_steps=2))
    failed = "the step that was to be finished failed (RuntimeError: the compiler was killed)"
    assert told.startswith(f"stopped after step 2 of 4; saved in {folder}/checkpoint-2; {failed}; resume=True")
    assert record(folder)["error"] == "RuntimeError: the compiler was killed\nby a signal"


def test_what_cannot_be_written_is_said(trainer, folder, monkeypatch):
    def full(path, write):
        raise checkpoint.SaveError(f"{path}: could not be written: No space left on device")

    class Full(Ring):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                monkeypatch.setattr(checkpoint, "write_file", full)

    told = interrupted(trainer(Full(1)))
    assert told.startswith("stopped after step 2 of 4; not saved: could not be saved: ") and "No space left" in told
    assert told.endswith("there is no checkpoint to go on from") and saved(folder) == []


def test_sigterm_where_it_was_asked_for(trainer, folder):
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        assert "stopped after step 2 of 4; saved" in interrupted(trainer(Ring(1, numbers=(signal.SIGTERM,))))
    finally:
        signal.signal(signal.SIGTERM, before)


def test_handlers_of_others_are_left_alone(trainer, folder):
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        trainer(Ring(1)).train()
        assert seen == [signal.SIGINT] and record(folder)["status"] == "finished"
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_no_handler_is_set(trainer, folder):
    handlers = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=trainer(Look()).train)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler] * 4 and record(folder)["status"] == "finished"


def test_a_checkpoint_elsewhere_is_named():
    parts = {"steps": 3, "planned": 9, "checkpoint": Path("a/checkpoint-2"), "whole": False, "why": "so", "failed": ""}
    stopped = Stopped(**parts, resume="resume='a/checkpoint-2'")
    said = "stopped after step 3 of 9; not saved: so; {} goes on from a/checkpoint-2"
    assert str(stopped) == said.format("resume='a/checkpoint-2'")
    assert stopped.told("fastft x --resume") == said.format("fastft x --resume")


@pytest.mark.parametrize("name", ["sft", "preference", "grpo"])
def test_the_functions_say_it_too(name, tmp_path):
    model, tokenizer = fastft.load(MODEL_FOLDER)
    model = fastft.add_lora(model)
    prompts = [{"prompt": f"{n} and one is"} for n in range(8)]
    run, rows = {
        "sft": (fastft.sft, [[{**row, "completion": " 9"} for row in prompts]]),
        "preference": (fastft.preference, [[{**row, "chosen": " 9", "rejected": " 3"} for row in prompts]]),
        "grpo": (fastft.grpo, [prompts, [lambda completions, **columns: list(range(len(completions)))]]),
    }[name]
    more = {"engine": "transformers", "generations": 2, "max_new_tokens": 2} if name == "grpo" else {}
    options = {"steps": 3, "batch_size": 2, "accumulate": 1, "compile": False, "callbacks": [Ring(1)], **more}
    with pytest.raises(KeyboardInterrupt) as caught:
        run(model, tokenizer, *rows, tmp_path / "run", **options)
    place = tmp_path / "run" / "checkpoint-2"
    assert str(caught.value) == f"stopped after step 2 of 3; saved in {place}; resume=True goes on from there"
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    del options["callbacks"]
    done = run(model, tokenizer, *rows, tmp_path / "run", resume=True, **options)
    assert [step for step, _ in done.losses][-1] == 3 and done.record["status"] == "finished"
