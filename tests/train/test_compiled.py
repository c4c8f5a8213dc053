"""Training on compiled layers, lowered by aot_eager: the curves of eager transformers, by our trainers and TRL's."""

import json
from pathlib import Path

import pytest
import torch
import trl

from fastft.data.collate import collate
from fastft.errors import UsageError
from fastft.graph.compile import compile as compile_layers
from fastft.state import get_state
from fastft.train import step
from fastft.train.recomputing import is_asked
from fastft.train.sft.config import SFTConfig
from fastft.train.sft.trainer import SFTTrainer


def curve(trainer, name="loss"):
    return [row[name] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_compiled_and_eager_agree(packing, build_model, tokenizer, dataset, settings):
    changes = {**settings, "packing": packing, "max_length": 48, "gradient_accumulation_steps": 2, "max_steps": 3}
    more = {"train_dataset": dataset, "processing_class": tokenizer}
    eager = SFTTrainer(build_model(), SFTConfig(**changes), compile=False, **more)
    eager.train()
    model = compile_layers(build_model(), backend="aot_eager")
    ours = SFTTrainer(model, SFTConfig(**changes, eval_strategy="no"), **more)
    ours.train()
    stock_model = compile_layers(build_model(), backend="aot_eager")
    stock = trl.SFTTrainer(
        stock_model, trl.SFTConfig(**changes, gradient_checkpointing=False, report_to="none"), **more
    )
    stock.train()
    for made in (ours, stock):
        torch.testing.assert_close(curve(made), curve(eager), rtol=2e-5, atol=0)
        torch.testing.assert_close(curve(made, "grad_norm"), curve(eager, "grad_norm"), rtol=2e-4, atol=0)
    assert get_state(model).compiled.report().graphs  # the compiled path was taken
    assert get_state(stock_model).compiled.report().graphs
    assert not get_state(model).compiled.eager_calls
    run = json.loads((Path(settings["output_dir"]) / "run.json").read_text())
    assert run["rewrites"]["applied"] and run["rewrites"]["family"] == "llama"


def test_the_trainer_compiles_unless_told_not_to(build_model, tokenizer, dataset, settings, capsys):
    more = {"train_dataset": dataset, "processing_class": tokenizer}
    models = [build_model() for _ in range(4)]
    SFTTrainer(models[0], SFTConfig(**settings), **more)
    SFTTrainer(models[1], SFTConfig(**settings), compile=False, **more)
    SFTTrainer(models[2], SFTConfig(**settings, gradient_checkpointing=True), **more)
    SFTTrainer(models[3], SFTConfig(**settings, gradient_checkpointing=True), compile=False, **more)
    assert [get_state(model).compiled is not None for model in models] == [True, False, True, False]
    assert get_state(models[2]).compiled.settings.plan == "min"
    assert capsys.readouterr().out.count("gradient_checkpointing=True: the layers are compiled with") == 1
    made = SFTTrainer(models[0], SFTConfig(**settings, gradient_checkpointing=True), **more)
    assert not is_asked(made.args) and "compiled before with the plan" in capsys.readouterr().out


def test_what_cannot_be_compiled_is_recomputed_by_transformers(build_model, tokenizer, dataset, settings, capsys):
    """An unknown architecture with gradient_checkpointing=True: the same curve and gradients as without."""
    curves = []
    for recompute in (False, True):
        args = SFTConfig(**{**settings, "max_steps": 2}, gradient_checkpointing=recompute)
        made = SFTTrainer(build_model("stablelm"), args, train_dataset=dataset, processing_class=tokenizer)
        made.train()
        assert any(getattr(module, "gradient_checkpointing", False) for module in made.model.modules()) is recompute
        curves.append([curve(made), curve(made, "grad_norm")])
    assert curves[0] == curves[1] and min(curves[0][1]) > 0
    assert "transformers recomputes the layers" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["padded", "packed"])
def test_many_lengths_compile_no_more_graphs_than_two(how, build_model, build_rows):
    """A layer is traced for the first length and once for all others, each with and without a gradient of its input."""
    model = compile_layers(build_model(), backend="eager").train()
    for seed in range(6):
        batch = collate(build_rows(3, seed=seed, low=6 + seed, high=12 + seed), packed=how == "packed")
        step.loss(model, batch).backward()
    assert len(get_state(model).compiled.report().graphs) <= 4


def test_fp8_follows_the_exact_curve_and_is_on_record(build_model, tokenizer, dataset, settings):
    more = {"train_dataset": dataset, "processing_class": tokenizer}
    changes = {**settings, "max_steps": 6, "per_device_train_batch_size": 8}
    curves = {}
    for compute in ("exact", "fp8", "fp8+head"):
        model = compile_layers(build_model(), backend="eager", compute=compute)
        made = SFTTrainer(model, SFTConfig(**changes, compute=compute), **more)
        made.train()
        curves[compute] = curve(made)
        torch.testing.assert_close(curves[compute], curves["exact"], rtol=5e-3, atol=0)
        run = json.loads((Path(settings["output_dir"]) / "run.json").read_text())
        assert run["rewrites"]["compute"] == run["config"]["compute"] == compute
        card = (Path(settings["output_dir"]) / "README.md").read_text()
        told = f"| compute | {compute}: products with frozen weights had fp8 factors (not exact) |" in card
        assert told == (compute != "exact")
    assert len(set(map(tuple, curves.values()))) == 3


def test_compute_reaches_the_layers_or_is_refused(build_model, tokenizer, dataset, settings, capsys):
    more = {"train_dataset": dataset, "processing_class": tokenizer}
    model = build_model()
    SFTTrainer(model, SFTConfig(**settings, compute="fp8+head"), **more)
    assert get_state(model).compiled.report().compute == "fp8+head"
    assert get_state(model).compiled.planned.setup.fp8_head
    with pytest.raises(UsageError, match="compute: expected 'exact' with compile=False, got 'fp8'"):
        SFTTrainer(build_model(), SFTConfig(**settings, compute="fp8"), compile=False, **more)
    with pytest.raises(UsageError, match=r"compute: expected 'exact', got 'fp8'.*It was compiled before"):
        SFTTrainer(compile_layers(build_model()), SFTConfig(**settings, compute="fp8"), **more)
    with pytest.raises(UsageError, match=r"compute: expected 'fp8\+head', got 'exact'.*It was compiled before"):
        SFTTrainer(model, SFTConfig(**settings, compute="exact"), **more)
    made = SFTTrainer(model, SFTConfig(**settings), **more)
    assert made.args.compute == "fp8+head" and "which is not exact, and stays so" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"SFTConfig compute: expected one of exact, fp8, fp8\+head, got 'fp9'"):
        SFTConfig(**settings, compute="fp9")


def packed_run(model, tokenizer, rows, settings, **changes):
    changes = {**settings, "packing": True, "max_length": 48, "max_steps": -1, "num_train_epochs": 2, **changes}
    made = SFTTrainer(model, SFTConfig(**changes), train_dataset=rows, processing_class=tokenizer)
    made.train()
    return made


def test_packed_batches_are_filled_up_and_compiled_for_once(build_model, build_rows, tokenizer, settings):
    """For all batches, the last and smaller one too; losses are those of batches as they are."""
    from datasets import Dataset

    rows = Dataset.from_list(build_rows(55, low=4, high=12))
    runs = []
    for filling in (True, False):
        torch._dynamo.reset()  # what it has learnt of lengths that vary
        model = compile_layers(build_model(), backend="aot_eager")
        made = packed_run(model, tokenizer, rows, settings, **({} if filling else {"neftune_noise_alpha": 0.0}))
        told = made.packing_statistics["train"]
        assert told["fill"] >= 15 / 16 and told["packed_rows"] % 2 == 1
        assert told["filled_up_to"] == (96 if filling else None)
        runs.append((curve(made), len(get_state(model).compiled.report().graphs)))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-5, atol=0)
    assert runs[0][1] == 3 < runs[1][1]  # the first layer's form, all others' and the last norm


def test_batches_to_evaluate_and_those_of_layers_as_they_are_are_not_filled_up(
    build_model, build_rows, tokenizer, settings
):
    from datasets import Dataset

    rows = Dataset.from_list(build_rows(55, low=4, high=12))
    changes = {**settings, "packing": True, "max_length": 48, "per_device_eval_batch_size": 1}
    more = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer}
    model = compile_layers(build_model(), backend="aot_eager")
    made = SFTTrainer(model, SFTConfig(**changes), **more)
    assert {batch["input_ids"].shape[1] for batch in made.get_train_dataloader()} == {96}
    assert max(batch["input_ids"].shape[1] for batch in made.get_eval_dataloader()) <= 48
    assert made.data_collator.filling is not None
    plain = SFTTrainer(build_model(), SFTConfig(**changes), compile=False, **more)
    assert max(batch["input_ids"].shape[1] for batch in plain.get_train_dataloader()) <= 96
    assert plain.data_collator.filling is None
