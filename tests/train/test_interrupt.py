"""Ctrl-C: the first lets the step come to its end, saves and stops; the second stops at once; both say how to go on."""

import gc
import json
import os
import shutil
import signal
import threading
import weakref
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback

import fastft
from fastft.demo import MODEL_FOLDER
from fastft.errors import RewardError
from fastft.train import checkpoint
from fastft.train.interrupt import Interruption, Stopped
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


class Best(TrainerCallback):
    """Makes the evaluation of the first step the best one."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = float(state.global_step)


LOAD_BEST = {
    **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
    **{"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False},
}


@pytest.mark.parametrize("where", ["on_train_end", "on_epoch_end", "_load_best_model"])
@pytest.mark.parametrize("best", [False, True])
def test_a_run_whose_steps_are_done_is_finished(where, best, trainer, folder, capsys, monkeypatch):
    changes = {**LOAD_BEST, "logging_steps": 2} if best else {}
    made = trainer(Ring(4, where), Best(), **changes)
    if where == "_load_best_model" and best:
        load = made._load_best_model

        def loads():
            load()
            signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(made, where, loads)
    result = made.train()
    assert result.global_step == 4 and record(folder)["status"] == "finished"
    assert saved(folder) == [f"checkpoint-{step}" for step in (1, 2, 3, 4) if best]
    assert ("stops when this step" in capsys.readouterr().out) is (where == "on_epoch_end")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if best:
        first = load_file(folder / "checkpoint-1" / "adapter_model.safetensors")
        last = load_file(folder / "checkpoint-4" / "adapter_model.safetensors")
        now = get_peft_model_state_dict(made.model)
        assert all(torch.equal(first[name], value) for name, value in now.items())
        assert not all(torch.equal(last[name], value) for name, value in now.items())


def test_the_best_weights_are_not_saved_as_the_last_step(trainer, folder):
    class Fails(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            shutil.rmtree(folder / "checkpoint-4")
            made._own = made._own[:-1]
            raise RewardError("so")

    made = trainer(Best(), Fails(), **LOAD_BEST)
    with pytest.raises(RewardError, match=r"Step 4 is not saved: the weights are those of .*checkpoint-1 by now"):
        made.train()
    assert saved(folder) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_second_ends_a_finished_run_at_once_and_leaves_its_record(trainer, folder):
    ring = Ring(4, "on_train_end", numbers=(signal.SIGINT, signal.SIGINT))
    made = trainer()
    made.add_callback(ring)  # behind the recorder
    assert "it was to stop at once" in interrupted(made)
    assert record(folder)["status"] == "finished" and saved(folder) == []


def test_a_signal_while_the_handlers_are_put_back(monkeypatch):
    interruption, put = Interruption(), signal.signal
    before = {number: put(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}

    def rings(number, handler):
        if handler is signal.default_int_handler and signal.getsignal(number) == interruption._ring:
            monkeypatch.setattr(signal, "signal", put)
            signal.raise_signal(number)
        return put(number, handler)

    try:
        with pytest.raises(KeyboardInterrupt), interruption.watched(True, lambda error: None):
            monkeypatch.setattr(signal, "signal", rings)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert not interruption.asked
        with pytest.raises(KeyboardInterrupt):  # the other is as the default, and then the default
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        for number, handler in before.items():
            put(number, handler)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_ends_at_sigterm_and_not_at_ctrl_c():
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Interruption().watched(True, lambda error: None):
            child = os.fork()
            if child == 0:
                try:
                    signal.raise_signal(signal.SIGINT)
                    signal.raise_signal(signal.SIGTERM)
                finally:
                    os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_checkpoint_of_the_model_alone_is_not_said_to_be_gone_on_from(trainer, folder):
    told = interrupted(trainer(Ring(1), save_only_model=True))
    assert told == (
        f"stopped after step 2 of 4; saved in {folder}/checkpoint-2; fastft.load('{folder}/checkpoint-2') loads it; "
        "it cannot be gone on from: save_only_model=True leaves the state of the optimizer out"
    )


def test_callbacks_end_what_they_have_begun(trainer, folder, capsys):
    class Opens(TrainerCallback):
        events = ()

        def on_train_begin(self, args, state, control, **kwargs):
            self.events += ("begin",)

        def on_train_end(self, args, state, control, model=None, **kwargs):
            self.events += ("end", state.global_step, model is made.model)
            raise ValueError("no connection")

    opens = Opens()
    made = trainer(Ring(1), opens)
    assert "stopped after step 2 of 4; saved" in interrupted(made)
    assert opens.events == ("begin", "end", 2, True) and record(folder)["status"] == "interrupted"
    assert "a callback failed at the end of the interrupted run: ValueError: no connection" in capsys.readouterr().out
    opens.events = ()
    interrupted(trainer(Ring(1, numbers=(signal.SIGINT, signal.SIGINT)), opens))
    assert opens.events == ("begin",)


def test_a_step_that_failed_holds_nothing_while_the_last_one_is_saved(trainer, monkeypatch):
    held, seen = [], []

    class Fails(Ring):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                activations = torch.ones(8)
                held.append(weakref.ref(activations))
                raise RuntimeError(f"of {len(activations)}")

    made = trainer(Fails(2), gradient_accumulation_steps=2)

    def looks(folder):
        gc.collect()
        seen.append((held[0](), [p.grad for p in made.model.parameters() if p.grad is not None]))

    monkeypatch.setattr(made, "save_extra", looks)
    assert "failed (RuntimeError: of 8)" in interrupted(made)
    assert seen == [(None, [])]


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


def test_where_nothing_can_be_measured_any_more_the_interruption_is_told_still(trainer, folder, monkeypatch):
    made = trainer(Ring(1))

    def dead(*given):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(made.recorder, "at_checkpoint", dead)
    monkeypatch.setattr(made.recorder, "measurements", dead)
    told = interrupted(made)
    assert told.startswith("stopped after step 2 of 4; not saved: could not be saved: CUDA error")
    run = record(folder)
    measured = "what it came to could not be measured (RuntimeError: CUDA error: unspecified launch failure)"
    assert run["status"] == "interrupted" and run["error"].endswith(measured)


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
