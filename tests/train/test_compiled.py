"""Training on compiled layers, lowered by aot_eager: the curves of eager transformers, by our trainers and TRL's."""

import json
from pathlib import Path

import pytest
import torch
import trl

from fastft.data.collate import collate
from fastft.data.training_collator import training_collator
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
    torch._dynamo.reset()  # what it has learnt of lengths that vary
    model = compile_layers(build_model(), backend="eager").train()
    for seed in range(6):
        batch = collate(build_rows(3, seed=seed, low=6 + seed, high=12 + seed), packed=how == "packed")
        step.loss(model, batch).backward()
    assert len(get_state(model).compiled.report().graphs) == 5  # two forms for the first length and for all, a norm


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


KINDS = {"padded": {}, "padding_free": {"padding_free": True, "max_length": None}, "packed": {"packing": True}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [8, 10, 9])
def test_rows_of_many_lengths_are_compiled_for_once(kind, rows, build_model, build_rows, tokenizer, settings):
    """From the first batch on, whatever the lengths of later ones, and however few rows the last one has."""
    from datasets import Dataset

    data = Dataset.from_list(build_rows(4 * rows if kind == "packed" else rows))
    changes = {**settings, "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 4}
    changes |= {"max_length": 48, **KINDS[kind]}
    curves = []
    for compiled in (True, False):
        torch._dynamo.reset()  # what it has learnt of lengths that vary
        model = compile_layers(build_model(), backend="aot_eager") if compiled else build_model()
        made = SFTTrainer(model, SFTConfig(**changes), train_dataset=data, processing_class=tokenizer, compile=compiled)
        made.train()
        curves.append(curve(made))
        if compiled:
            assert len(get_state(model).compiled.report().graphs) == 3  # the first layer's form, all others', a norm
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-5, atol=0)


def test_batches_are_filled_up_where_nobody_would_see_it(build_model, build_rows, tokenizer, settings):
    """Not in evaluations and predictions, in losses of a user's own, nor where fewer rows are meant to come."""
    from datasets import Dataset

    rows, few = (Dataset.from_list(build_rows(count)) for count in (6, 3))
    changes = {**settings, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    more = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer}
    compiled = compile_layers(build_model(), backend="aot_eager")

    def sizes(loader):
        return [len(batch["input_ids"]) for batch in loader]

    given = training_collator(tokenizer)
    filled = SFTTrainer(compiled, SFTConfig(**changes), data_collator=given, **more)
    assert sizes(filled.get_train_dataloader()) == [4, 4] and given == training_collator(tokenizer)
    assert sizes(filled.get_eval_dataloader()) == sizes(filled.get_test_dataloader(rows)) == [4, 2]

    class OwnLoss(SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    for trainer, model, wishes, asked in (
        (SFTTrainer, build_model(), {}, {"compile": False}),
        (SFTTrainer, compiled, {"auto_find_batch_size": True}, {}),
        (SFTTrainer, compiled, {"accelerator_config": {"split_batches": True}}, {}),
        (SFTTrainer, compiled, {}, {"compute_loss_func": lambda outputs, labels, **_: outputs.logits.mean()}),
        (OwnLoss, compiled, {}, {}),
    ):
        plain = trainer(model, SFTConfig(**changes, **wishes), **asked, **more)
        assert sizes(plain.get_train_dataloader()) == [4, 2]
    small = SFTTrainer(compiled, SFTConfig(**changes), train_dataset=few, processing_class=tokenizer)
    assert sizes(small.get_train_dataloader()) == [3]


def test_a_version_for_each_length_where_that_is_asked_for(build_model, build_rows):
    torch._dynamo.reset()
    model = compile_layers(build_model(), backend="aot_eager", dynamic=False).train()
    for low in (6, 12, 18):
        batch = {**collate(build_rows(3, low=low, high=low + 1)), "lengths_vary": True}
        step.loss(model, batch).backward()
    # for each length the first layer's form and all others', and the norm
    assert len(get_state(model).compiled.report().graphs) == 9
