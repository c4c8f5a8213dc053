"""From a file to the step: masks, packing and preview agree; what is longer than `max_length` never goes unsaid."""

import json

import pytest
from datasets import Dataset

import fastft
from fastft.data.chat import chat_dataset
from fastft.errors import DataError, UsageError
from fastft.train.sft.config import SFTConfig
from fastft.train.sft.run import sft
from fastft.train.sft.trainer import SFTTrainer

QUIET = {"disable_tqdm": True, "compile": False, "save_strategy": "no", "steps": 2}


def chats(count):
    return [
        {
            "conversations": [
                {"from": "human", "value": f"w1 w{n % 9 + 1} " * (n % 3 + 1)},
                {"from": "gpt", "value": f"w2 w{n % 7 + 1}"},
                {"from": "human", "value": "w3"},
                {"from": "gpt", "value": f"w{n % 5 + 1} " * (n % 4 + 1)},
            ]
        }
        for n in range(count)
    ]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chats(12)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_file(packing, train_on, file, build_model, tokenizer, tmp_path, capsys):
    expected = chat_dataset(chats(12), tokenizer, train_on)
    shown = fastft.preview(file, tokenizer, 12, train_on=train_on)
    assert [[token.id for token in row.tokens] for row in shown.rows] == list(expected["input_ids"])
    learnt = sum(row.learnt for row in shown.rows)
    assert learnt == shown.truncation.bearing
    capsys.readouterr()
    more = {"max_length": 64} if packing else {}
    options = {**QUIET, **more, "batch_size": 12, "packing": packing, "train_on": train_on, "steps": 1}
    result = sft(build_model(), tokenizer, file, output_dir=tmp_path / "run", **options)
    said = capsys.readouterr().out
    assert said.count("ShareGPT conversations (column 'conversations', from/value), 12 rows") == 1
    assert result.record["tokens"]["loss_bearing"] == learnt
    if packing:
        assert result.record["packing"]["train"]["rows"] == 12
    plain = sft(build_model(), tokenizer, expected, output_dir=tmp_path / "ids", **{**options, "packing": False})
    assert result.final_loss == pytest.approx(plain.final_loss, rel=1e-5)


def test_longer_rows_are_refused_in_both_sets(build_model, tokenizer, tmp_path):
    short, long = (Dataset.from_list([{"input_ids": [7] * size}]) for size in (4, 9))
    for train, eval, name in ((long, short, "train"), (short, long, "eval")):
        with pytest.raises(DataError, match=rf"{name} row 0: expected at most max_length=5, got '9 tokens'"):
            sft(build_model(), tokenizer, train, eval=eval, output_dir=tmp_path, max_length=5, **QUIET)
    result = sft(build_model(), tokenizer, short, eval=long, output_dir=tmp_path, **QUIET)
    assert result.metrics["eval_num_targets"] == 8  # nothing is cut to the length of the training rows


def test_longer_rows_of_a_file_are_named_by_file_and_line_or_cut(file, build_model, tokenizer, tmp_path, capsys):
    sizes = [len(row) for row in chat_dataset(chats(12), tokenizer)["input_ids"]]
    limit = sorted(sizes)[5]
    long = [number for number, size in enumerate(sizes) if size > limit]
    options = {**QUIET, "steps": 1, "max_length": limit}
    with pytest.raises(DataError) as caught:
        sft(build_model(), tokenizer, chats(1), eval=file, output_dir=tmp_path / "run", **options)
    where = [problem.where for problem in caught.value.problems]
    assert where == [f"{file}, line {number + 1}" for number in long] and "overlong='truncate'" in str(caught.value)
    capsys.readouterr()
    result = sft(build_model(), tokenizer, file, output_dir=tmp_path / "run", overlong="truncate", **options)
    assert f"{len(long)} of 12 rows are longer than max_length={limit}" in capsys.readouterr().out
    cut = chat_dataset(chats(12), tokenizer, max_length=limit, overlong="truncate")
    plain = sft(build_model(), tokenizer, cut, output_dir=tmp_path / "ids", **options)
    assert result.final_loss == plain.final_loss
    config = SFTConfig(str(tmp_path / "run"), max_length=limit, max_steps=1, disable_tqdm=True, report_to="none")
    with pytest.raises(DataError, match=rf"chats.jsonl, line {long[0] + 1}: expected at most max_length={limit}"):
        sft(build_model(), tokenizer, file, config=config, overlong="refuse", compile=False)
    with pytest.raises(UsageError, match=r"overlong: expected 'refuse' or 'truncate'.*did you mean 'truncate'"):
        sft(build_model(), tokenizer, file, overlong="truncat", **options)


def test_token_ids_of_a_file_without_anything_to_learn_are_named_by_line(build_model, tokenizer, tmp_path):
    path = tmp_path / "ids.jsonl"
    rows = [{"input_ids": [7, 8], "labels": [7, 8]}, {"input_ids": [7, 8], "labels": [-100, -100]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"ids.jsonl, line 2, labels"):
        sft(build_model(), tokenizer, path, output_dir=tmp_path, **QUIET)
    args = SFTConfig(str(tmp_path), disable_tqdm=True, report_to="none", use_cpu=True)
    with pytest.raises(DataError, match=r"ids.jsonl, line 2, labels"):
        SFTTrainer(build_model(), args, train_dataset=str(path), processing_class=tokenizer, compile=False)


def test_a_stream_is_cut_with_a_line(build_model, tokenizer, tmp_path, capsys):
    stream = Dataset.from_list([{"input_ids": [7] * 9, "labels": [7] * 9}] * 4).to_iterable_dataset()
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=1, max_length=5, disable_tqdm=True, report_to="none", use_cpu=True
    )
    SFTTrainer(build_model(), args, train_dataset=stream, processing_class=tokenizer, compile=False)
    assert "a stream: what is longer than max_length=5 is cut off." in capsys.readouterr().out


def test_two_answers_in_a_row(build_model, tokenizer, tmp_path):
    turns = [("user", "w1"), ("assistant", "w2"), ("assistant", "w3")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 4
    with pytest.raises(
        DataError, match=r"train row 0, messages\[2\].role: (.*\n){4}For these 4: .*alternate=False takes both"
    ):
        sft(build_model(), tokenizer, rows, output_dir=tmp_path, **QUIET)
    result = sft(build_model(), tokenizer, rows, output_dir=tmp_path, alternate=False, **QUIET)
    assert result.record["tokens"]["loss_bearing"] == 2 * 4 * 4  # two steps of four rows: two words, two stop tokens
