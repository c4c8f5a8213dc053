"""Rows that are not token ids, given to the trainer: recognised and masked as `sft` does, or as the config says."""

import json

import pytest
import trl
from datasets import Dataset

from fastft.data import pipeline
from fastft.data.chat import chat_dataset
from fastft.data.responses import train_on_responses_only
from fastft.errors import DataError, UsageError
from fastft.train.sft.config import SFTConfig
from fastft.train.sft.run import sft
from fastft.train.sft.trainer import SFTTrainer

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"w{n} w{n + 1}"},
            {"role": "assistant", "content": f"w{n + 2}"},
            {"role": "user", "content": "w3"},
            {"role": "assistant", "content": " ".join(f"w{n + place}" for place in range(1 + n % 3))},
        ]
    }
    for n in range(6)
]
NAMES = {"user": "human", "assistant": "gpt"}
SHAREGPT = [
    {"conversations": [{"from": NAMES[turn["role"]], "value": turn["content"]} for turn in row["messages"]]}
    for row in CHATS
]
ALPACA = [{"instruction": f"w{n}", "input": "", "output": f"w{n + 1} w9"} for n in range(6)]
PAIRS = [{"prompt": f"w{n} w1 ", "completion": f"w{n + 1} w2"} for n in range(6)]
TEXTS = [{"text": f"w{n} w1 w2"} for n in range(6)]
TURNS = "learnt: the assistant's turns with their stop tokens (assistant_only_loss=False: every token)."


def rows_of(made):
    plain = made if isinstance(made, list) else list(made)
    return [(list(row["input_ids"]), list(row["labels"])) for row in plain]


@pytest.fixture
def trainer(build_model, tokenizer, settings):
    def build(data, eval=None, *, kind=SFTTrainer, config=SFTConfig, formatting_func=None, **changes):
        options = {**settings, "report_to": "none", **changes}
        more = {} if kind is trl.SFTTrainer else {"compile": False}
        return kind(
            build_model(), config(**options), train_dataset=data, eval_dataset=eval, processing_class=tokenizer,
            formatting_func=formatting_func, **more,
        )  # fmt: skip

    return build


@pytest.mark.parametrize("how", ["list", "dataset", "file", "stream"])
@pytest.mark.parametrize(
    "rows, told",
    [(SHAREGPT, TURNS), (CHATS, TURNS), (ALPACA, TURNS), (PAIRS, "the completions"), (TEXTS, "every token")],
    ids=["sharegpt", "messages", "alpaca", "pairs", "text"],
)
def test_rows_are_read_as_chat_dataset_reads_them(rows, told, how, trainer, tokenizer, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    expected = rows_of(chat_dataset(rows, tokenizer, "all" if rows is TEXTS else "assistant"))
    data = {"list": rows, "file": str(path)}.get(how) or Dataset.from_list(rows)
    data = data.to_iterable_dataset() if how == "stream" else data
    capsys.readouterr()
    made = trainer(data)
    assert rows_of(made.train_dataset) == expected
    said = [line for line in capsys.readouterr().out.splitlines() if "learnt: " in line]
    assert len(said) == 1 and said[0].startswith("fastft: train: ") and told in said[0]


def test_roles_of_sharegpt_are_those_of_the_template(trainer, tokenizer):
    ids = trainer(Dataset.from_list(SHAREGPT)).train_dataset[0]["input_ids"]
    assert tokenizer.decode(ids).split()[:6] == ["<|user|>", "w0", "w1", "</s>", "<|assistant|>", "w2"]
    assert "<unk>" not in tokenizer.decode(ids)


@pytest.mark.parametrize("rows", [CHATS, SHAREGPT], ids=["messages", "sharegpt"])
def test_responses_only_gives_the_same_mask(rows, trainer):
    made = trainer(Dataset.from_list(rows), eval=Dataset.from_list(rows[:2]))
    before, held = rows_of(made.train_dataset), rows_of(made.eval_dataset)
    whole = trainer(Dataset.from_list(rows), assistant_only_loss=False)
    assert rows_of(whole.train_dataset) == [(ids, ids) for ids, _ in before]
    for one in (made, whole):
        assert rows_of(train_on_responses_only(one).train_dataset) == before
    assert rows_of(made.eval_dataset) == held == before[:2]


@pytest.mark.parametrize("rows", [CHATS, PAIRS], ids=["messages", "pairs"])
def test_every_token_as_stock_trl_has_it(rows, trainer):
    option = {"assistant_only_loss" if rows is CHATS else "completion_only_loss": False}
    stock = trainer(Dataset.from_list(rows), kind=trl.SFTTrainer, config=trl.SFTConfig, **option)
    made = trainer(Dataset.from_list(rows), **option)
    assert rows_of(made.train_dataset) == rows_of(stock.train_dataset)
    assert all(ids == labels for ids, labels in rows_of(made.train_dataset))


def test_stock_trl_masks_the_same_where_it_is_asked_to(trainer):
    """Also with TRL's own config, whose default is no statement of the user."""
    for rows, option in ((CHATS, {"assistant_only_loss": True}), (PAIRS, {})):
        stock = trainer(Dataset.from_list(rows), kind=trl.SFTTrainer, config=trl.SFTConfig, **option)
        expected = rows_of(stock.train_dataset)
        assert any(ids != labels for ids, labels in expected)
        for config in (SFTConfig, trl.SFTConfig):
            assert rows_of(trainer(Dataset.from_list(rows), config=config).train_dataset) == expected
            assert rows_of(trainer(Dataset.from_list(rows), config=config, **option).train_dataset) == expected


@pytest.mark.parametrize("beside", [CHATS, SHAREGPT, ALPACA], ids=["messages", "sharegpt", "alpaca"])
def test_a_named_text_wins_over_what_stands_beside(beside, trainer, tokenizer, capsys):
    for field in ("text", "rendered"):
        both = Dataset.from_list([row | {field: text["text"]} for row, text in zip(beside, TEXTS, strict=True)])
        made = trainer(both, dataset_text_field=field)
        assert rows_of(made.train_dataset) == rows_of(chat_dataset(TEXTS, tokenizer, "all"))
        assert f"train: plain text (column {field!r}), 6 rows; learnt: every token." in capsys.readouterr().out
    both = both.rename_column("rendered", "text")
    with pytest.raises(DataError, match=r"columns of one kind.*dataset_text_field='text'"):
        trainer(both)
    with pytest.raises(DataError, match=r"dataset_text_field.*did you mean 'text'"):
        trainer(both, dataset_text_field="txt")


def test_sft_takes_a_named_text_as_the_trainer_does(build_model, tokenizer, settings, tmp_path, capsys):
    both = [row | {"txt": text["text"]} for row, text in zip(CHATS, TEXTS, strict=True)]
    options = {"disable_tqdm": True, "compile": False, "steps": 1, "save_strategy": "no"}

    def hash_of(rows, held=None, **more):
        made = sft(build_model(), tokenizer, rows, tmp_path, eval=held or rows, **options, **more)
        return made.record["data"]["sha256"]

    expected = hash_of(TEXTS, train_on="all")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in both), encoding="utf-8")
    for rows in (both, Dataset.from_list(both), str(path), iter(both)):
        capsys.readouterr()
        assert hash_of(rows, both, dataset_text_field="txt") == expected
        said = capsys.readouterr().out
        for name in ("train", "eval"):
            assert f"{name}: plain text (column 'txt'), 6 rows; learnt: every token." in said
    streams = [Dataset.from_list(rows).to_iterable_dataset() for rows in (both, TEXTS)]
    ways = [{"dataset_text_field": "txt"}, {"train_on": "all"}]
    runs = [
        sft(build_model(), tokenizer, rows, tmp_path, **options, **way) for rows, way in zip(streams, ways, strict=True)
    ]
    assert runs[0].losses == runs[1].losses
    config = SFTConfig(**{**settings, "max_steps": 1, "save_strategy": "no"}, dataset_text_field="txt")
    made = sft(build_model(), tokenizer, both, config=config, compile=False)
    assert made.record["data"]["sha256"] == expected
    assert hash_of(CHATS, dataset_text_field="messages") == hash_of(CHATS) != expected  # turns stay turns


def test_sft_refuses_a_named_text_that_is_not_there(build_model, tokenizer, build_rows, tmp_path):
    def told(kind, rows, **more):
        with pytest.raises(kind) as caught:
            sft(build_model(), tokenizer, rows, tmp_path, **more)
        return str(caught.value)

    both = [row | {"txt": text["text"]} for row, text in zip(CHATS, TEXTS, strict=True)]
    assert told(DataError, both, dataset_text_field="tx") == (
        "train data, dataset_text_field: expected one of the columns ['messages', 'txt'], got 'tx'. did you mean 'txt'?"
    )
    # the default's name is meant here, too, since it was written
    assert told(DataError, CHATS, dataset_text_field="text").startswith("train data, dataset_text_field:")
    assert told(DataError, both, eval=CHATS, dataset_text_field="txt").startswith("eval data, dataset_text_field:")
    assert "train data" in told(DataError, [], dataset_text_field="txt")
    for rows in (build_rows(), Dataset.from_list(build_rows())):
        assert told(UsageError, rows, dataset_text_field="txt") == (
            "sft dataset_text_field: expected rows to read; train has token ids, got 'txt'. "
            "Leave it out, or give the rows that they were made of."
        )


def test_a_parsed_config_says_no_more_than_was_written(trainer, tokenizer, settings):
    from transformers import HfArgumentParser

    given = ["--output_dir", settings["output_dir"], "--use_cpu", "true", "--report_to", "none"]
    (parsed,) = HfArgumentParser(SFTConfig).parse_args_into_dataclasses(given)
    made = trainer(CHATS, dataset_text_field=parsed.dataset_text_field, assistant_only_loss=parsed.assistant_only_loss)
    assert rows_of(made.train_dataset) == rows_of(chat_dataset(CHATS, tokenizer))


def test_what_cannot_be_meant_is_refused(trainer, tokenizer):
    with pytest.raises(UsageError, match="train: assistant_only_loss: expected conversations"):
        trainer(TEXTS, assistant_only_loss=True)
    for rows in (TEXTS, CHATS):
        with pytest.raises(UsageError, match="train: completion_only_loss: expected rows with prompt and completion"):
            trainer(Dataset.from_list(rows), completion_only_loss=True)
    with pytest.raises(UsageError, match="completion_only_loss: expected None with assistant_only_loss"):
        trainer(PAIRS, assistant_only_loss=True, completion_only_loss=False)
    with pytest.raises(DataError, match=r"train_dataset: expected a datasets.Dataset, a list of rows"):
        trainer(None)
    with pytest.raises(DataError, match=r"^eval columns: expected columns that are known") as caught:
        trainer(CHATS, Dataset.from_list([{"foo": "w1"}]))
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)  # a traceback shows the mistake once
    with pytest.raises(DataError, match="a file or folder that exists"):
        trainer("data/no.json")
    tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(DataError, match=r"assistant_only_loss=False\); train_on_responses_only\("):
        trainer(CHATS)
    parts = {"instruction_part": "<|user|>", "response_part": "<|assistant|>"}
    made = train_on_responses_only(trainer(CHATS, assistant_only_loss=False), **parts)
    assert all(0 < sum(label != -100 for label in labels) < len(ids) for ids, labels in rows_of(made.train_dataset))


def test_evaluation_data_go_the_same_way(trainer, tokenizer):
    made = trainer(CHATS, {"one": SHAREGPT[:2], "two": Dataset.from_list(CHATS[2:])}, eval_strategy="steps")
    expected = rows_of(chat_dataset(CHATS, tokenizer))
    assert rows_of(made.eval_dataset["one"]) == expected[:2] and rows_of(made.eval_dataset["two"]) == expected[2:]
    targets = sum(label != -100 for _, labels in expected for label in labels)
    for late in (SHAREGPT, Dataset.from_list(SHAREGPT)):
        assert made.evaluate(late)["eval_num_targets"] == targets


@pytest.mark.parametrize("how", ["list", "dataset", "stream"])
def test_a_formatting_function_makes_the_text(how, trainer, tokenizer, capsys):
    data = CHATS if how == "list" else Dataset.from_list(CHATS)
    data = data.to_iterable_dataset() if how == "stream" else data
    made = trainer(data, formatting_func=lambda row: row["messages"][0]["content"])
    ids = [tokenizer(f"w{n} w{n + 1} </s>")["input_ids"] for n in range(6)]
    assert rows_of(made.train_dataset) == [(row, row) for row in ids]
    assert "plain text (of formatting_func)" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"formatting_func: expected a text for one row, got \['w1'\].*batched=True"):
        rows_of(trainer(data, formatting_func=lambda row: ["w1"]).train_dataset)
    held = trainer(Dataset.from_list(CHATS), formatting_func=lambda row: row["messages"][1]["content"])
    assert held.evaluate(Dataset.from_list(CHATS))["eval_num_targets"] == 6


def test_what_is_left_alone(trainer, capsys):
    ids = Dataset.from_list([{"input_ids": [9, 2], "labels": [9, 2]}])
    made = trainer(ids, dataset_kwargs={"skip_prepare_dataset": True})
    assert rows_of(made.train_dataset) == [([9, 2], [9, 2])] and "learnt: " not in capsys.readouterr().out
    with pytest.raises(ValueError, match="with_transform"):
        trainer(Dataset.from_list(CHATS).with_transform(lambda batch: batch))


def test_arguments_by_their_place(build_model, tokenizer, settings):
    args = SFTConfig(**settings)
    made = SFTTrainer(build_model(), args, None, CHATS, None, tokenizer, compile=False)
    assert rows_of(made.train_dataset) == rows_of(chat_dataset(CHATS, tokenizer))
    with pytest.raises(UsageError, match="train_dataset given twice"):
        SFTTrainer(build_model(), args, None, CHATS, train_dataset=CHATS, processing_class=tokenizer)


def test_what_is_longer_is_cut_with_a_line(trainer, capsys):
    sizes = [len(ids) for ids, _ in rows_of(trainer(CHATS).train_dataset)]
    longest = max(sizes)
    made = trainer(CHATS, max_length=longest - 1)
    assert max(len(ids) for ids, _ in rows_of(made.train_dataset)) == longest - 1
    told = f"{sizes.count(longest)} of 6 rows are longer than max_length={longest - 1}"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("how", ["rows", "field", "config", "trainer"])
def test_many_rows_are_tokenised_over_as_many_processes_as_the_config_says(
    how, monkeypatch, build_model, tokenizer, settings, trainer, tmp_path
):
    """Whoever tokenises them, for training and for evaluations."""
    monkeypatch.setattr(pipeline, "LARGE", len(PAIRS))
    monkeypatch.setattr(pipeline, "_cores", lambda: 7)
    monkeypatch.setattr(pipeline, "cache_folder", lambda: tmp_path)
    processes, theirs = [], Dataset.map

    def counted(self, *args, num_proc=None, desc=None, **more):
        if desc == "Tokenising":
            processes.append(num_proc)
        return theirs(self, *args, desc=desc, **more)

    monkeypatch.setattr(Dataset, "map", counted)
    data = Dataset.from_list(PAIRS), Dataset.from_list(PAIRS[::-1])
    options = {**settings, "max_steps": 1, "dataset_num_proc": 3}
    if how == "trainer":
        trainer(*data, dataset_num_proc=3)
    elif how == "config":
        sft(build_model(), tokenizer, data[0], eval=data[1], config=SFTConfig(**options), compile=False)
    else:
        more = {"dataset_text_field": "prompt"} if how == "field" else {}
        sft(build_model(), tokenizer, data[0], eval=data[1], compile=False, **options, **more)
    assert processes == [3, 3]


def test_rows_left_with_nothing_to_learn_are_named_by_their_lines(tmp_path, build_model, tokenizer, settings):
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": " ".join(["w1"] * (40 if n in (10, 12) else 2)), "completion": "w2"} for n in range(14)]
    path.write_text("".join(f"{json.dumps(row)}\n\n" for row in rows))  # two lines each
    more = {"output_dir": tmp_path / "run", "compile": False, "max_length": 16, "steps": 1}
    summary = (
        "rows with nothing left to learn within max_length=16: expected at most 0.00%, got '2 of 14 (14.29%)'. "
        "Raise max_length, or leave them out with max_unlearnable=0.15."
    )
    told = "labels: expected some within max_length=16, got 'nothing to learn, cut from 42 tokens'"
    remedy = "For these 2: Cutting left no token that bears loss: raise max_length."
    for data, name in (({"train": path}, "train"), ({"train": rows[:2], "eval": path}, "eval")):
        with pytest.raises(DataError) as caught:
            sft(build_model(), tokenizer, **data, overlong="truncate", **more)
        lines = [f"{path}, line 21, {told}", f"{path}, line 25, {told}", remedy, f"{name} {summary}"]
        assert str(caught.value).splitlines() == lines
    with pytest.raises(DataError) as caught:
        SFTTrainer(
            build_model(), SFTConfig(**{**settings, "max_length": 16}), train_dataset=rows, processing_class=tokenizer,
            compile=False,
        )  # fmt: skip
    lines = [f"train row 10, {told}", f"train row 12, {told}", remedy, f"train {summary}"]
    assert str(caught.value).splitlines() == lines


def test_lines_that_are_no_rows_are_told_with_what_is_wrong_in_the_others(tmp_path, build_model, tokenizer, settings):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w1 w2"}\n[1, 2]\n{"text": ""}\n')
    places = [f"{path}, line 2", f"{path}, line 3, text"]
    more = {"train_dataset": path, "processing_class": tokenizer, "compile": False}
    for call in (
        lambda: sft(build_model(), tokenizer, path, tmp_path / "run", train_on="all"),
        lambda: SFTTrainer(build_model(), SFTConfig(**settings), **more),
    ):
        with pytest.raises(DataError) as caught:
            call()
        assert [problem.where for problem in caught.value.problems] == places
    column = SFTConfig(**settings, dataset_text_field="text")  # rows of whose kind nothing is asked
    with pytest.raises(DataError) as caught:
        SFTTrainer(build_model(), column, **more)
    assert [problem.where for problem in caught.value.problems] == places[:1]
