"""What is learnt of a row: exact ids and masks, and errors that name row, field, value and remedy."""

import pytest

from fastft.data.chat import chat_dataset
from fastft.data.collate import collate
from fastft.errors import DataError, UsageError

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} </s>{% endgeneration %}"
    "{% else %}{{ m['content'] }} </s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
OUTSIDE = TEMPLATE.replace(" </s>{% endgeneration %}", "{% endgeneration %} </s>")
STOPLESS = TEMPLATE.replace(" </s>{% endgeneration %}", "{% endgeneration %}")
UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHAT = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
    {"role": "assistant", "content": "w5 w6"},
]


def tokenizer(template=TEMPLATE):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"] + [f"w{i}" for i in range(20)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=["<|user|>", "<|assistant|>"], **special
    )
    made.chat_template = template
    return made


def learnt(row, made):
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    return made.convert_ids_to_tokens([label for label in row["labels"] if label != -100])


@pytest.mark.parametrize("template", [TEMPLATE, OUTSIDE], ids=["stop inside", "stop outside"])
def test_assistant_turns_with_their_stop_tokens(template):
    made = tokenizer(template)
    row = chat_dataset([{"messages": CHAT}], made)[0]
    assert made.convert_ids_to_tokens(row["input_ids"]) == (
        [
            "<|user|>",
            "w1",
            "w2",
            "</s>",
            "<|assistant|>",
            "w3",
            "</s>",
            "<|user|>",
            "w4",
            "</s>",
            "<|assistant|>",
            "w5",
            "w6",
            "</s>",
        ]
    )
    assert learnt(row, made) == ["w3", "</s>", "w5", "w6", "</s>"]
    assert learnt(chat_dataset([{"messages": CHAT}], made, train_on="completion")[0], made) == ["w5", "w6", "</s>"]
    assert len(learnt(chat_dataset([{"messages": CHAT}], made, train_on="all")[0], made)) == len(row["input_ids"])


def test_prompt_and_completion_and_text():
    made = tokenizer()
    texts = chat_dataset([{"prompt": "w1 w2", "completion": "w3"}], made)[0]
    assert made.convert_ids_to_tokens(texts["input_ids"]) == ["<s>", "w1", "w2", "w3", "</s>"]
    assert learnt(texts, made) == ["w3", "</s>"]
    turns = chat_dataset([{"prompt": CHAT[:3], "completion": CHAT[3:]}], made)[0]
    assert learnt(turns, made) == ["w5", "w6", "</s>"]
    for text in ("w1 w2", "<s> w1 w2 </s>"):  # neither token is ever doubled
        row = chat_dataset([{"text": text}], made, train_on="all")[0]
        assert made.convert_ids_to_tokens(row["input_ids"]) == ["<s>", "w1", "w2", "</s>"]
        assert row["labels"] == row["input_ids"]


def test_templates_that_cannot_be_used():
    with pytest.raises(DataError, match=r"generation %\} markers.*train_on='all'"):
        chat_dataset([{"messages": CHAT}], tokenizer(UNMARKED))
    assert len(chat_dataset([{"messages": CHAT}], tokenizer(UNMARKED), train_on="all")) == 1
    with pytest.raises(DataError, match=r"row 0, assistant turn 1.*a stop token.*EOS"):
        chat_dataset([{"messages": CHAT}], tokenizer(STOPLESS))
    with pytest.raises(DataError, match=r"chat_template.*a chat template"):
        chat_dataset([{"messages": CHAT}], tokenizer(None))
    raising = "{{ raise_exception('roles must alternate') }}{% generation %}{% endgeneration %}"
    with pytest.raises(DataError, match=r"row 0, messages.*roles must alternate"):
        chat_dataset([{"messages": CHAT}], tokenizer(raising))


def test_every_bad_row_is_named_at_once():
    rows = [
        {"messages": CHAT},
        {"messages": []},
        {"messages": [{"role": "user", "content": 3}, {"role": 4, "content": "w1"}]},
        {"messages": CHAT[:1]},
        {"message": CHAT},
        {"prompt": "w1", "completion": "  "},
        {"text": None},
        "w1",
    ]
    with pytest.raises(DataError) as caught:
        chat_dataset(rows, tokenizer())
    text = str(caught.value)
    for part in (
        "row 1, messages", "row 2, messages[0].content", "row 2, messages[1].role", "row 3, messages", "row 4, fields",
        "did you mean 'messages'", "row 5, fields", "row 6, fields", "row 7",
    ):  # fmt: skip
        assert part in text
    assert "row 0" not in text
    with pytest.raises(DataError, match="and 5 more rows"):
        chat_dataset([{"text": ""}] * 15, tokenizer(), train_on="all")


def test_lengths_are_never_cut_unasked():
    made = tokenizer()
    rows = [{"prompt": "w1 w2 w3", "completion": "w4"}, {"prompt": "w1", "completion": "w2"}]
    with pytest.raises(DataError, match="row 0: expected at most max_length=4, got '6 tokens'"):
        chat_dataset(rows, made, max_length=4)
    with pytest.raises(
        DataError,
        match=r"row 0, labels.*max_length=4.*nothing to learn, cut from 6 tokens.*: raise.*\n.*max_unlearnable=0.51",
    ) as told:
        chat_dataset(rows, made, max_length=4, overlong="truncate")
    assert "train_on='all'" not in str(told.value)
    assert [len(row) for row in chat_dataset(rows, made, max_length=5, overlong="truncate")["input_ids"]] == [5, 4]


def test_wrong_arguments_and_no_rows():
    with pytest.raises(UsageError) as caught:
        chat_dataset([{"text": "w1"}], tokenizer(), train_on="asistant", overlong="drop", max_length=1)
    assert (
        "did you mean 'assistant'" in str(caught.value)
        and "overlong" in str(caught.value)
        and "max_length" in str(caught.value)
    )
    with pytest.raises(DataError, match="at least one row"):
        chat_dataset([], tokenizer())
    with pytest.raises(DataError, match="a list of rows"):
        chat_dataset({"text": "w1"}, tokenizer())
    with pytest.raises(DataError, match="train_on='all'"):
        chat_dataset([{"text": "w1"}], tokenizer())


def test_collate():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9]}]
    right, left = collate(rows, 3), collate(rows, 3, side="left")
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 9, 3]] and right["attention_mask"].tolist() == [
        [1, 1, 1],
        [1, 1, 0],
    ]
    assert left["labels"].tolist() == [[-100, 6, 7], [-100, 8, 9]] and left["input_ids"][1].tolist() == [3, 8, 9]
    packed = collate(rows, packed=True)
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1]] and packed["labels"].tolist() == [[-100, 6, 7, -100, 9]]
    with pytest.raises(DataError, match="row 1"):
        collate([rows[0], {"input_ids": []}])


def test_arguments_of_a_wrong_type(tmp_path):
    with pytest.raises(UsageError, match=r"tokenizer: expected a tokenizer, got .*from_pretrained"):
        chat_dataset([{"messages": CHAT}], tmp_path)
    for name, value in (("max_length", "30"), ("max_length", 70.5), ("num_proc", 0), ("max_unlearnable", "x")):
        with pytest.raises(UsageError, match=f"{name}: expected"):
            chat_dataset([{"messages": CHAT}], tokenizer(), **{name: value})
