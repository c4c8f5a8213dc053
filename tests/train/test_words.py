"""Mistakes are told by the names that the caller wrote, in what is expected and to be done as well."""

import pytest
import torch
from transformers.trainer_utils import SchedulerType

import fastft
from fastft.errors import LoadError, Problem, UsageError
from fastft.train import arguments
from fastft.train.words import renamed

PAIRS = [{"prompt": "w1", "chosen": "w2", "rejected": "w3"}]
DATA = {"sft": [{"prompt": "w1", "completion": "w2"}], "preference": PAIRS, "grpo": ["w1", "w2"]}
WRONG = {"batch_size": 0, "steps": 0, "accumulate": 1.5, "schedule": "cosin", "optimizer": "adamw_8bits", "epochs": -3}
WRONG |= {"log_every": 0, "save_every": 0, "keep_checkpoints": 0, "eval_every": 0, "learning_rate": "fast"}

EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "use_cpu": True}


@pytest.fixture
def told(build_model, tokenizer, tmp_path):
    """Call a function of fastft, and return the mistakes by where they are, without the function's name."""

    def call(name, **options):
        given = {"rewards": [len]} if name == "grpo" else {}
        with pytest.raises(UsageError) as caught:
            getattr(fastft, name)(build_model(), tokenizer, DATA[name], output_dir=tmp_path, **given, **options)
        problems = caught.value.problems
        assert str(caught.value) == str(UsageError(*problems))  # the text is theirs, under the names that were written
        assert {problem.where.partition(" ")[0] for problem in problems} == {name}
        return {problem.where.partition(" ")[2]: problem for problem in problems}

    return call


@pytest.mark.parametrize("name", DATA)
def test_plain_names(name, told):
    found = told(name, eval=DATA[name], **WRONG)
    assert {where: problem.value for where, problem in found.items()} == WRONG
    assert found["steps"].expected == "at least 1, or -1 to go by epochs"


@pytest.mark.parametrize("name", DATA)
def test_how_often_beside_what_it_goes_by_instead(name, told):
    found = told(
        name, eval=DATA[name], save_every=5, save_strategy="epoch", eval_steps=3, eval_strategy="epoch", log_every=2,
        logging_strategy="epoch", steps=0,
    )  # fmt: skip
    assert found.keys() == {"save_every", "eval_steps", "log_every", "steps"}
    assert str(found["save_every"]) == (
        f"{name} save_every: expected nothing beside save_strategy='epoch', got 5. "
        "Leave save_every out, or set save_strategy='steps'."
    )
    assert found["eval_steps"].remedy == "Leave eval_steps out, or set eval_strategy='steps'."
    stopping = told(name, eval=DATA[name], save_every=5, early_stopping_patience=2)
    assert stopping["save_every"].remedy == (
        "With early stopping it is saved when it is evaluated: set eval_every, or leave save_every out."
    )
    without = told(name, save_every=5, save_strategy="best", eval_every=3, eval_strategy="epoch")
    assert without["eval_every"].expected == "evaluation data beside it"
    assert without["save_every"].expected == "nothing beside save_strategy='best'"


@pytest.mark.parametrize("name", DATA)
def test_how_often_beside_never(name, told):
    never = {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no", "steps": 0}
    for evaluated in ({"eval": DATA[name]}, {}):
        found = told(name, **evaluated, save_every=5, eval_every=3, log_every=0.5, **never)
        assert found.keys() == {"save_every", "eval_every", "log_every", "steps"}
        assert str(found["save_every"]) == (
            f"{name} save_every: expected nothing beside save_strategy='no', got 5. "
            "Leave save_every out, or set save_strategy='steps'."
        )
        assert found["eval_every"].expected == "nothing beside eval_strategy='no'"
        assert found["log_every"].expected == "nothing beside logging_strategy='no'"
    # 0 says the same as "no"
    assert told(name, eval=DATA[name], save_every=0, eval_every=0, log_every=0, **never).keys() == {"steps"}


@pytest.mark.parametrize("name", DATA)
def test_what_would_be_ignored_beside_steps(name, told):
    found = told(name, steps=2, epochs=3, warmup_steps=2, learning_rate=-1)
    assert str(found["steps and epochs"]) == (
        f"{name} steps and epochs: expected one of the two, got (2, 3). "
        "Steps end the run whatever the epochs say: leave one of them out."
    )
    assert str(found["warmup_steps"]) == (
        f"{name} warmup_steps: expected fewer than steps=2, got 2. "
        "The learning rate would never be reached: a number below 1, such as 0.1, is a share of all steps."
    )
    assert found.keys() == {"steps and epochs", "warmup_steps", "learning_rate"}
    # what goes by epochs, and a share of the steps, is no contradiction
    assert told(name, steps=-1, epochs=3, warmup_steps=5, learning_rate=-1).keys() == {"learning_rate"}
    assert told(name, steps=2, warmup_steps=0.9, learning_rate=-1).keys() == {"learning_rate"}
    assert told(name, steps=3, warmup_steps=2, learning_rate=-1).keys() == {"learning_rate"}
    assert told(name, steps=3, warmup_steps=5.0, learning_rate=-1).keys() == {"warmup_steps", "learning_rate"}


@pytest.mark.parametrize("name", DATA)
def test_a_schedule_without_a_warm_up_has_none(name, told):
    for given in ({"warmup_steps": 5, "steps": 3}, {"warmup_steps": 0.1}, {"warmup_ratio": 0.1}):
        found = told(name, schedule="constant", learning_rate=-1, **given)
        (key,) = given.keys() - {"steps"}
        assert found.keys() == {key, "learning_rate"}
        assert str(found[key]) == (
            f"{name} {key}: expected no warm-up beside schedule='constant', got {given[key]}. "
            "That schedule has none: 'constant_with_warmup' has."
        )
    for given in ({"warmup_steps": 0}, {}):
        assert told(name, schedule="constant", learning_rate=-1, **given).keys() == {"learning_rate"}
    both = told(name, schedule="constant", warmup_steps=2, warmup_ratio=0.1)
    assert both.keys() == {"warmup_steps", "warmup_ratio"}
    assert told(name, schedule="constant_with_warmup", warmup_steps=5, learning_rate=-1).keys() == {"learning_rate"}


@pytest.mark.parametrize("kind", ["SFTConfig", "DPOConfig", "KTOConfig", "ORPOConfig", "CPOConfig", "GRPOConfig"])
def test_a_schedule_without_a_warm_up_has_none_in_a_config(kind, tmp_path):
    config, folder = getattr(fastft, kind), str(tmp_path)
    for schedule in ("constant", SchedulerType.CONSTANT):
        for given in ({"warmup_steps": 5}, {"warmup_steps": 0.1}, {"warmup_ratio": 0.1}):
            with pytest.raises(UsageError) as caught:
                config(folder, lr_scheduler_type=schedule, **given)
            ((name, value),) = given.items()
            assert str(caught.value) == (
                f"{kind} {name}: expected no warm-up beside lr_scheduler_type='constant', got {value}. "
                "That schedule has none: 'constant_with_warmup' has."
            )
        for given in ({}, {"warmup_steps": 0}, {"warmup_ratio": 0.0}):
            assert config(folder, lr_scheduler_type=schedule, **given).warmup_steps == 0
    assert config(folder, lr_scheduler_type="constant_with_warmup", warmup_ratio=0.1).warmup_steps == 0.1
    with pytest.raises(UsageError) as caught:  # which is no number, and no contradiction
        config(folder, lr_scheduler_type="constant", warmup_steps="5")
    assert [problem.expected for problem in caught.value.problems] == ["a whole number"]


@pytest.mark.parametrize("name", DATA)
def test_two_precisions_and_a_tracker_that_is_not_there(name, told, monkeypatch):
    monkeypatch.setattr(arguments, "installed", lambda package: package == "tensorboardX")
    found = told(name, bf16=True, fp16=True, report_to=["wandb", "tensorboard"])
    assert str(found["bf16 and fp16"]) == (
        f"{name} bf16 and fp16: expected one of the two, got (True, True). "
        "Leave both out: the model's own dtype decides."
    )
    assert str(found["report_to"]) == (
        f"{name} report_to: expected a tracker that is installed here, got 'wandb'. "
        "pip install wandb, or leave report_to out."
    )
    assert found.keys() == {"bf16 and fp16", "report_to"}


@pytest.mark.parametrize("name", DATA)
def test_names_of_fields_stay_where_they_were_written(name, told):
    found = told(name, per_device_train_batch_size=0, max_steps=0, num_train_epochs=1, accumulate=0)
    assert found.keys() == {"per_device_train_batch_size", "max_steps", "accumulate"}
    assert found["max_steps"].expected == "at least 1, or -1 to go by num_train_epochs"


def test_what_divides_is_told_in_the_same_words(told):
    found = told("grpo", generations=8, batch_size=6, accumulate=2, loss="grop", kl=-1, max_new_tokens=0)
    divides = found.pop("completions a generation (batch_size x accumulate)")
    assert divides.expected == "a multiple of generations=8"
    assert divides.remedy == "Use accumulate=4, or batch_size=8, or generations=6."
    assert found.keys() == {"loss", "kl", "max_new_tokens"}
    assert told("grpo", generations="4").keys() == {"generations"}
    assert told("grpo", auto_find_batch_size=True)["auto_find_batch_size"].remedy == (
        "Lower batch_size and raise accumulate."
    )


def test_arguments_of_a_trainer(build_model, tokenizer, tmp_path):
    for given in ({}, {"config": fastft.GRPOConfig(str(tmp_path), use_cpu=True)}):
        with pytest.raises(UsageError, match=r"^grpo rewards: expected at least one function"):
            fastft.grpo(build_model(), tokenizer, DATA["grpo"], [], tmp_path, **given)


def test_a_config_and_older_names(told, tmp_path):
    with pytest.raises(UsageError, match=r"^SFTConfig per_device_train_batch_size: "):
        fastft.SFTConfig(str(tmp_path), per_device_train_batch_size=0)
    with pytest.raises(UsageError, match=r"^SFTConfig max_seq_length: expected a finite number of at least 2, got 0$"):
        fastft.SFTConfig(str(tmp_path), max_seq_length=0)
    assert told("sft", max_seq_length=0).keys() == {"max_seq_length"}


def test_only_names_are_renamed():
    """Paths, values and mistakes in other things stay as they are, and the error is the same one."""
    path = "run/beta/beta-1 beta/x ./beta.jsonl 'beta'"
    mine = Problem("Thing beta", "beta", f"beta above 0, not betas, as in {path}", "Lower beta.")
    others = (Problem("row 1, beta", 1, "beta"), "beta.jsonl: beta is missing")
    error = LoadError(mine, *others)
    with pytest.raises(LoadError) as caught, renamed((type("Thing", (), {}),), "grpo", {"beta": "kl"}):
        raise error
    assert caught.value is error and error.problems[1:] == others
    assert error.problems[0] == Problem("grpo kl", "beta", f"kl above 0, not betas, as in {path}", "Lower kl.")
    assert str(error).startswith("grpo kl: expected kl above 0")


@pytest.mark.parametrize("name", DATA)
def test_names_and_contradictions_are_told_before_data_are_read(name, build_model, tokenizer, tmp_path):
    """Data of a wrong kind would be told first if they were looked at."""
    given = {"rewards": [len]} if name == "grpo" else {}

    def told(**options):
        with pytest.raises(UsageError) as caught:
            getattr(fastft, name)(build_model(), tokenizer, [{"mesages": 3}], output_dir=tmp_path, **given, **options)
        return str(caught.value)

    assert told(stps=1) == f"{name}: unknown argument 'stps'; did you mean 'steps'?"
    assert told(steps=2, epochs=3).startswith(f"{name} steps and epochs: expected one of the two, got (2, 3).")
    assert told(resume=True).startswith(f"resume: expected a checkpoint of the run in {tmp_path}, got True.")


@pytest.mark.parametrize("name", DATA)
def test_what_the_best_weights_at_the_end_ask_for(name, told):
    """Each was an error of transformers, in its words, once the data were tokenised."""
    stopping = {"eval": DATA[name], "early_stopping_patience": 2}
    best = {"eval": DATA[name], "load_best_model_at_end": True}
    (found,) = told(name, **stopping, eval_every=2, save_every=3).values()
    assert str(found) == (
        f"{name} save_every: expected a multiple of eval_every=2, got 3. early_stopping_patience=2 loads the best "
        "weights at the end: they are saved where it is evaluated."
    )
    (found,) = told(name, **stopping, eval_every=2, save_strategy="no").values()
    assert str(found) == (
        f"{name} save_strategy: expected 'steps', as eval_strategy is, or 'best', got 'no'. early_stopping_patience=2 "
        "loads the best weights at the end: they are saved where it is evaluated."
    )
    (found,) = told(name, **best, save_every=2).values()
    assert str(found) == (
        f"{name} save_every: expected nothing beside save_strategy='epoch', got 2. With load_best_model_at_end it is "
        "saved when it is evaluated: set eval_every, or leave save_every out."
    )
    assert told(name, **best, eval_every=0.1, save_every=2).keys() == {"save_every"}
    assert told(name, **best, eval_every=0.1, save_every=0.25, steps=0).keys() == {"save_every", "steps"}
    for more in ({}, {"eval_every": 2}, {"eval_every": 2, "save_every": 4}, {"eval_every": 0.1, "save_every": 0.3}):
        for wanted in (best, stopping):
            assert told(name, **wanted, **more, learning_rate=-1).keys() == {"learning_rate"}
    assert told(name, **best, eval_strategy="steps", learning_rate=-1).keys() == {"learning_rate"}
    (found,) = told(name, **best, eval_strategy="no").values()
    assert str(found) == (
        f"{name} load_best_model_at_end: expected an evaluation to tell the best weights by, got True. "
        "Set eval_strategy='steps' or 'epoch', or leave it out."
    )
    assert told(name, **stopping, eval_strategy="no")["early_stopping_patience"].expected == "an evaluation to watch"
    assert told(name, load_best_model_at_end=True)["load_best_model_at_end"].expected == "evaluation data beside it"


@pytest.mark.parametrize("name", DATA)
def test_two_warm_ups(name, told):
    found = told(name, warmup_steps=2, warmup_ratio=0.9, learning_rate=-1)
    assert found.keys() == {"warmup_steps and warmup_ratio", "learning_rate"}
    assert str(found["warmup_steps and warmup_ratio"]) == (
        f"{name} warmup_steps and warmup_ratio: expected one of the two, got (2, 0.9). "
        "Leave warmup_ratio out: it is the older name of a warmup_steps below 1."
    )


def test_choices_and_metrics_of_sft(told, tmp_path):
    (found,) = told("sft", packing=True, packing_strategy="wrapped").values()
    assert str(found) == (
        "sft packing_strategy: expected one of bfd, bfd_split, got 'wrapped'. "
        "It cuts rows in two and lets one attend to another; 'bfd', the default, packs them whole."
    )
    found = told("sft", packing_strategy="bdf", loss_type="nl", learning_rate=-1)
    assert str(found.pop("packing_strategy")) == (
        "sft packing_strategy: expected one of bfd, bfd_split, got 'bdf'. did you mean 'bfd'?"
    )
    assert str(found.pop("loss_type")) == "sft loss_type: expected one of nll, dft, got 'nl'. did you mean 'nll'?"
    assert found.keys() == {"learning_rate"}
    measured = "eval_loss, eval_perplexity, eval_mean_token_accuracy"
    for more in ({"early_stopping_patience": 2}, {"load_best_model_at_end": True}, {}):
        (found,) = told("sft", eval=DATA["sft"], metric_for_best_model="accuracy", **more).values()
        where = "sft metric_for_best_model"
        assert str(found).startswith(f"{where}: expected what an evaluation gives: {measured}, got 'accuracy'")
    parted = {"validation": DATA["sft"]}  # its numbers have its name, though it is the only one
    found = told("sft", eval=parted, metric_for_best_model="accuracy")["metric_for_best_model"]
    assert found.expected == f"what an evaluation gives: {measured.replace('eval_', 'eval_validation_')}"
    for metric, greater in (("perplexity", False), ("eval_perplexity", False), ("mean_token_accuracy", True)):
        made = fastft.SFTConfig(str(tmp_path), metric_for_best_model=metric, early_stopping_patience=1, **EVERY_STEP)
        assert made.greater_is_better is greater


@pytest.mark.parametrize("name", DATA)
def test_a_schedule_that_watches_evaluations(name, told):
    watching = {"schedule": "reduce_lr_on_plateau", "learning_rate": -1}
    assert told(name, **watching)["schedule"].expected == "an evaluation to watch"
    assert told(name, eval=DATA[name], **watching).keys() == {"learning_rate"}


def test_what_the_plan_calls_an_optimizer_is_told_by_its_name(told):
    (found,) = told("sft", optimizer="adamw").values()
    assert found.remedy == "did you mean 'adamw_torch'?"


@pytest.mark.parametrize("name", DATA)
def test_fp16_does_nothing_on_a_cpu(name, told, tmp_path):
    (found,) = told(name, fp16=True).values()
    assert (found.where, found.value, found.expected) == (
        f"{name} fp16", True, "False on a CPU, which trains in bf16 or fp32"
    )  # fmt: skip
    assert not fastft.SFTConfig(str(tmp_path), fp16=False).fp16


def test_a_model_in_fp16_on_a_cpu_asks_for_no_fp16(build_model):
    from fastft.train.settings import model_defaults

    made = model_defaults(build_model().to(torch.float16), "run", {})
    assert (made["fp16"], made["bf16"], made["use_cpu"]) == (False, False, True)


@pytest.mark.parametrize(("trainer", "config"), [("SFT", "DPO"), ("DPO", "SFT"), ("GRPO", "SFT"), ("ORPO", "CPO")])
def test_the_config_of_another_trainer_is_told(trainer, config, build_model, tmp_path):
    given = getattr(fastft, f"{config}Config")(str(tmp_path))
    with pytest.raises(UsageError) as caught:
        getattr(fastft, f"{trainer}Trainer")(build_model(), args=given, train_dataset=[], **(
            {"reward_funcs": [len]} if trainer == "GRPO" else {}
        ))  # fmt: skip
    expected = f"args: expected a fastft.{trainer}Config or transformers TrainingArguments, got '{config}Config'"
    assert any(expected in str(problem) for problem in caught.value.problems), caught.value
