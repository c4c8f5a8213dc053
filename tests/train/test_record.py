"""The run record: every number in it is recomputed here from the data."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from fastft.data.collate import collate
from fastft.train import card, checkpoint, flops, plots, record, spent, step
from fastft.train.grpo.run import GrpoResult
from fastft.train.preference.run import PreferenceResult
from fastft.train.sft.config import SFTConfig
from fastft.train.sft.run import SftResult
from fastft.train.sft.trainer import SFTTrainer


def test_record_of_a_run(build_model, build_rows, tokenizer, settings):
    rows = build_rows(8)
    config = SFTConfig(**{**settings, "num_train_epochs": 2, "max_steps": -1, "eval_strategy": "epoch"})
    data, held = Dataset.from_list(rows), Dataset.from_list(rows[:2])
    model = build_model()
    made = SFTTrainer(model, config, train_dataset=data, eval_dataset=held, processing_class=tokenizer, compile=False)
    made.train()
    folder = Path(settings["output_dir"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9)) and len(lines) == 10
    history = [row for row in made.state.log_history if "loss" in row]
    for line, row in zip(steps, history, strict=True):
        assert (line["loss"], line["grad_norm"], line["learning_rate"]) == (
            row["loss"],
            row["grad_norm"],
            row["learning_rate"],
        )
        for name in spent.TOKENS:
            assert line["tokens_per_second"][name] > 0
    real = 2 * sum(len(row["input_ids"]) for row in rows)
    targets = 2 * sum(label != -100 for row in rows for label in row["labels"][1:])
    assert (steps[-1]["tokens"]["non_padding"], steps[-1]["tokens"]["loss_bearing"]) == (real, targets)
    run = json.loads((folder / "run.json").read_text())
    assert run["tokens"] == steps[-1]["tokens"] and run["tokens"]["all"] >= real
    assert run["tokens_per_second"]["loss_bearing"] == pytest.approx(targets / run["train_seconds"])
    assert run["loss"] == {"first": steps[0]["loss"], "last": steps[-1]["loss"]}
    assert run["status"] == "finished" and run["mfu"] is None and run["memory"]["predicted_bytes"] is None
    assert run["memory"]["measured_peak_bytes"] > 2**20
    assert run["versions"]["torch"] == torch.__version__.split("+")[0] or run["versions"]["torch"] == torch.__version__
    assert run["seed"] == config.seed and run["config"]["learning_rate"] == 1e-2 and run["rewrites"] is None
    assert run["data"] == {"sha256": record.data_hash(data), "rows": 8}
    assert run["loss_head"] == {"fused": True, "reason": ""} and run["model"]["family"] == "llama"
    assert run["evaluation"]["eval_loss"] == lines[-1]["eval_loss"]
    # work: 2 layers x (q 32x32, k and v 32x16, o 32x32, gate, up and down 32x64), head 32 x 96, rank 4 on all of them
    dense = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3)
    lora = 2 * 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)
    assert run["work"] == {"frozen": dense, "trained": lora, "head": 32 * 96}
    pairs = 2 * sum(n * (n + 1) // 2 for n in (len(row["input_ids"]) for row in rows))
    expected = real * (4 * dense + 6 * lora) + targets * 4 * 32 * 96 + 12 * 32 * 2 * pairs
    assert run["flops"] == pytest.approx(expected)
    card = (folder / "README.md").read_text()
    assert f"{real:,} ({targets:,})" in card and run["data"]["sha256"] in card and "loss.png" in card
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_title_of_a_card_is_no_path(tmp_path, monkeypatch):
    """But the table has it whole, and a folder is no base model of a hub, however it is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "first").mkdir(parents=True)
    names = [(str(tmp_path / "gone" / "tiny"), "tiny"), ("run/first", "first"), ("./run/first/", "first")]
    for name, title in [*names, (".", tmp_path.name), ("~/models/tiny", "tiny")]:
        made = card.model_card({"model": {"name": name}})
        assert f"\n# {title}, fine-tuned with fastft\n" in made and f"| base model | {name} |" in made
        assert "base_model:" not in made
    made = card.model_card({"model": {"name": "org/tiny"}})
    assert "\n# org/tiny, fine-tuned with fastft\n" in made and "\nbase_model: org/tiny\n" in made
    assert "\n# A model, fine-tuned with fastft\n" in card.model_card({})


def test_a_failed_run_says_so(build_model, tokenizer, dataset, settings):
    made = SFTTrainer(
        build_model(), SFTConfig(**settings), train_dataset=dataset, processing_class=tokenizer, compile=False
    )

    def broken(*args, **kwargs):
        raise RuntimeError("out of luck")

    made.create_scheduler = made.create_scheduler
    made.training_step = broken
    with pytest.raises(RuntimeError, match="out of luck"):
        made.train()
    run = json.loads((Path(settings["output_dir"]) / "run.json").read_text())
    assert run["status"] == "failed" and run["error"] == "RuntimeError: out of luck"
    assert run["steps"] == 0 and run["loss"] == {"first": None, "last": None} and "measured_peak_bytes" in run["memory"]
    made.recorder.picture = ("loss.png", lambda *given: 1 / 0)
    with pytest.raises(RuntimeError, match="out of luck"):
        made.train()
    run = json.loads((Path(settings["output_dir"]) / "run.json").read_text())
    told = "RuntimeError: out of luck; what it came to could not be measured (ZeroDivisionError: division by zero)"
    assert run["status"] == "failed" and run["error"] == told


def test_data_hash_sees_ids_labels_order_and_boundaries():
    def hashed(ids, labels):
        return record.data_hash(Dataset.from_dict({"input_ids": ids, "labels": labels}))

    base = hashed([[1, 2], [3]], [[1, 2], [3]])
    assert base == hashed([[1, 2], [3]], [[1, 2], [3]])
    others = [
        hashed([[1, 2], [4]], [[1, 2], [3]]),
        hashed([[1, 2], [3]], [[1, -100], [3]]),
        hashed([[3], [1, 2]], [[3], [1, 2]]),
    ]
    others.append(hashed([[1], [2, 3]], [[1], [2, 3]]))
    assert len({base, *others}) == 5
    sliced = Dataset.from_dict({"input_ids": [[9], [1, 2], [3]], "labels": [[9], [1, 2], [3]]}).select([1, 2])
    assert record.data_hash(sliced) == base


def test_counts_packed_and_padded_and_windows(build_rows):
    rows = build_rows(5)
    lengths = [len(row["input_ids"]) for row in rows]
    targets = sum(label != -100 for row in rows for label in row["labels"][1:])
    for batch in (collate(rows), collate(rows, side="left"), collate(rows, packed=True)):
        counts = flops.count_batch(batch, step.shifted_labels(batch), {6})
        assert counts["non_padding"] == sum(lengths) and counts["loss_bearing"] == targets
        assert counts["pairs"] == sum(n * (n + 1) // 2 for n in lengths)
        assert counts["pairs_6"] == sum(min(i + 1, 6) for n in lengths for i in range(n))
        assert counts["all"] == batch["input_ids"].numel()


def test_frozen_weights_cost_less(build_model):
    lora, full = flops.work_of(build_model(modules_to_save=["lm_head"])), flops.work_of(build_model(lora=False))
    assert (full.frozen, full.trained, full.head, full.head_trained) == (0, lora.frozen, 32 * 96, True)
    assert lora.head == 32 * 96 and lora.head_trained  # the frozen copy that PEFT keeps is not counted
    counts = {"non_padding": 10, "loss_bearing": 5, "pairs": 55}
    assert flops.flops(full, counts) == 10 * 6 * full.trained + 5 * 6 * 32 * 96 + 12 * 32 * 2 * 55


def test_peaks(monkeypatch):
    assert flops.peak_flops("cpu", torch.bfloat16) is None
    for name, peak in [
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("X1", None),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert flops.peak_flops("cuda", torch.bfloat16) == peak
    assert flops.peak_flops("cuda", torch.float32) is None


def test_smoothing_is_corrected_for_its_start():
    assert plots.smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert plots.smooth([1.0, 3.0], 0.5) == pytest.approx([1.0, (0.25 * 1 + 0.5 * 3) / 0.75])


def test_picture_leaves_pyplot_alone(tmp_path):
    import sys

    had = "matplotlib.pyplot" in sys.modules
    plots.plot_run(
        [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 1.0}, {"step": 2, "loss": "nan"}], tmp_path / "loss.png"
    )
    assert ("matplotlib.pyplot" in sys.modules) == had and (tmp_path / "loss.png").stat().st_size > 1000


def test_what_the_last_evaluation_found():
    lines = [{"eval_loss": 2.0, "eval_perplexity": 7.4, "step": 1}, {"eval_loss": 1.0, "step": 2}, {"loss": 3.0}]
    assert record.last_evaluation(lines) == {"eval_loss": 1.0}
    assert record.last_evaluation(lines[:1]) == {"eval_loss": 2.0, "eval_perplexity": 7.4}
    assert record.last_evaluation(lines[2:]) == {}


def test_what_the_last_evaluation_of_each_set_found():
    def line(name, loss, step, **more):
        return {f"eval_{name}_loss": loss, f"eval_{name}_runtime": 0.5, **more, "step": step}

    first = line("a", 4.0, 1, eval_margin=1.0, eval_a_failures=3), line("b", 3.0, 1, eval_margin=2.0)
    lines = [*first, line("b", 2.0, 2, eval_margin=3.0), {"loss": 1.0, "step": 3}, line("a", 1.0, 3, eval_margin=4.0)]
    both = {"eval_a_runtime": 0.5, "eval_b_runtime": 0.5}
    assert record.last_evaluation(lines) == {"eval_a_loss": 1.0, "eval_b_loss": 2.0, "eval_margin": 4.0, **both}
    old = {"eval_a_loss": 4.0, "eval_b_loss": 3.0, "eval_margin": 2.0, "eval_a_failures": 3, **both}
    assert record.last_evaluation(first) == old


def test_an_evaluation_without_a_loss_is_one():
    assert record.last_evaluation([{"eval_reward": 0.5, "step": 1}]) == {"eval_reward": 0.5}


def test_record_of_a_run_with_several_evaluation_sets(build_model, build_rows, tokenizer, settings):
    config = SFTConfig(**{**settings, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1})
    data, held = Dataset.from_list(build_rows(4)), Dataset.from_list(build_rows(2, seed=1))
    made = SFTTrainer(
        build_model(), config, train_dataset=data, eval_dataset={"a": data, "b": held}, processing_class=tokenizer,
        compile=False,
    )  # fmt: skip
    made.train()
    folder = Path(settings["output_dir"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    of_a, of_b = ([line for line in lines if f"eval_{name}_loss" in line] for name in "ab")
    assert [line["step"] for line in of_a] == [line["step"] for line in of_b] == [1, 2]
    last = {key: value for line in (of_a[-1], of_b[-1]) for key, value in line.items() if key.startswith("eval_")}
    assert json.loads((folder / "run.json").read_text())["evaluation"] == last
    card = (folder / "README.md").read_text()
    for line, name in ((of_a[-1], "a"), (of_b[-1], "b")):
        assert f"{name}_loss {line[f'eval_{name}_loss']:.4g}, {name}_perplexity " in card


def test_a_result_is_shown_in_a_line():
    long, big = tuple((step, 1 / step) for step in range(1, 900)), {"rows": "x" * 9999}
    shown = [
        repr(SftResult(long, 0.5, big, "run", big)),
        repr(GrpoResult(long, long, (), long[:1], big, "run", big)),
        repr(PreferenceResult(long, (), long, big, "run", big)),
    ]
    told = "1.0000 (step 1) to 0.0011 (step 899)"
    assert shown[0] == f"SftResult(losses={told}, final_loss=0.5, output_dir='run')"
    assert shown[1] == (
        f"GrpoResult(rewards={told}, losses={told}, kl=none, lengths=1.0000 (step 1), output_dir='run', notes=())"
    )
    assert shown[2] == f"PreferenceResult(losses={told}, accuracies=none, margins={told}, output_dir='run')"


@pytest.fixture
def drawn(monkeypatch):
    """Figures that are drawn, instead of their files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figures = []
    monkeypatch.setattr(FigureCanvasAgg, "print_figure", lambda self, path, **more: figures.append(self.figure))
    monkeypatch.setattr(checkpoint, "write_file", lambda path, write: write(path))
    return figures


def test_the_picture_has_the_loss_of_every_evaluation_set(drawn, tmp_path):
    rows = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 1.5}, {"step": 2, "eval_runtime": 9.0}]
    rows += [{"step": step, f"eval_{name}_loss": 1.0 / step} for step in (1, 2) for name in ("long_rows", "b")]
    plots.plot_run(rows, tmp_path / "loss.png")
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in drawn[0].axes[0].lines}
    assert lines.pop("loss") == lines.pop("loss, smoothed") == ([1], [2.0])
    assert lines == {
        "evaluation loss": ([1], [1.5]),
        "evaluation loss, long_rows": ([1, 2], [1.0, 0.5]),
        "evaluation loss, b": ([1, 2], [1.0, 0.5]),
    }


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 80])
@pytest.mark.parametrize("draw", [plots.plot_run, plots.plot_rewards])
def test_ticks_are_whole_steps(draw, steps, tmp_path, drawn):
    draw([{"step": step, "loss": 1.0 / step, "reward": step} for step in range(1, steps + 1)], tmp_path / "run.png")
    for panel in drawn[0].axes:
        low, high = panel.get_xlim()
        ticks = [tick for tick in panel.get_xticks() if low <= tick <= high]
        assert ticks and all(tick == int(tick) for tick in ticks)


def test_pauses_are_no_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(spent.time, "perf_counter", lambda: now[0])
    clock = spent.Clock()
    clock.start()
    now[0] = 2.0
    clock.step_ended()
    now[0] = 7.0
    clock.leave_out()  # five seconds of evaluation
    now[0] = 8.0
    assert clock.take() == 3.0
    now[0] = 9.0
    clock.leave_out()  # saving straight after the log
    now[0] = 10.0
    assert clock.take() == 1.0


def test_plain_numbers():
    assert checkpoint.plain({"a": [float("inf"), 1.0], 2: None}) == {"a": ["inf", 1.0], "2": None}


@pytest.mark.parametrize("every", [3, 100])
def test_steps_behind_the_last_line_are_counted(every, build_model, build_rows, tokenizer, settings):
    rows = build_rows(8)
    config = SFTConfig(**{**settings, "num_train_epochs": 1, "max_steps": -1, "logging_steps": every})
    data = Dataset.from_list(rows)
    made = SFTTrainer(build_model(), config, train_dataset=data, processing_class=tokenizer, compile=False)
    made.train()
    run = json.loads((Path(settings["output_dir"]) / "run.json").read_text())
    assert run["steps"] == 4 and run["tokens"]["non_padding"] == sum(len(row["input_ids"]) for row in rows)
    assert run["tokens"]["loss_bearing"] == sum(label != -100 for row in rows for label in row["labels"][1:])
    assert run["tokens_per_second"]["non_padding"] == pytest.approx(run["tokens"]["non_padding"] / run["train_seconds"])
    assert run["flops"] > 0
