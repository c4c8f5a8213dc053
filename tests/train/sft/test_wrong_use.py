"""What a newcomer gets wrong is told before the work begins."""

import dataclasses
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset, DatasetDict

import fastft
from fastft.errors import DataError, SaveError, UsageError
from fastft.state import update_state
from fastft.train.sft.config import SFTConfig
from fastft.train.sft.run import sft
from fastft.train.sft.trainer import SFTTrainer


def row(answer="w1"):
    return {"messages": [{"role": "user", "content": "w2"}, {"role": "assistant", "content": answer}]}


OPTIONS = {"disable_tqdm": True, "compile": False, "steps": 1, "save_strategy": "no", "max_length": 64}


def test_nothing_is_trainable(build_model, tokenizer, tmp_path):
    model = build_model(lora=False).requires_grad_(False)
    with pytest.raises(UsageError, match="add_lora"):
        sft(model, tokenizer, [row()], output_dir=tmp_path, **OPTIONS)


def test_model_and_tokenizer_in_the_wrong_places(build_model, tokenizer, tmp_path):
    model = build_model()
    with pytest.raises(UsageError) as caught:
        sft(tokenizer, model, [row()], output_dir=tmp_path)
    assert len(caught.value.problems) == 2
    with pytest.raises(UsageError, match="tuple"):
        sft((model, tokenizer), tokenizer, [row()], output_dir=tmp_path)


@pytest.mark.parametrize(
    "data, told",
    [
        (None, "got None"),
        ("data.jsonl", "a file or folder that exists"),
        (DatasetDict(one=Dataset.from_list([row()]), two=Dataset.from_list([row()])), "Choose one: split='one'"),
        (row(), "into a list"),
        ([{"prompt": "w1", "chosen": "w2", "rejected": "w3"}], "preferences"),
        ([{"prompt": "w1"}], "'prompt' and 'completion'"),
        ([{"mesages": []}], "did you mean 'messages'"),
        ([{"text": "w1"}, {"input_ids": [1, 2]}], "row 1, fields: expected 'text'"),
    ],
)
def test_data_of_a_wrong_kind(data, told, build_model, tokenizer, tmp_path):
    with pytest.raises(DataError, match=told):
        sft(build_model(), tokenizer, data, output_dir=tmp_path, train_on="all")


def test_errors_name_the_data(build_model, tokenizer, tmp_path):
    for eval, told in (([row(""), row()], "^eval row 0, messages"), ([], "^eval data")):
        with pytest.raises(DataError, match=told):
            sft(build_model(), tokenizer, [row()], eval=eval, output_dir=tmp_path)
    tokenizer.chat_template = None
    with pytest.raises(DataError) as caught:
        sft(build_model(), tokenizer, [row()] * 3, output_dir=tmp_path)
    assert len(caught.value.problems) == 1


def test_a_list_of_token_ids(build_model, build_rows, tokenizer, tmp_path):
    runs = []
    for data in (build_rows(), Dataset.from_list(build_rows())):
        runs.append(sft(build_model(), tokenizer, data, output_dir=tmp_path, **OPTIONS).losses)
    assert runs[0] == runs[1]


def test_values_that_cannot_be_meant(tmp_path):
    wrong = {
        "max_steps": 0, "learning_rate": "1e-4", "num_train_epochs": -3, "optim": "adamw_8bits",
        "lr_scheduler_type": "cosin", "eval_strategy": "step", "report_to": ["wand"],
        "per_device_train_batch_size": 0,
    }  # fmt: skip
    with pytest.raises(UsageError) as caught:
        SFTConfig(output_dir=str(tmp_path), **wrong)
    assert {problem.where for problem in caught.value.problems} == {f"SFTConfig {name}" for name in wrong}
    for near in ("'adamw_8bit'", "'cosine'", "'steps'", "'wandb'", "without quotes"):
        assert near in str(caught.value)


def test_what_counts_is_a_whole_number(build_model, tokenizer, build_rows, tmp_path):
    wrong = {
        "batch_size": 2.5, "steps": 10.0, "accumulate": 1.5, "eval_batch_size": 0.5, "max_length": 64.5, "seed": 1.5,
        "keep_checkpoints": 2.5, "log_every": 1.5, "save_every": float("inf"), "warmup_steps": 2.5, "packing": True,
        "cuda_graphs": "alway", "epochs": -1,
    }  # fmt: skip
    with pytest.raises(UsageError) as caught:
        sft(build_model(), tokenizer, build_rows(), output_dir=tmp_path, **wrong)
    told = {problem.where.removeprefix("sft "): str(problem) for problem in caught.value.problems}
    assert told.keys() == wrong.keys() - {"packing"}
    assert "expected a whole number of at least 1, got 2.5" in told["batch_size"]
    assert told["steps"].endswith("expected a whole number of at least -1, got 10.0. Write 10.")
    assert "a whole number of steps, or a share of them all below 1, got 1.5" in told["log_every"]
    assert not list(tmp_path.iterdir())


def test_negative_shares_are_told_together(tmp_path):
    wrong = {"save_steps": -5, "eval_steps": -2, "logging_steps": -3, "warmup_steps": -4}
    wrong |= {"label_smoothing_factor": 3, "seed": -1}
    with pytest.raises(UsageError) as caught:
        SFTConfig(output_dir=str(tmp_path), **wrong)
    assert "label_smoothing_factor: expected at most 1, got 3" in str(caught.value)
    with pytest.raises(UsageError, match=r"logging_steps: expected a number of steps above 0.*got 0"):
        SFTConfig(output_dir=str(tmp_path), logging_steps=0)
    assert {problem.where: problem.value for problem in caught.value.problems} == {
        f"SFTConfig {name}": value for name, value in wrong.items()
    }


def test_switches_and_zeros_are_told_together(tmp_path):
    wrong = {"packing": "yes", "padding_free": 2, "fp16": "False", "save_total_limit": 0, "save_steps": 0}
    wrong |= {"eval_steps": 0}
    with pytest.raises(UsageError) as caught:
        SFTConfig(output_dir=str(tmp_path), **wrong, eval_strategy="steps")
    told = {problem.where.removeprefix("SFTConfig "): str(problem) for problem in caught.value.problems}
    assert told.keys() == wrong.keys()
    assert told["packing"] == "SFTConfig packing: expected True or False, got 'yes'"
    assert told["fp16"].endswith("got 'False'. Write False without quotes.")
    assert "at least 1, got 0. Left out, all are kept; save_strategy='no' writes none." in told["save_total_limit"]
    assert "above 0, or a share of them, got 0. save_strategy='no' means never." in told["save_steps"]
    good = {"packing": None, "padding_free": 0, "save_total_limit": None, "save_steps": 0, "save_strategy": "no"}
    assert SFTConfig(output_dir=str(tmp_path), **good).save_steps == 0


@pytest.mark.parametrize("train", ["sft", "preference", "grpo"])
def test_evaluations_want_data(train, build_model, tokenizer, build_rows, tmp_path):
    rows = {"sft": build_rows(), "preference": [{"prompt": "w1", "chosen": "w2", "rejected": "w3"}], "grpo": ["w1"]}
    given = {"rewards": [len]} if train == "grpo" else {}

    def told(**options):
        with pytest.raises(UsageError) as caught:
            getattr(fastft, train)(build_model(), tokenizer, rows[train], **given, output_dir=tmp_path, **options)
        return [(problem.where.split()[-1], problem.value) for problem in caught.value.problems]

    both = {"eval_every": 5, "early_stopping_patience": 2, "learning_rate": -1}
    assert told(**both) == [("eval_every", 5), ("early_stopping_patience", 2), ("learning_rate", -1)]
    assert told(eval_strategy="epoch") == [("eval_strategy", "epoch")]
    assert told(early_stopping_patience=2) == [("early_stopping_patience", 2)]
    assert told(load_best_model_at_end=True, save_every=2) == [("load_best_model_at_end", True)]
    assert told(eval=rows[train], eval_every=0) == [("eval_every", 0)]
    assert told(eval_strategy="no", eval_every=5) == [("eval_every", 5)]
    assert told(eval_strategy="no", learning_rate=-1) == [("learning_rate", -1)]
    assert not list(tmp_path.iterdir())


def test_a_trainer_wants_data_for_evaluations_too(build_model, tokenizer, dataset, settings):
    more = {"train_dataset": dataset, "processing_class": tokenizer, "compile": False}
    for wrong, names in (
        (
            {"eval_strategy": "steps", "early_stopping_patience": 2, "save_strategy": "best"},
            ["eval_strategy", "early_stopping_patience"],
        ),
        (
            {"eval_strategy": "steps", "load_best_model_at_end": True, "save_strategy": "best"},
            ["eval_strategy", "load_best_model_at_end"],
        ),
        ({"eval_strategy": "steps"}, ["eval_strategy"]),
        ({"eval_strategy": "epoch", "eval_steps": 5}, ["eval_strategy", "eval_steps"]),
    ):
        with pytest.raises(UsageError, match="expected evaluation data beside it") as caught:
            SFTTrainer(build_model(), SFTConfig(**settings | wrong), **more)
        assert [problem.where for problem in caught.value.problems] == [f"SFTConfig {name}" for name in names]


def test_switches_of_numpy_and_of_a_users_own_config_are_taken(tmp_path):
    annotated = dataclasses.make_dataclass("Own", [("mine", "OnlyWhileChecking", None)], bases=(SFTConfig,))
    made = annotated(output_dir=str(tmp_path), packing=np.True_, bf16=np.bool_(False), use_cpu=True)
    assert made.packing and not made.bf16
    with pytest.raises(UsageError, match="Own packing: expected True or False, got 'yes'"):
        annotated(output_dir=str(tmp_path), packing="yes")


def test_what_was_taken_without_a_word_before(build_model, tokenizer, build_rows, tmp_path):
    """Each trained nothing, or failed in the middle of the first step, or in words of transformers."""

    def told(**wrong):
        with pytest.raises(UsageError) as caught:
            SFTConfig(output_dir=str(tmp_path), **wrong)
        return [(problem.where.split()[-1], problem.value) for problem in caught.value.problems]

    assert told(pad_to_multiple_of=0) == [("pad_to_multiple_of", 0)]
    assert told(pad_to_multiple_of=-4) == [("pad_to_multiple_of", -4)]
    assert told(num_train_epochs=0) == [("num_train_epochs", 0)]
    assert SFTConfig(output_dir=str(tmp_path), num_train_epochs=0, max_steps=2).max_steps == 2
    for name in ("adam", "adamw"):
        with pytest.raises(UsageError, match="did you mean 'adamw_torch'"):
            SFTConfig(output_dir=str(tmp_path), optim=name)
    with pytest.raises(UsageError, match="unknown argument 'lr'; here it is learning_rate"):
        sft(build_model(), tokenizer, build_rows(), tmp_path, lr=1e-4)


def test_compile_is_a_switch(build_model, tokenizer, dataset, settings):
    with pytest.raises(UsageError, match="compile: expected True or False, got 'no'"):
        SFTTrainer(
            build_model(), SFTConfig(**settings), train_dataset=dataset, processing_class=tokenizer, compile="no"
        )


def test_shares_and_whole_numbers_are_taken(tmp_path):
    good = {"warmup_steps": 0.1, "logging_steps": 5.0, "save_steps": 0.5, "num_train_epochs": 1.5, "max_steps": -1}
    made = SFTConfig(output_dir=str(tmp_path), **good)
    assert {name: getattr(made, name) for name in good} == good


def test_the_length_is_that_of_the_loaded_model(build_model, tokenizer, dataset, settings, capsys):
    del settings["max_length"]
    more = {"train_dataset": dataset, "processing_class": tokenizer, "compile": False}
    lengths = []
    for loaded, given in ((77, {}), (77, {"max_length": 1024}), (77, {"max_length": None}), (None, {})):
        model = build_model()
        update_state(model, max_length=loaded)
        args = SFTConfig(**settings, **given)
        lengths.append(SFTTrainer(model, args, **more).args.max_length)
        assert args.max_length == given.get("max_length", 1024)  # the user's own config stays
        assert ("max_length=77, as the model was loaded" in capsys.readouterr().out) is (loaded == 77 and not given)
    assert lengths == [77, 1024, None, 1024]
    stock = trl.SFTConfig(**settings, gradient_checkpointing=False)
    assert SFTTrainer(model, stock, **more).args.max_length == 1024


def test_lines_of_bitsandbytes_are_kept_back_only_meanwhile(caplog):
    from fastft.noise import quiet

    loggers = [logging.getLogger(f"bitsandbytes.{name}") for name in ("backends.cpu.ops", "autograd._functions")]
    lines = ["Failed to load CPU gemm_4bit_forward from kernels-community: %s", "MatMul8bitLt: inputs will be cast %s"]

    def say():
        for logger, line in zip(loggers, lines, strict=True):
            logger.warning(line, "x")
            logger.warning("another line")
        told = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return told

    before = [list(logger.filters) for logger in loggers]
    assert len(say()) == 4
    with quiet():
        assert say() == ["another line"] * 2
    assert len(say()) == 4 and [list(logger.filters) for logger in loggers] == before


def test_nothing_is_said_of_a_cpu_kernel_when_a_name_is_looked_up():
    """TRL and PEFT import bitsandbytes, which warns where its CPU could do more."""
    program = (
        "import logging, sys\n"
        "class Said(logging.Handler):\n"
        "    def emit(self, record): print('said', record.msg)\n"
        "logging.getLogger('bitsandbytes').addHandler(Said())\n"
        "import fastft\nfastft.SFTTrainer\nassert 'bitsandbytes.backends.cpu.ops' in sys.modules\n"
        "assert not logging.getLogger('bitsandbytes.backends.cpu.ops').filters\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "gemm_4bit_forward" not in done.stdout + done.stderr


def test_the_trainer_refuses_the_same(build_model, tokenizer, settings):
    def made(model, rows):
        more = {"train_dataset": rows, "processing_class": tokenizer, "compile": False}
        return SFTTrainer(model, SFTConfig(**settings), **more)

    good = Dataset.from_list([{"text": "w1 w2"}])
    for wrong in (None, tokenizer, (build_model(), tokenizer)):
        with pytest.raises(UsageError, match="expected a model"):
            made(wrong, good)
    with pytest.raises(DataError, match="into a list"):
        made(build_model(), row())
    with pytest.raises(DataError) as caught:
        made(build_model(), Dataset.from_list([{"text": "w1 w2"}, {"text": None}, {"text": " "}]))
    assert [problem.where for problem in caught.value.problems] == [f"train row {i}, text" for i in (1, 2)]
    with pytest.raises(DataError, match="row 1, messages"):
        made(build_model(), Dataset.from_list([row(), {"messages": []}]))


def test_an_output_folder_that_cannot_be_made(build_model, tokenizer, dataset, settings, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/below"):
        args = SFTConfig(**{**settings, "output_dir": str(tmp_path / place)})
        with pytest.raises(SaveError, match="output_dir"):
            SFTTrainer(build_model(), args, train_dataset=dataset, processing_class=tokenizer, compile=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_older_warm_up_and_bf16_without_a_gpu_are_taken(tmp_path):
    config = SFTConfig(output_dir=str(tmp_path), warmup_ratio=0.25, bf16=True)
    assert config.warmup_steps == 0.25 and config.get_warmup_steps(40) == 10
    assert config.bf16 and config.use_cpu is not torch.accelerator.is_available()
    with pytest.raises(UsageError, match=r"warmup_ratio.*a share of all steps"):
        SFTConfig(output_dir=str(tmp_path), warmup_ratio=3)


def test_what_train_on_says_is_not_said_otherwise(tmp_path, build_model, tokenizer):
    """sft has made the labels by then, so that these would do nothing."""
    with pytest.raises(UsageError) as caught:
        fastft.sft(
            build_model(), tokenizer, [], tmp_path, assistant_only_loss=False, completion_only_loss=True, overlong="cut"
        )
    remedy = "train_on says what is learnt: 'assistant', 'last', 'completion' or 'all'."
    assert [str(problem) for problem in caught.value.problems][1:] == [
        f"sft assistant_only_loss: expected it left out, got False. {remedy}",
        f"sft completion_only_loss: expected it left out, got True. {remedy}",
    ]


def test_metrics_without_rows_to_measure_are_refused(build_model, tokenizer, tmp_path):
    def share(predictions):
        return {"share": 1.0}

    with pytest.raises(UsageError) as caught:
        sft(build_model(), tokenizer, [row()], tmp_path, compute_metrics=share, overlong="cut", **OPTIONS)
    assert [problem.where for problem in caught.value.problems] == ["overlong", "sft compute_metrics"]
    told = "sft compute_metrics: expected evaluation data beside it, got 'share'. Pass them (eval=, of a trainer"
    assert told in str(caught.value)


def test_a_text_that_is_too_long_is_told_in_our_words_alone(build_model, tokenizer, tmp_path, monkeypatch):
    """transformers warns of indexing errors, of what is cut or refused here."""
    logger, said = logging.getLogger("transformers.tokenization_utils_base"), []

    class Heard(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    handler = Heard()
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.WARNING)
    monkeypatch.setattr(tokenizer, "model_max_length", 8)

    def heard():
        tokenizer.deprecation_warnings.clear()  # it says so once
        told, said[:] = list(said), []
        return told

    tokenizer("w1 " * 20)
    assert "indexing errors" in heard()[0]
    rows = [{"prompt": "w1 " * 40, "chosen": " w2", "rejected": " w3"}]
    with pytest.raises(DataError, match="all 1 have a prompt that fills max_length=16"):
        fastft.preference(build_model(), tokenizer, rows, tmp_path, max_length=16, compile=False, steps=1)
    assert heard() == []
    model = build_model()
    update_state(model, max_length=16)
    with pytest.raises(UsageError, match="fewer than the model's 16 tokens"):
        fastft.generate(model, tokenizer, "w1 " * 40)
    assert heard() == []
