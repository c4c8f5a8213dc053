"""Several evaluation sets by name, in the training functions; and the one folder that a run is in."""

import json

import pytest
from datasets import Dataset, DatasetDict
from grpo_runs import PROMPTS, GivenRollouts, even

import fastft
from fastft.data.sets import evaluated, named_sets
from fastft.errors import DataError, UsageError

ROWS = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3} w{i + 4}"} for i in range(12)]
PAIRS = [{"prompt": f"w{i}", "chosen": f" w{i + 1} w{i + 2}", "rejected": f" w{i + 3}"} for i in range(8)]
OPTIONS = {"steps": 1, "batch_size": 2, "save_strategy": "no", "compile": False, "disable_tqdm": True, "max_length": 32,
           "use_cpu": True, "report_to": "none", "eval_strategy": "steps", "eval_every": 1}  # fmt: skip


@pytest.fixture
def lines(tmp_path):
    """Fine-tune into a folder, and return the losses and targets of its last evaluation by name."""

    def run(function, *args, **options):
        function(*args, tmp_path / "run", **{**OPTIONS, **options})
        told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        return {name: value for line in told for name, value in line.items() if name.startswith("eval_")}

    return run


@pytest.mark.parametrize("kind", ["rows", "datasets", "dict of datasets", "files"])
def test_sft_evaluates_every_set_by_its_name(kind, lines, build_model, tokenizer, tmp_path):
    held = {"train": ROWS[:4], "test": ROWS[4:7]}
    for name, rows in held.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {
        "rows": held,
        "datasets": {name: Dataset.from_list(rows) for name, rows in held.items()},
        "dict of datasets": DatasetDict({name: Dataset.from_list(rows) for name, rows in held.items()}),
        "files": {name: str(tmp_path / f"{name}.jsonl") for name in held},
    }[kind]
    found = lines(fastft.sft, build_model(), tokenizer, ROWS[:2], eval=made)
    alone = lines(fastft.sft, build_model(), tokenizer, ROWS[:2], eval=held["test"])
    assert found["eval_test_loss"] == pytest.approx(alone["eval_loss"], rel=1e-6)
    assert found["eval_test_num_targets"] == alone["eval_num_targets"]
    assert found["eval_train_num_targets"] * 3 == alone["eval_num_targets"] * 4 and "eval_loss" not in found


def test_preference_evaluates_every_set_by_its_name(lines, build_model, tokenizer):
    found = lines(fastft.preference, build_model(), tokenizer, PAIRS[:4], eval={"a": PAIRS[4:6], "b": PAIRS[6:]})
    alone = lines(fastft.preference, build_model(), tokenizer, PAIRS[:4], eval=PAIRS[6:])
    assert found["eval_b_loss"] == pytest.approx(alone["eval_loss"], rel=1e-6) and found["eval_a_loss"] > 0


def test_grpo_evaluates_every_set_by_its_name(build_model, tokenizer, tmp_path):
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    options = {name: value for name, value in OPTIONS.items() if name != "max_length"}
    result = fastft.grpo(
        build_model(), tokenizer, rows, [even], tmp_path / "run", eval={"a": rows[:2], "b": rows[2:]},
        engine=GivenRollouts(), generations=2, max_new_tokens=4,
        **{**options, "eval_batch_size": 2},
    )  # fmt: skip
    told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"eval_a_loss", "eval_b_loss"} <= {name for line in told for name in line}
    assert {"eval_a_loss", "eval_b_loss", "eval_reward"} <= set(result.metrics)


@pytest.mark.parametrize(
    ("held", "told"),
    [
        (ROWS[0], r"eval rows: expected a list of rows.*Put the row into a list"),
        ({"prompt": ["a", "b"], "completion": ["c", "d"]}, r"eval rows: expected.*from_dict\(columns\)"),
        ({"messages": [{"role": "user", "content": "w1"}]}, r"eval rows: expected.*Put the row into a list"),
        ({"one": ROWS[:2], "two": [{"prompt": "w1"}]}, r"eval 'two'"),
        ({"one": ROWS[:2], "two": "nowhere.jsonl"}, r"eval 'two' rows: expected a file or folder that exists"),
        ({}, r"eval rows: expected a list of rows"),
    ],
    ids=["row", "columns", "conversation", "row of a set", "file", "empty"],
)
def test_what_is_no_dict_of_sets_is_told(held, told, build_model, tokenizer, tmp_path):
    with pytest.raises(DataError, match=told):
        fastft.sft(build_model(), tokenizer, ROWS[:2], tmp_path / "run", eval=held, **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_names_of_sets():
    held = {"one": [{"a": 1}], 2: [{"a": 2}]}
    named = named_sets("rows", held, "prompts")
    assert list(named) == ["prompts", "eval 'one'", "eval '2'"]
    assert evaluated({name: name for name in named}, held) == {"one": "eval 'one'", "2": "eval '2'"}
    assert named_sets("rows", None) == {"train": "rows"} and evaluated({"train": 1}, None) is None
    assert evaluated(named_sets("rows", [{"a": 1}]), [{"a": 1}]) == [{"a": 1}]


@pytest.mark.parametrize("function", ["sft", "grpo", "preference"])
def test_a_folder_beside_a_config_that_has_another_is_refused(function, build_model, tokenizer, tmp_path):
    kind = {"sft": fastft.SFTConfig, "grpo": fastft.GRPOConfig, "preference": fastft.DPOConfig}[function]
    data = {"sft": [ROWS[:2]], "grpo": [PROMPTS, [even]], "preference": [PAIRS[:2]]}[function]
    config = kind(output_dir=str(tmp_path / "a"), max_steps=1, use_cpu=True)
    told = f"{function} output_dir: expected that of the config, '{tmp_path / 'a'}', got '{tmp_path / 'b'}'"
    with pytest.raises(UsageError) as caught:
        getattr(fastft, function)(build_model(), tokenizer, *data, output_dir=tmp_path / "b", config=config)
    assert told in str(caught.value) and not list(tmp_path.iterdir())


def test_a_config_says_the_folder(build_model, tokenizer, tmp_path):
    options = {"max_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_length": 32}
    config = fastft.SFTConfig(output_dir=str(tmp_path / "a"), **options)
    for given in ({}, {"output_dir": tmp_path / "a"}):
        result = fastft.sft(build_model(), tokenizer, ROWS[:2], config=config, compile=False, **given)
        assert result.output_dir == str(tmp_path / "a") and (tmp_path / "a" / "run.json").is_file()


def test_early_stopping_looks_at_the_set_that_its_metric_is_of(build_model, tokenizer, tmp_path, caplog):
    options = {**OPTIONS, "steps": 9, "save_strategy": "steps", "learning_rate": 0.0, "early_stopping_patience": 2}
    result = fastft.sft(
        build_model(), tokenizer, ROWS[:4], tmp_path / "run", eval={"a": ROWS[4:6], "b": ROWS[6:8]},
        metric_for_best_model="eval_a_loss", **options,
    )  # fmt: skip
    assert result.record["steps"] == 3 and result.record["status"] == "stopped early"  # as nothing is learnt
    assert not [one.getMessage() for one in caplog.records if "disabled" in one.getMessage()]


@pytest.mark.parametrize("rows", [[], iter(ROWS[4:6])], ids=["empty", "iterator"])
def test_a_set_may_be_an_iterator_and_is_not_empty(rows, lines, build_model, tokenizer):
    held = {"one": ROWS[:2], "two": rows}
    if rows == []:
        with pytest.raises(DataError, match="eval 'two' data: expected at least one row"):
            lines(fastft.sft, build_model(), tokenizer, ROWS[:2], eval=held)
        return
    assert lines(fastft.sft, build_model(), tokenizer, ROWS[:2], eval=held)["eval_two_loss"] > 0
