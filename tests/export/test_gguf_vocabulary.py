"""Tokenizers as GGUF keys: kinds, types, special tokens, padding, and how text is split."""

import json

import pytest
from gguf_models import demo_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastft.errors import UsageError
from fastft.export.gguf import pre_tokenizers as known
from fastft.export.gguf.pre_tokenizers import pre_tokenizer_name
from fastft.export.gguf.vocabulary import turn_end, vocabulary_of


def values(vocabulary):
    return {key.removeprefix("tokenizer."): value.value for key, value in vocabulary.metadata.items()}


def tokenizer_json(*splits, ignore_merges=False, last=None):
    steps = [{"type": "Split", "pattern": {"Regex": s}, "behavior": "Isolated", "invert": False} for s in splits]
    last = last or {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "model": {"type": "BPE", "ignore_merges": ignore_merges},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, last]},
    }


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("data", "has_bos", "drops_spaces", "name"),
    [
        (tokenizer_json(known.LLAMA3, ignore_merges=True), True, True, "llama-bpe"),
        (tokenizer_json(known.LLAMA3, ignore_merges=True), False, False, "glm4"),
        (tokenizer_json(known.LLAMA3), True, True, "dbrx"),
        (tokenizer_json(known.LLAMA3), False, True, "chatglm-bpe"),
        (tokenizer_json(known.QWEN2), False, False, "qwen2"),
        (tokenizer_json(known.QWEN2), True, True, "stablelm2"),
        (tokenizer_json(known.TEKKEN), True, False, "tekken"),
        (tokenizer_json(known.GPT4O), False, False, "gpt-4o"),
        (tokenizer_json(last=BYTE_LEVEL), True, True, "gpt-2"),
        ({"model": {"type": "BPE"}, "pre_tokenizer": BYTE_LEVEL}, True, True, "gpt-2"),
    ],
)
def test_splits_are_known_by_their_definition(data, has_bos, drops_spaces, name):
    assert pre_tokenizer_name(data, has_bos, drops_spaces) == name


def test_single_digits_and_matches_that_are_kept():
    digits = {"type": "Digits", "individual_digits": True}
    data = {"model": {}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, BYTE_LEVEL]}}
    assert pre_tokenizer_name(data, True, False) == "smollm"
    assert pre_tokenizer_name(data, True, True) == "starcoder"
    kept = tokenizer_json(known.QWEN2)
    kept["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    assert pre_tokenizer_name(kept, False, False) == "qwen2"


@pytest.mark.parametrize(
    "data",
    [
        tokenizer_json(r"\w+|\s+"),
        tokenizer_json(known.QWEN2, ignore_merges=True),
        tokenizer_json(last=BYTE_LEVEL | {"add_prefix_space": True}),
        tokenizer_json(known.QWEN2, known.QWEN2),
    ],
)
def test_unknown_splits_are_refused_with_a_way_out(data):
    with pytest.raises(UsageError, match="pass pre_tokenizer="):
        pre_tokenizer_name(data, True, True)


def test_byte_level_bpe_with_padding_and_special_tokens():
    tokenizer = demo_tokenizer()
    tokenizer.add_tokens(["<plain>"])
    vocabulary = vocabulary_of(tokenizer, 2056, ends=(0, 1, 2))
    keys = values(vocabulary)
    assert keys["ggml.model"] == "gpt2" and keys["ggml.pre"] == "qwen2"
    assert len(keys["ggml.tokens"]) == len(keys["ggml.token_type"]) == 2056
    assert keys["ggml.tokens"][2048:2050] == ["<plain>", "[PAD2049]"]
    assert keys["ggml.token_type"][2047:2050] == [1, 4, 5] and keys["ggml.token_type"][:4] == [3] * 4
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    assert keys["ggml.merges"] == [" ".join(merge) for merge in data["model"]["merges"]]
    assert (keys["ggml.bos_token_id"], keys["ggml.eos_token_id"], keys["ggml.padding_token_id"]) == (0, 2, 3)
    assert keys["ggml.eot_token_id"] == 2 == turn_end(tokenizer) and keys["ggml.eom_token_id"] == 0
    assert keys["ggml.add_bos_token"] is False and keys["chat_template"] == tokenizer.chat_template
    assert "three tokens" in vocabulary.notes[0] and "<|im_start|>" in vocabulary.notes[0]


def test_more_tokens_than_rows_are_refused():
    with pytest.raises(UsageError, match=r"48 tokens of the tokenizer have no row .*\(id 2000\)"):
        vocabulary_of(demo_tokenizer(), 2000)


def test_an_override_names_the_splits():
    tokenizer = demo_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\w+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    with pytest.raises(UsageError, match="pass pre_tokenizer="):
        vocabulary_of(tokenizer, 2048)
    assert values(vocabulary_of(tokenizer, 2048, "gpt-2"))["ggml.pre"] == "gpt-2"


def test_two_named_templates():
    tokenizer = demo_tokenizer()
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    keys = values(vocabulary_of(tokenizer, 2048))
    assert keys["chat_template"] == "{{ 1 }}" and keys["chat_template.tool_use"] == "{{ 2 }}"
    assert keys["chat_templates"] == ["tool_use"]


def sentencepiece(prefix):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "ab")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prefix == "always":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif prefix == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens([AddedToken("▁▁b", normalized=False)])
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(("prefix", "stated"), [("always", True), ("first", True), ("never", False)])
def test_sentencepiece_from_merges(prefix, stated):
    vocabulary = vocabulary_of(sentencepiece(prefix), 267)
    keys = values(vocabulary)
    assert keys["ggml.model"] == "llama" and keys["ggml.add_space_prefix"] is stated
    assert keys["ggml.add_bos_token"] is True and keys["ggml.add_eos_token"] is False
    assert keys["ggml.token_type"][:4] == [2, 3, 3, 6] and keys["ggml.token_type"][-4:] == [1, 1, 4, 5]
    assert keys["ggml.tokens"][-2:] == ["  b", "[PAD266]"]
    scores = dict(zip(keys["ggml.tokens"], keys["ggml.scores"]))
    assert scores["▁a"] > scores["ab"] > scores["▁ab"] > scores["a"]
    assert len(vocabulary.notes) == {"always": 0, "first": 2, "never": 0}[prefix]


def test_wordpiece():
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##able"]
    backend = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.add_special_tokens(tokens[:4])
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    keys = values(vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=backend, **special), 6))
    assert keys["ggml.model"] == "bert" and keys["ggml.tokens"][4:] == ["▁un", "able"]
    assert keys["ggml.token_type"] == [3, 3, 3, 3, 1, 1] and keys["ggml.cls_token_id"] == keys["ggml.bos_token_id"] == 2
    assert keys["ggml.add_bos_token"] and keys["ggml.add_eos_token"] and keys["ggml.normalizer.lowercase"]


def test_other_kinds_are_refused():
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(UsageError, match="WordLevel"):
        vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=backend), 1)
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        vocabulary_of(object(), 1)
