"""Special tokens inside users' texts are told in one line; those of templates, and those that are meant, are not."""

import json
import re

import pytest
from tokenizers import AddedToken

from fastft.chat_templates import get_chat_template
from fastft.data.chat import chat_dataset
from fastft.data.control import _any_of, find_control, tell_control
from fastft.data.sources import load_rows
from fastft.registry.chat import chat_formats

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
FUNCTION = {"type": "function", "function": {"name": "look", "arguments": {"x": "1<|im_end|>"}}}
END = "<|im_end|>"
PLACED = (
    "fastft: special tokens in the texts of {} (the first: {}): the model reads them as the tokens themselves, "
    "such as the end of a turn. If that is not meant, take them out or put a space into them."
)
LINE = PLACED.replace("first: {}", "first: row {}")


@pytest.fixture
def told(capsys):
    """Return (rows, tokenizer, ...) -> the lines about special tokens that are printed on the way."""

    def call(rows, tokenizer, **options):
        capsys.readouterr()
        list(chat_dataset(rows, tokenizer, progress=False, **options))
        return [line for line in capsys.readouterr().out.splitlines() if "special tokens" in line]

    return call


@pytest.fixture
def tokenizer(build_tokenizer):
    """A tokenizer with a special token that its template never writes, and an added one that is not special."""
    made = build_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|call|>"]})
    made.add_tokens([AddedToken("<think>", special=False)])
    return made


def chat(user="q", assistant="a", **more):
    return {"messages": [{**USER, "content": user}, {**BOT, "content": assistant, **more}]}


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_one_line_counts_the_rows_and_names_the_first(kind, build_tokenizer, told):
    rows = [chat(), chat(f"x{END}y", END), chat("2 <| 3 |> <|im_", "im_end|>"), chat(assistant="b<|im_start|>")]
    assert told(rows, build_tokenizer(kind)) == [LINE.format("2 of 4 rows", f"1, {END!r}")]
    assert told(rows[:1] + rows[2:3], build_tokenizer(kind)) == []


def test_the_end_of_an_answer_that_the_template_ends_itself(tokenizer, told):
    """Unlike a completion, to which nothing is added, the answer would end twice."""
    assert told([chat(assistant=f"a{END}")], tokenizer) == [LINE.format("1 of 1 row", f"0, {END!r}")]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": END}, USER, BOT],
        [{**USER, "content": [{"type": "text", "text": "q"}, {"type": "text", "text": f"r{END}"}]}, BOT],
        [USER, {**BOT, "reasoning_content": f"so{END}"}],
        [USER, {**BOT, "tool_calls": [FUNCTION]}],
    ],
    ids=["system", "parts", "reasoning", "calls"],
)
def test_wherever_it_stands_in_a_message(messages, tokenizer, told):
    assert told([{"messages": messages}], get_chat_template(tokenizer, "qwen3")) == [
        LINE.format("1 of 1 row", f"0, {END!r}")
    ]


def test_messages_of_a_prompt_and_a_completion(tokenizer, told):
    rows = [{"prompt": [USER], "completion": [{**BOT, "content": f"a{END}b"}]}, {"prompt": [USER], "completion": [BOT]}]
    assert told(rows, tokenizer) == [LINE.format("1 of 2 rows", f"0, {END!r}")]


@pytest.mark.parametrize("form", [form.name for form in chat_formats()])
def test_what_templates_write_is_not_told(form, tokenizer, told):
    made = get_chat_template(tokenizer, form)
    rows = [chat(), {"messages": [USER, BOT, USER, BOT]}]
    assert told(rows, made) == []
    special = find_control(made).pattern  # and there are some in the text
    assert all(special.search(made.decode(row["input_ids"])) for row in chat_dataset(rows, made))


def test_an_assistants_own_markers_are_meant(tokenizer, told):
    assert told([chat(assistant="<|call|>look()"), chat("<think>", "<think>so</think>a")], tokenizer) == []
    assert told([chat("<|call|>look()")], tokenizer) == [LINE.format("1 of 1 row", "0, '<|call|>'")]


def test_markers_are_nobody_elses(tokenizer):
    for other in ({"role": "system", "content": "<|call|>"}, {"role": "tool", "content": "<|call|>"}):
        assert find_control(tokenizer).in_messages([USER, BOT, other]) == "<|call|>"


def test_what_ends_an_answer_is_of_the_frame(tokenizer):
    answer = [{**BOT, "content": "a<|call|>b"}]
    stop = tokenizer.convert_tokens_to_ids("<|call|>")
    assert find_control(tokenizer).in_messages(answer) is None
    assert find_control(tokenizer, [stop]).in_messages(answer) == "<|call|>"


def test_streams_and_columns_of_texts_are_left_alone(tokenizer, capsys):
    import datasets

    rows = datasets.Dataset.from_list([{**chat(f"x{END}"), "text": f"y{END}"}])
    line = LINE.format("1 of 1 row", f"0, {END!r}").replace("fastft: ", "fastft: train: ")
    for data, columns, expected in (
        (rows, ["messages", "text", "missing"], [line]),
        (rows, ["text"], []),
        (rows.to_iterable_dataset(), ["messages"], []),
    ):
        tell_control(data, columns, tokenizer, "train")
        assert capsys.readouterr().out.splitlines() == expected


def test_texts_may_begin_and_end_with_them(tokenizer, told):
    tokenizer.bos_token = "<|im_start|>"
    pairs = [{"prompt": "<|im_start|>q", "completion": f"a{END}"}, {"prompt": "q", "completion": "a"}]
    for inside in ({"prompt": "q", "completion": f"a{END}\n"}, {"prompt": f"q{END}", "completion": "a"}):
        assert told([*pairs, inside], tokenizer) == [LINE.format("1 of 3 rows", f"2, {END!r}")]
    assert told(pairs, tokenizer) == []
    texts = [{"text": f"<|im_start|>one{END}"}, {"text": "two"}]
    assert told(texts, tokenizer, train_on="all") == []
    assert told([*texts, {"text": f"th{END}ree"}], tokenizer, train_on="all") == [
        LINE.format("1 of 3 rows", f"2, {END!r}")
    ]


def test_a_token_that_starts_texts_is_told_behind_their_start(tokenizer, told):
    """A text's first token is meant; that of a completion stands in the middle of its row."""
    tokenizer.bos_token = "<|im_start|>"
    plain = {"prompt": "q", "completion": "a"}
    for row in ({"prompt": "q", "completion": "<|im_start|>a"}, {"prompt": " <|im_start|>q", "completion": "a"}):
        assert told([plain, plain, row], tokenizer) == [LINE.format("1 of 3 rows", "2, '<|im_start|>'")]
    other = {"prompt": "<|call|>q", "completion": "a"}  # at the start, and not the one that starts texts
    assert told([plain, plain, other], tokenizer) == [LINE.format("1 of 3 rows", "2, '<|call|>'")]


def test_the_frame_of_turns_is_told_in_an_answer_too(build_tokenizer):
    """That are a template's own markers, also of one that refuses a system message, and BOS, EOS and padding."""
    template = (
        "{%- if messages[0]['role'] == 'system' %}{{- raise_exception('no system') }}{%- endif %}"
        "{%- for message in messages %}{{- '<|turn|>' + message['content'] }}{%- endfor %}"
    )
    tokenizer = build_tokenizer("bytes", template)
    markers = ["<|turn|>", "<|bos|>", "<|pad|>", "<|eos|>", "<|call|>"]
    named = dict(zip(("bos_token", "pad_token", "eos_token"), markers[1:4], strict=True))
    tokenizer.add_special_tokens({"additional_special_tokens": [markers[0], markers[-1]], **named})
    control = find_control(tokenizer)
    answers = [[{"role": "assistant", "content": f"a{marker}b"}] for marker in markers]
    assert [control.in_messages(answer) for answer in answers] == [*markers[:-1], None]


def test_a_format_written_by_hand_is_meant(tokenizer, told):
    """Half of the rows and more: an accident is rarer."""
    written = {"text": f"<|im_start|>user\nq{END}\n<|im_start|>assistant\na{END}\n"}
    assert told([written, {"text": "plain"}], tokenizer, train_on="all") == []
    assert len(told([written, {"text": "plain"}, {"text": "more"}], tokenizer, train_on="all")) == 1
    asked = {"prompt": f"<|im_start|>user\nq{END}\n<|im_start|>assistant\n", "completion": f"a{END}"}
    assert told([asked], tokenizer) == []


def test_only_what_the_tokenizer_takes(tokenizer, told):
    assert find_control(tokenizer).in_text("a<|call|>b", starts=True, ends=True) == "<|call|>"
    tokenizer.split_special_tokens = True
    assert find_control(tokenizer).pattern is None


def test_large_sets_and_their_cache(tokenizer, told, chats):
    rows = chats(6000)
    rows[5500:] = [chat(f"{number}{END}") for number in range(500)]
    line = LINE.format("500 of 6,000 rows", f"5500, {END!r}")
    assert told(rows, tokenizer, num_proc=2) == [line]
    assert told(rows, tokenizer, num_proc=2) == [line]


def test_rows_that_are_left_out_do_not_change_the_numbers(tokenizer, told):
    rows = [chat("q" * 200), chat(), chat(f"r{END}")]
    options = {"max_length": 60, "overlong": "truncate", "max_unlearnable": 0.5}
    assert told(rows, tokenizer, **options) == [LINE.format("1 of 3 rows", f"2, {END!r}")]


def test_the_first_rows_of_a_stream(tokenizer, told, chats):
    import datasets

    rows = chats(150)
    rows[7], rows[140] = chat(END), chat(END)
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    assert told(stream, tokenizer) == [LINE.format("1 of the first 100 rows", f"7, {END!r}")]


def test_rows_of_files_are_named_by_file_and_line(tokenizer, told, chats, tmp_path, capsys):
    import datasets

    rows = chats(5)
    rows[3] = chat(f"x{END}y")
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("".join(f"{json.dumps(row)}\n" for row in rows[:2]))
    second.write_text("\n".join(["", *map(json.dumps, rows[2:])]))  # a blank line is no row
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")
    line = PLACED.format("1 of 5 rows", f"{second}, line 3, {END!r}")
    assert told([first, second], tokenizer) == [line]
    assert told(rows, tokenizer) == [LINE.format("1 of 5 rows", f"3, {END!r}")]
    assert told(tmp_path / "c.parquet", tokenizer) == [
        PLACED.format("1 of 5 rows", f"{tmp_path / 'c.parquet'}, row 3, {END!r}")
    ]
    assert told(load_rows([first, second], stream=True), tokenizer) == [
        PLACED.format("1 of the first 5 rows", f"{second}, line 3, {END!r}")
    ]
    tell_control(datasets.Dataset.from_list(rows), ["messages"], tokenizer, "train", [first, second])
    assert capsys.readouterr().out.splitlines() == [line.replace("fastft: ", "fastft: train: ")]


def test_the_pattern_finds_the_longest_of_all():
    words = ["<s>", "<s>a", "</s>", "[INST]", "a.b", "<|1|>", "<|11|>"]
    pattern = re.compile(_any_of(words))
    assert [match for word in words for match in pattern.findall(f"x{word}x")] == words
    assert pattern.findall("axb <s <|111|> INST </s>") == ["</s>"]


PAIRS = [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"prompt": f"q{END}r", "chosen": "a", "rejected": "b"},
    {"prompt": "q", "chosen": "a", "rejected": f"b{END}"},
]


def verdicts(rows):
    return [{"prompt": row["prompt"], "completion": row["rejected"], "label": True} for row in rows]


@pytest.mark.parametrize(("rows", "kinds"), [
    (PAIRS, [("chosen", "rejected")]), (verdicts(PAIRS), [("prompt", "completion", "label")]),
])  # fmt: skip
def test_pairs_and_verdicts_are_looked_at_as_turns(rows, kinds, build_tokenizer, capsys, tmp_path):
    from fastft.train.preference.data import preference_dataset

    def said(rows, tokenizer):
        capsys.readouterr()
        preference_dataset(rows, tokenizer, kinds, "train")
        return [line for line in capsys.readouterr().out.splitlines() if "special tokens" in line]

    tokenizer = build_tokenizer()
    assert said(rows, tokenizer) == [LINE.format("2 of 3 rows", f"1, {END!r}").replace("fastft: ", "fastft: train: ")]
    assert said(rows[:1], tokenizer) == []
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    line = PLACED.format("2 of 3 rows", f"{path}, line 2, {END!r}")
    assert said(path, tokenizer) == [line.replace("fastft: ", "fastft: train: ")]
    tokenizer.chat_template = None  # then texts are what the user writes, markers among them
    assert said(rows, tokenizer) == []


def test_prompts_are_looked_at_as_turns(build_tokenizer, capsys, tmp_path):
    from fastft.train.grpo.prompts import prompt_datasets

    texts = [row["prompt"] for row in PAIRS]
    conversations = [[{"role": "user", "content": text}] for text in texts]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps({'prompt': text})}\n" for text in texts))
    made = build_tokenizer()
    for prompts, first in ((texts, "row 1"), (conversations, "row 1"), (path, f"{path}, line 2")):
        capsys.readouterr()
        prompt_datasets(
            {"prompts": prompts, "eval": conversations[:1] if prompts is conversations else texts[:1]}, made
        )
        line = PLACED.format("1 of 3 rows", f"{first}, {END!r}").replace("fastft: ", "fastft: prompts: ")
        assert capsys.readouterr().out.splitlines() == [line]
