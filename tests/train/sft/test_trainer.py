"""The trainer: equivalent settings give equal curves, resume goes on, rates reach their groups, evaluation is right."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset

import fastft
from fastft.data import bars
from fastft.data.collate import collate
from fastft.errors import DataError, UsageError
from fastft.train import checkpoint, step
from fastft.train import settings as config_settings
from fastft.train.cuda_graphs import Replayer
from fastft.train.sft.config import SFTConfig
from fastft.train.sft.run import sft
from fastft.train.sft.trainer import SFTTrainer


def train(model, tokenizer, dataset, settings, trainer=SFTTrainer, resume=None, extra=None, **changes):
    config = SFTConfig if trainer is SFTTrainer else trl.SFTConfig
    args = config(**{**settings, **changes})
    more = {"compile": False} if trainer is SFTTrainer else {}
    made = trainer(model, args, train_dataset=dataset, processing_class=tokenizer, **more, **(extra or {}))
    made.train(resume_from_checkpoint=resume)
    return made


def train_stock(model, tokenizer, dataset, settings, extra=None, **changes):
    changes |= {"gradient_checkpointing": False, "report_to": "none"}
    return train(model, tokenizer, dataset, settings, trl.SFTTrainer, extra=extra, **changes)


def curve(trainer, name="loss"):
    return [row[name] for row in trainer.state.log_history if "loss" in row]


def trained(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_stock_trl_and_fastft_agree(build_model, tokenizer, dataset, settings):
    """fp32 eager, 4 steps: the fused loss differs by rounding only."""
    for packing in (False, True):
        changes = {"packing": packing, "max_length": 48, "gradient_accumulation_steps": 2}
        ours = train(build_model(), tokenizer, dataset, settings, **changes)
        stock = train_stock(build_model(), tokenizer, dataset, settings, **changes)
        torch.testing.assert_close(curve(ours), curve(stock), rtol=1e-5, atol=0)
        torch.testing.assert_close(curve(ours, "grad_norm"), curve(stock, "grad_norm"), rtol=1e-4, atol=0)
        assert max(curve(ours)) - min(curve(ours)) > 1e-3  # it did learn: the comparison is not of constants


def test_losses_that_are_no_numbers_are_logged_as_stock_trl_does(build_model, tokenizer, dataset, settings, capsys):
    """The device leaves them out, where transformers' own filter has the host wait for each micro-batch."""

    def unlucky():
        calls = iter(range(100))

        def loss(outputs, labels, num_items_in_batch=None):
            value = step.statistics_of_logits(outputs.logits, {"labels": labels})[:, 0].sum() / num_items_in_batch
            return value + (math.nan if next(calls) in (2, 3, 5) else 0.0)  # a constant: gradients stay what they are

        return {"compute_loss_func": loss}

    changes = {"gradient_accumulation_steps": 2, "logging_steps": 2}
    ours = train(build_model(), tokenizer, dataset, settings, extra=unlucky(), **changes)
    told = capsys.readouterr().out
    stock = train_stock(build_model(), tokenizer, dataset, settings, extra=unlucky(), **changes)
    assert len(curve(stock)) == 2
    torch.testing.assert_close(curve(ours), curve(stock), rtol=1e-5, atol=0)
    assert told.count("the loss of 2 micro-batches up to step 2 was not a number") == 1

    class Stopped(SFTTrainer):
        def _clip_grad_norm(self, model):  # behind a micro-batch, before its step
            raise RuntimeError("stopped")

    args = SFTConfig(**{**settings, **changes})
    made = Stopped(build_model(), args, train_dataset=dataset, processing_class=tokenizer, compile=False)
    with pytest.raises(RuntimeError, match="stopped"):
        made.train()
    assert made.args.logging_nan_inf_filter is True
    assert ours.args.logging_nan_inf_filter is True
    off = train(
        build_model(),
        tokenizer,
        dataset,
        settings,
        extra=unlucky(),
        logging_nan_inf_filter=False,
        **changes,
    )
    assert math.isnan(curve(off)[0])


def test_batches_out_of_pinned_memory_are_copied_without_waiting_unless_asked_otherwise(monkeypatch):
    assert SFTConfig(output_dir="run", use_cpu=True).accelerator_config.non_blocking is False
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # as on a GPU's machine

    def waits(made):
        return not made.accelerator_config.non_blocking

    made = SFTConfig(output_dir="run", bf16=False)
    assert not waits(made) and waits(SFTConfig(output_dir="run", bf16=False, dataloader_pin_memory=False))
    for given, wanted in (({"even_batches": False}, False), ({"non_blocking": False}, True)):
        asked = SFTConfig(output_dir="run", bf16=False, accelerator_config=given)
        assert waits(asked) is wanted and waits(dataclasses.replace(asked)) is wanted
    plain = trl.SFTConfig(output_dir="run", bf16=False)
    assert not waits(config_settings.as_config(SFTConfig, SFTTrainer, plain)) and waits(plain)


@pytest.mark.parametrize("plan", ["keep", "offload"])
def test_a_recorded_step_is_let_go_of_at_the_end_and_where_memory_is_short_for_evaluations(
    plan, build_model, tokenizer, dataset, settings
):
    model = fastft.compile(build_model(), plan=plan, backend="eager")
    more = {"train_dataset": dataset, "eval_dataset": dataset, "processing_class": tokenizer}
    made = SFTTrainer(model, SFTConfig(**settings), **more)
    made.replayer = Replayer(model, None, recording="a recording")
    made.evaluate()
    assert (made.replayer.recording is None) is (plan == "offload")
    made.replayer = Replayer(model, lambda batch, items: step.loss(model, batch, items), recording="a recording")
    made.train()
    assert made.replayer.recording is None and made.replayer.model is model


def test_accumulation_is_one_equivalence_class(build_model, tokenizer, dataset, settings):
    """1 x 8, 2 x 4, 4 x 2 and 8 x 1 micro-batches of unequal rows; padded and padding-free."""
    runs = []
    for size, accumulate, free in [(8, 1, False), (1, 8, False), (4, 2, False), (2, 4, True), (8, 1, True)]:
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate, "max_steps": 2}
        if free:
            changes |= {"padding_free": True, "max_length": None}
        runs.append(train(build_model(), tokenizer, dataset, settings, **changes))
    for run in runs[1:]:
        torch.testing.assert_close(curve(run), curve(runs[0]), rtol=1e-5, atol=0)
        torch.testing.assert_close(curve(run, "grad_norm"), curve(runs[0], "grad_norm"), rtol=1e-4, atol=0)
    residual = sum(curve(run)[1] - curve(runs[0])[1] for run in runs) / len(runs)
    assert abs(residual) < 1e-5 * curve(runs[0])[1]


def test_resume_continues_the_same_curve(build_model, tokenizer, dataset, settings, tmp_path):
    """3 + 3 steps equal 6, bit for bit, in fp32 eager with dropout and a decaying rate."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    common = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = train(build_model(dropout=0.1), tokenizer, dataset, settings, **common, output_dir=str(tmp_path / "whole"))
    cut = {**common, "output_dir": str(tmp_path / "cut")}
    first = train(build_model(dropout=0.1), tokenizer, dataset, settings, **cut, extra={"callbacks": [Stop()]})
    assert len(curve(first)) == 3
    fresh = build_model(dropout=0.1)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(1.0 if not parameter.requires_grad else 0.5)
    second = train(fresh, tokenizer, dataset, settings, **cut, resume=str(tmp_path / "cut/checkpoint-3"))
    assert curve(second) == curve(whole)
    assert curve(second, "grad_norm") == curve(whole, "grad_norm")
    ours, theirs = trained(second), trained(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    lines = [json.loads(line) for line in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["tokens"] == whole.recorder.rows[-1]["tokens"]


def test_evaluation_equals_direct_computation(build_model, build_rows, tokenizer, dataset, settings):
    held = build_rows(7, seed=9)
    model = build_model()
    logits_seen = []

    def compute_metrics(prediction):
        logits_seen.append(prediction.predictions.shape)
        return {"rows": len(prediction.label_ids)}

    rows = sum(step.token_statistics(model.eval(), collate([row])) for row in held).sum(0)
    for extra in ({}, {"compute_metrics": compute_metrics}):
        made = SFTTrainer(
            model, SFTConfig(**settings, per_device_eval_batch_size=3), train_dataset=dataset, compile=False,
            eval_dataset=Dataset.from_list(held), processing_class=tokenizer, **extra,
        )  # fmt: skip
        metrics = made.evaluate()
        assert metrics["eval_loss"] == pytest.approx((rows[0] / rows[2]).item(), rel=1e-5)
        assert metrics["eval_perplexity"] == pytest.approx(math.exp((rows[0] / rows[2]).item()), rel=1e-5)
        assert metrics["eval_mean_token_accuracy"] == pytest.approx((rows[1] / rows[2]).item(), rel=1e-6)
        assert metrics["eval_num_targets"] == rows[2].item()
    assert metrics["eval_rows"] == 7 and logits_seen[0][-1] == 96


def test_rates_reach_their_groups(build_model, tokenizer, dataset, settings):
    model = build_model(modules_to_save=["embed_tokens", "lm_head"])
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    made = train(
        model,
        tokenizer,
        dataset,
        settings,
        embedding_learning_rate=0.0,
        loraplus_ratio=4.0,
        lr_scheduler_type="constant",
    )
    groups = {}
    for group in made.optimizer.param_groups:
        for parameter in group["params"]:
            groups[id(parameter)] = group["lr"]
    rates = {name: groups[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert rates and all(
        rate == (0.0 if "modules_to_save" in name else 4e-2 if "lora_B" in name else 1e-2)
        for name, rate in rates.items()
    )
    after = trained(made)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if "lora_" in name}


def test_rates_that_nothing_would_use_are_refused(build_model, tokenizer, dataset, settings):
    with pytest.raises(UsageError, match=r"loraplus_ratio.*trainable LoRA matrices"):
        train(build_model(lora=False), tokenizer, dataset, settings, loraplus_ratio=2.0)
    with pytest.raises(UsageError, match=r"embedding_learning_rate.*embeddings are trained"):
        train(build_model(), tokenizer, dataset, settings, embedding_learning_rate=1e-5)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_eight_bit_optimizers(name, build_model, tokenizer, dataset, settings):
    made = train(
        build_model(), tokenizer, dataset, settings, optim=name, loraplus_ratio=2.0, lr_scheduler_type="constant"
    )
    assert type(made.optimizer.optimizer).__module__.startswith("bitsandbytes")
    assert curve(made)[-1] < curve(made)[0]
    assert {group["lr"] for group in made.optimizer.param_groups} == {1e-2, 2e-2}


def test_early_stopping(build_model, build_rows, tokenizer, dataset, settings, capsys):
    """With a threshold no step reaches, the first evaluation is the best and two more are waited for."""
    changes = {
        "max_steps": 10, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "early_stopping_patience": 2, "early_stopping_threshold": 1e9, "learning_rate": 0.0,
    }  # fmt: skip
    held = {"eval_dataset": Dataset.from_list(build_rows(3, seed=4))}
    made = train(build_model(), tokenizer, dataset, settings, **changes, extra=held)
    assert made.state.global_step == 3
    record = json.loads((Path(settings["output_dir"]) / "run.json").read_text())
    assert record["status"] == "stopped early"
    told = "stopped early at step 3: eval_loss has not improved by more than 1e+09 for 2 evaluations; "
    assert record["notes"] == [told + "the weights are those of step 1"]
    assert f"fastft: {record['notes'][0]}; " in capsys.readouterr().out
    assert record["best"] == {"step": 1, "metric": "eval_loss", "value": record["evaluation"]["eval_loss"]}
    best = Path(made.state.best_model_checkpoint)
    assert best.name == "checkpoint-1" and best.is_dir()
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    with pytest.raises(UsageError, match="early_stopping_patience"):
        train(build_model(), tokenizer, dataset, settings, **{**changes, "eval_strategy": "no", "save_strategy": "no"})


def test_checkpoints_rotate(build_model, tokenizer, dataset, settings):
    made = train(build_model(), tokenizer, dataset, settings, save_strategy="steps", save_steps=1, save_total_limit=2)
    folder = Path(made.args.output_dir)
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["checkpoint-3", "checkpoint-4"]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_model_is_given_back_unchanged(build_model, tokenizer, dataset, settings, monkeypatch):
    """TRL's fused forward, accelerate's autocast wrapper and telemetry leave no trace; fp32 adapters stay fp32."""
    import trl.trainer.base_trainer as base

    monkeypatch.setattr(base, "send_telemetry", lambda **kwargs: pytest.fail("telemetry was sent"))
    model = build_model(dropout=0.0)
    model.get_base_model().is_loaded_in_4bit = True  # TRL then rounds adapters to bfloat16
    before = {n: p.data.clone() for n, p in model.named_parameters() if p.requires_grad}
    config = {**settings, "bf16": True, "max_steps": 1, "learning_rate": 0.0, "weight_decay": 0.0}
    del model.get_base_model().is_loaded_in_4bit
    model.is_loaded_in_4bit = True
    made = SFTTrainer(model, SFTConfig(**config), train_dataset=dataset, processing_class=tokenizer, compile=False)
    assert all(torch.equal(p.data, before[n]) for n, p in model.named_parameters() if p.requires_grad)
    for part in (model, model.get_base_model()):
        assert "forward" not in part.__dict__
    assert "get_output_embeddings" not in model.__dict__
    made.train()
    for part in (model, model.get_base_model()):
        assert not {"forward", "_original_forward"} & set(part.__dict__)


def test_lora_on_the_head_trains(build_model, tokenizer, dataset, settings):
    model = build_model(targets=["q_proj", "lm_head"])
    before = {n: p.data.clone() for n, p in model.named_parameters() if "lm_head" in n and p.requires_grad}
    train(model, tokenizer, dataset, settings)
    assert before and all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_older_scripts(build_model, tokenizer, build_rows, settings, capsys):
    from transformers import TrainingArguments

    texts = Dataset.from_dict({"body": [" ".join(f"w{i % 80}" for i in row["input_ids"]) for row in build_rows()]})
    older = {key: settings[key] for key in settings if key != "max_length"}
    made = SFTTrainer(
        model=build_model(), tokenizer=tokenizer, train_dataset=texts, dataset_text_field="body", max_seq_length=32,
        dataset_num_proc=1, packing=False, args=TrainingArguments(**older), compile=False,
    )  # fmt: skip
    said = capsys.readouterr().out
    assert made.args.max_length == 32 and made.args.dataset_text_field == "body" and made.processing_class is tokenizer
    for name in ("dataset_text_field", "max_seq_length", "dataset_num_proc", "packing"):
        assert said.count(f"SFTTrainer({name}=...)") == 1
    made.train()
    assert len(curve(made)) == 4
    assert SFTConfig(**settings | {"max_seq_length": 17}).max_length == 17


def test_unknown_names_are_refused_with_the_nearest(build_model, tokenizer, dataset, settings):
    with pytest.raises(UsageError, match="did you mean 'learning_rate'"):
        SFTConfig(learning_rat=1e-3)
    with pytest.raises(UsageError, match="eval_strategy"):
        SFTConfig(evaluation_strategy="no")
    with pytest.raises(UsageError, match="did you mean 'train_dataset'"):
        SFTTrainer(build_model(), SFTConfig(**settings), train_datset=dataset)
    with pytest.raises(UsageError) as caught:
        sft(build_model(), tokenizer, dataset, learning_rat=1, bach_size=2)
    assert "did you mean 'learning_rate'" in str(caught.value) and "did you mean 'batch_size'" in str(caught.value)
    with pytest.raises(UsageError, match="same setting"):
        sft(build_model(), tokenizer, dataset, batch_size=1, per_device_train_batch_size=2)
    with pytest.raises(UsageError) as caught:
        SFTConfig(output_dir="x", use_cpu=True, gradient_accumulation_steps=0, learning_rate=float("nan"))
    assert "gradient_accumulation_steps" in str(caught.value) and "learning_rate" in str(caught.value)


def test_bad_data_is_refused(build_model, tokenizer, dataset, settings):
    empty = Dataset.from_dict({"input_ids": [], "labels": []})
    with pytest.raises(DataError, match="at least one row"):
        sft(build_model(), tokenizer, empty)
    with pytest.raises(DataError, match="at least one row"):
        SFTTrainer(build_model(), SFTConfig(**settings), train_dataset=empty, processing_class=tokenizer)
    rows = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
        {"input_ids": [8, 9], "labels": [8, -100]},
        {"input_ids": [], "labels": []},
    ]
    with pytest.raises(DataError) as caught:
        sft(build_model(), tokenizer, Dataset.from_list(rows))
    assert "row 1, labels" in str(caught.value) and "row 2, input_ids" in str(caught.value)
    with pytest.raises(DataError, match=r"train row 0.*max_length=4"):
        sft(build_model(), tokenizer, Dataset.from_list([{"input_ids": [7] * 9}]), max_length=4)
    with pytest.raises(UsageError, match="resume"):
        sft(build_model(), tokenizer, dataset, output_dir=settings["output_dir"], resume=True)


def test_sft_from_messages_to_result(build_model, tokenizer, tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"w{i} w{i + 1}"},
                {"role": "assistant", "content": f"w{i + 2} w{i}"},
            ]
        }
        for i in range(8)
    ]
    result = sft(
        build_model(), tokenizer, rows, tmp_path / "run", eval=rows[:2], steps=3, batch_size=4, log_every=1,
        save_every=3, learning_rate=1e-2, compile=False, disable_tqdm=True,
    )  # fmt: skip
    assert [number for number, _ in result.losses] == [1, 2, 3] and result.final_loss == result.losses[-1][1]
    assert result.final_loss < result.losses[0][1]
    assert result.record["status"] == "finished" and "eval_loss" in result.metrics
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"metrics.jsonl", "loss.png", "run.json", "README.md", "checkpoint-3", "adapter_model.safetensors"} <= names
    assert not [name for name in names if name.startswith(".")]
    again = sft(
        build_model(seed=3), tokenizer, rows, tmp_path / "run", steps=4, batch_size=4, log_every=1, learning_rate=1e-2,
        compile=False, resume=True, disable_tqdm=True,
    )  # fmt: skip
    assert [number for number, _ in again.losses] == [1, 2, 3, 4]


@pytest.mark.parametrize("packing", [False, True])
def test_rows_that_all_fit_are_gone_over_by_no_bar(
    packing, build_model, tokenizer, dataset, settings, capfd, monkeypatch
):
    monkeypatch.setattr(bars, "LARGE", len(dataset))
    for length, shown in ((64, 0), (20, 2)):
        args = SFTConfig(**{**settings, "max_length": length, "packing": packing})
        made = SFTTrainer(build_model(), args, train_dataset=dataset, processing_class=tokenizer, compile=False)
        said = capfd.readouterr().err
        assert sum(bar in said for bar in ("Truncating", "Dropping fully masked")) == shown
        cut = [ids[:length] for ids in dataset["input_ids"]]
        assert made.args.max_length == length
        assert sum(map(len, made.train_dataset["input_ids"])) == sum(map(len, cut))
        if not packing:
            assert made.train_dataset["input_ids"][:] == cut


def test_what_is_cut_is_said(build_model, tokenizer, dataset, settings, capsys):
    args = SFTConfig(**{**settings, "max_length": 6})
    with pytest.raises(DataError, match=r"with nothing left to learn within max_length=6.*at most 0.00%.*max_unlearn"):
        SFTTrainer(build_model(), args, train_dataset=dataset, processing_class=tokenizer, compile=False)
    none = SFTConfig(**{**settings, "max_length": 2, "max_unlearnable": 0.5})
    with pytest.raises(DataError) as caught:  # none would be left: that they may be left out is no remedy
        lost = dataset.filter(lambda row: row["labels"][1] == -100)
        SFTTrainer(build_model(), none, train_dataset=lost, processing_class=tokenizer, compile=False)
    assert len(lost) == 15
    assert str(caught.value).endswith("at most 50.00%, got '15 of 15 (100.00%)'. Raise max_length.")
    args = SFTConfig(**{**settings, "max_length": 6, "max_unlearnable": 1.0})
    made = SFTTrainer(build_model(), args, train_dataset=dataset, processing_class=tokenizer, compile=False)
    said = capsys.readouterr().out
    lost = len(dataset) - len(made.train_dataset)
    assert lost and f"{lost} of {len(dataset)} rows have nothing to learn" in said
    longer = sum(len(ids) > 6 for ids in dataset["input_ids"])
    assert longer and f"{longer} of {len(dataset)} rows are longer than max_length=6" in said
    args = SFTConfig(**{**settings, "max_length": 6, "packing": True, "max_unlearnable": 1.0})
    SFTTrainer(build_model(), args, train_dataset=dataset, processing_class=tokenizer, compile=False)
    assert f"{longer} of {len(dataset)} rows are longer than max_length=6" in capsys.readouterr().out


@pytest.mark.parametrize("packing", [False, True])
def test_rows_longer_than_the_models_positions_are_refused(packing, build_model, tokenizer, settings):
    """What the model was not made for is not trained in silence, whatever max_length says."""
    ids = [10 + number % 80 for number in range(130)]
    rows = Dataset.from_list([{"input_ids": ids[:length], "labels": ids[:length]} for length in (20, 130)])
    told = "train rows: expected at most the model's 128, got 'up to 130 tokens'"
    with pytest.raises(DataError, match=told) as caught:
        train(build_model(), tokenizer, rows, settings, max_length=256, packing=packing)
    assert "fastft.load(..., max_length=130)" in str(caught.value)
    for cut in ({"max_length": 128}, {"max_length": 256, "packing": True}):
        fitting = rows if cut["max_length"] == 128 else Dataset.from_list([rows[0]] * 9)
        train(build_model(), tokenizer, fitting, settings, **cut)


def test_a_routers_loss_is_that_of_the_batch_however_it_is_accumulated(build_model, build_rows, tokenizer, settings):
    """Of rows that are all the same it is the same for every micro-batch."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None, "router_aux_loss_coef": 0.7}
    data, losses = Dataset.from_list(build_rows(1) * 4), []
    for accumulate in (1, 2, 4):
        model = build_model("mixtral", lora=False, **sizes)
        changes = {"per_device_train_batch_size": 4 // accumulate, "gradient_accumulation_steps": accumulate}
        args = SFTConfig(**{**settings, **changes, "max_steps": 2, "optim": "sgd"})
        made = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, compile=False)
        made.train()
        losses.append([line["loss"] for line in made.state.log_history if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][0] > 4.6 + 0.5  # a loss of the tokens alone would be ln 96 or so


def test_the_last_rows_are_left_out_of_training_and_of_no_evaluation(build_model, build_rows, tokenizer, settings):
    rows, found = Dataset.from_list(build_rows(5)), []
    for dropped in (False, True):
        args = SFTConfig(**settings, dataloader_drop_last=dropped, per_device_eval_batch_size=4)
        made = SFTTrainer(
            build_model(), args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer, compile=False
        )
        assert len(made.get_train_dataloader()) == (2 if dropped else 3)
        found.append({name: made.evaluate()[f"eval_{name}"] for name in ("loss", "num_targets")})
        assert made.args.dataloader_drop_last is dropped
    assert found[0] == found[1]


def test_training_without_a_whole_batch_is_refused(build_model, build_rows, tokenizer, settings):
    rows = Dataset.from_list(build_rows(3))
    args = SFTConfig(**{**settings, "per_device_train_batch_size": 4}, dataloader_drop_last=True)
    with pytest.raises(UsageError, match="SFTConfig dataloader_drop_last: expected at least 4 rows, a whole batch"):
        SFTTrainer(build_model(), args, train_dataset=rows, processing_class=tokenizer, compile=False)
