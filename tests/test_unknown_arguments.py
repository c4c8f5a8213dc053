"""What is said to an argument that a function, a trainer or a config does not take."""

import pytest

import fastft
from fastft.errors import UsageError, argument_names, unknown_arguments
from fastft.facade.names import sort_out


def test_an_unknown_argument_is_told_what_it_is_here():
    known, elsewhere = ["rows", "length"], {"dose": "fastft.measure takes it", "rows": "never said: it is known"}
    names = ["rows", "hidden", "size", "dose", "lenght", "hiden", "dosse", "zzz"]
    assert unknown_arguments("f", names, known, {"size": "length"}, elsewhere, ["hidden"]) == [
        "f: unknown argument 'size'; here it is length",
        "f: unknown argument 'dose'; fastft.measure takes it",
        "f: unknown argument 'lenght'; did you mean 'length'?",
        "f: unknown argument 'hiden'; did you mean 'hidden'?",
        "f: unknown argument 'dosse'; did you mean 'dose'? fastft.measure takes it",
        "f: unknown argument 'zzz'; it takes rows, length",
    ]
    many = [f"field_{number}" for number in range(100)]
    assert unknown_arguments("f", ["zzz", "length"], many) == [
        "f: unknown argument 'zzz'",
        "f: unknown argument 'length'",
    ]


def test_the_name_of_what_takes_further_arguments_is_none():
    """It would be taken, and dropped."""

    def function(rows, *more, length=1, **options):
        return rows, more, length, options

    known = argument_names(function)
    assert known == ["rows", "length"]
    found = sort_out("f", {"options": 1, "resumed": 1}, known, ["seed"], {"idle": "no use"}, {"refused": "no"}).problems
    assert found == (
        "f: unknown argument 'options'; it takes rows, length, seed",
        "f: unknown argument 'resumed'; did you mean 'refused'?",
    )
    with pytest.raises(UsageError, match="unknown argument 'options'; it takes model, tokenizer, prompts"):
        fastft.generate(None, None, "a", options=1)


def test_configs_and_trainers_say_it_alike(tmp_path):
    def told(function, **options):
        with pytest.raises(UsageError) as caught:
            function(**options)
        return list(caught.value.problems)

    assert told(fastft.SFTConfig, output_dir=str(tmp_path), zzzz=1, lr=1, evaluation_strategy="no", plan="min") == [
        "SFTConfig: unknown argument 'zzzz'",
        "SFTConfig: unknown argument 'lr'; here it is learning_rate",
        "SFTConfig: unknown argument 'evaluation_strategy'; here it is eval_strategy",
        "SFTConfig: unknown argument 'plan'; fastft.compile(model, plan=...) takes it, before",
    ]
    (problem,) = told(fastft.SFTTrainer, zzzz=1)
    assert problem.startswith("SFTTrainer: unknown argument 'zzzz'; it takes model, args, ")
    assert problem.endswith(", tokenizer, compile")


TRAINERS = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "ORPOTrainer", "CPOTrainer", "GRPOTrainer")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_says_which_config_takes_a_field(trainer, tmp_path):
    config = trainer.replace("Trainer", "Config")
    given = {"learning_rate": 1, "learning_rte": 1, "lr": 1, "group_by_length": True, "compute": "fp8", "plan": "min"}
    with pytest.raises(UsageError) as caught:
        getattr(fastft, trainer)(**given)
    assert list(caught.value.problems) == [
        f"{trainer}: unknown argument 'learning_rate'; {config}(learning_rate=...) takes it",
        f"{trainer}: unknown argument 'learning_rte'; did you mean 'learning_rate'? "
        f"{config}(learning_rate=...) takes it",
        f"{trainer}: unknown argument 'lr'; here it is {config}(learning_rate=...)",
        f"{trainer}: unknown argument 'group_by_length'; here it is "
        f"{config}(train_sampling_strategy='group_by_length')",
        f"{trainer}: unknown argument 'compute'; {config}(compute=...) takes it",
        f"{trainer}: unknown argument 'plan'; fastft.compile(model, plan=...) takes it, before",
    ]
    # and so it does
    getattr(fastft, config)(str(tmp_path), learning_rate=1, compute="fp8", train_sampling_strategy="group_by_length")
