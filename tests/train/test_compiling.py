"""What is said about compiling, and what the record keeps of it."""

import json
import re
from pathlib import Path

import pytest
from torch._dynamo.callback import callback_handler
from torch._dynamo.utils import counters

from fastft.graph.backend import BACKENDS
from fastft.graph.compile import compile as compile_layers
from fastft.train.compiling import CompileTime, caches
from fastft.train.sft.config import SFTConfig
from fastft.train.sft.trainer import SFTTrainer


def listeners():
    return list(callback_handler.start_callbacks), list(callback_handler.end_callbacks)


def test_compiling_is_told_once_and_kept_in_the_record(build_model, tokenizer, dataset, settings, capsys):
    before = listeners()
    model = compile_layers(build_model(), backend="aot_eager")
    trainer = SFTTrainer(model, SFTConfig(**settings), train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    assert listeners() == before
    lines = [line for line in capsys.readouterr().out.splitlines() if "compil" in line]
    began = [line for line in lines if "compiling the decoder layers" in line]
    assert began == ["fastft: compiling the decoder layers, once for each kind"]  # this backend keeps nothing
    kept = json.loads((Path(settings["output_dir"]) / "run.json").read_text())["compile"]
    assert kept["graphs"] == len(model_graphs(model)) > 0
    assert 0 < kept["first_step_seconds"] <= kept["seconds"]
    told = [re.search(r"compiled (\d+) graphs? in ([\d.]+) s", line) for line in lines]
    (found,) = filter(None, told)  # of the first step; other lengths may compile more graphs later
    assert 0 < int(found[1]) <= kept["graphs"] and abs(float(found[2]) - kept["first_step_seconds"]) < 0.051


def test_a_cache_is_promised_where_there_is_one(capsys):
    from torch._inductor import config

    with config.patch(fx_graph_cache=True, force_disable_caches=False):
        found = {backend: caches(backend) for backend in BACKENDS}
    assert found == {"inductor": True, "aot_eager": False, "eager": False}
    for off in ({"fx_graph_cache": False}, {"force_disable_caches": True}):
        with config.patch(**{"fx_graph_cache": True, "force_disable_caches": False, **off}):
            assert not caches("inductor")
    for caching in (True, False):
        CompileTime(caching).on_start(None)
    told = "fastft: compiling the decoder layers, once for each kind"
    assert capsys.readouterr().out.splitlines() == [f"{told}; later runs take it from a cache", told]


@pytest.mark.slow
@pytest.mark.inductor
def test_a_run_with_inductor_is_told_of_the_cache(build_model, tokenizer, dataset, settings, capsys):
    model = compile_layers(build_model(), backend="inductor")
    more = {"train_dataset": dataset, "processing_class": tokenizer}
    SFTTrainer(model, SFTConfig(**{**settings, "max_steps": 1}), **more).train()
    told = "fastft: compiling the decoder layers, once for each kind; later runs take it from a cache"
    out = capsys.readouterr().out
    assert told in out.splitlines() and "(cache: off)" not in out


def model_graphs(model):
    from fastft.state import get_state

    return get_state(model).compiled.report().graphs


def test_nothing_is_said_where_nothing_is_compiled(build_model, tokenizer, dataset, settings, capsys, monkeypatch):
    for kind in ("hit", "miss"):  # an earlier model of the process was compiled
        monkeypatch.setitem(counters["inductor"], f"fxgraph_cache_{kind}", 3)
    more = {"train_dataset": dataset, "processing_class": tokenizer}
    SFTTrainer(build_model(), SFTConfig(**settings), compile=False, **more).train()
    assert "compil" not in capsys.readouterr().out
    kept = json.loads((Path(settings["output_dir"]) / "run.json").read_text())["compile"]
    assert kept == {"graphs": 0, "first_step_seconds": 0.0, "seconds": 0.0, "cache": "off"}


def test_a_failed_run_stops_listening(build_model, tokenizer, dataset, settings, monkeypatch):
    before = listeners()
    trainer = SFTTrainer(
        build_model(), SFTConfig(**settings), compile=False, train_dataset=dataset, processing_class=tokenizer
    )

    def broken(*args, **kwargs):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(trainer, "training_step", broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    assert listeners() == before


@pytest.mark.parametrize(
    ("counts", "state"),
    [((0, 4), "cold"), ((4, 0), "warm"), ((2, 1), "partly warm"), ((0, 0), "off")],
)
def test_state_of_the_caches(counts, state, monkeypatch):
    monkeypatch.setattr(CompileTime, "counts", lambda self: dict(zip(("hit", "miss"), counts, strict=True)))
    assert CompileTime().cache() == state
