"""`get_chat_template` on real tokenizers, and that it touches nothing but what it returns."""

import json

import pytest

from fastft.chat_templates import get_chat_template
from fastft.data.known_format import recognise_format, response_parts
from fastft.demo import MODEL_FOLDER
from fastft.errors import SpecError, UsageError
from fastft.registry.chat import chat_format, chat_formats

MESSAGES = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4, of course."},
]
SHAREGPT = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}


@pytest.fixture(scope="module")
def loaded():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


@pytest.fixture
def llama():
    """A SentencePiece-like tokenizer with `<s>` and `</s>`, as Llama 2 has, without a template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *dict.fromkeys("▁abcdefghijklmnopqrstuvwxyzWUSERIT[]/<|>_:+?.,0123456789\n")]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    inner.decoder = decoders.Metaspace(prepend_scheme="never")
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def state(tokenizer):
    return tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.backend_tokenizer.to_str()


def masked(tokenizer, messages=MESSAGES):
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return tokenizer.decode([token for token, learnt in zip(out["input_ids"], out["assistant_masks"]) if learnt])


def test_the_given_tokenizer_stays_as_it_is(loaded):
    before = state(loaded)
    made = get_chat_template(loaded, "phi-4", map_eos_token=True)
    assert state(loaded) == before and made is not loaded and type(made) is type(loaded)
    assert made.chat_template == chat_format("phi-4").jinja


def test_tokens_that_are_learnt(loaded):
    made = get_chat_template(loaded)
    assert masked(made) == "4, of course.<|im_end|>"
    assert recognise_format(made).name == recognise_format(loaded).name == "chatml"
    assert response_parts(loaded) == ("<|im_start|>user\n", "<|im_start|>assistant\n")


@pytest.mark.parametrize("form", chat_formats(), ids=lambda form: form.name)
def test_every_format_on_one_tokenizer(loaded, form):
    """The demo model's vocabulary has few of the stop tokens; the others take the place of EOS."""
    made = get_chat_template(loaded, form.name)
    stop = loaded.eos_token if "{eos}" in form.assistant.end else form.stop_token
    assert made.eos_token == stop and made.eos_token_id == loaded.eos_token_id and len(made) == len(loaded)
    out = made.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    assert out["input_ids"].count(made.eos_token_id) >= 1
    learnt = [token for token, mask in zip(out["input_ids"], out["assistant_masks"]) if mask]
    assert learnt[-1] == made.eos_token_id and "4, of course." in made.decode(learnt)


def test_a_stop_token_that_the_vocabulary_lacks(llama, tmp_path):
    made = get_chat_template(llama, "chatml")
    assert (made.eos_token, made.eos_token_id, len(made)) == ("<|im_end|>", 2, len(llama))
    assert made.convert_tokens_to_ids("<|im_end|>") == 2 and "</s>" not in made.get_vocab()
    assert made("a b")["input_ids"] == llama("a b")["input_ids"]
    assert made("a", "b")["input_ids"] == llama("a", "b")["input_ids"]
    assert made("a<|im_end|>b", add_special_tokens=False)["input_ids"].count(2) == 1
    assert made.model_input_names == llama.model_input_names and made.padding_side == llama.padding_side == "left"
    assert (made.pad_token, made.pad_token_id, llama.pad_token) == ("<|im_end|>", 2, "</s>")
    made.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.pad_token, again.padding_side, again("a b")["input_ids"]) == (
        "<|im_end|>",
        "left",
        llama("a b")["input_ids"],
    )
    assert (again.eos_token, again.eos_token_id) == ("<|im_end|>", 2) and again.chat_template == made.chat_template
    text = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    assert [token["content"] for token in text["added_tokens"] if token["id"] == 2] == ["<|im_end|>"]
    with pytest.raises(UsageError, match=r"stop token of chatml.*'<\|im_end\|>'.*map_eos_token=True"):
        get_chat_template(llama, "chatml", map_eos_token=False)


def test_formats_that_end_with_the_tokenizers_own_eos(llama, loaded):
    for name in ("llama-2", "mistral-v3", "vicuna", "alpaca", "zephyr"):
        assert get_chat_template(llama, name, map_eos_token=False).eos_token == "</s>"
    assert masked(get_chat_template(loaded, "zephyr")) == "4, of course." + loaded.eos_token
    bare = get_chat_template(llama)
    bare.eos_token = None
    with pytest.raises(UsageError, match=r"tokenizer\.eos_token.*zephyr ends turns with it"):
        get_chat_template(bare, "zephyr")
    with pytest.raises(UsageError, match=r"an EOS token to rename"):
        get_chat_template(bare, "gemma")


def test_without_map_eos_token(loaded):
    made = get_chat_template(loaded, ("{{ messages[0]['content'] }}", "<|endoftext|>"), map_eos_token=False)
    assert made.eos_token == loaded.eos_token
    assert get_chat_template(loaded, ("{{ 1 }}", "<|endoftext|>")).eos_token == "<|endoftext|>"


def test_a_template_of_ones_own(loaded):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    made = get_chat_template(loaded, (template, "<|im_end|>"))
    assert made.chat_template == template
    assert (
        made.apply_chat_template(MESSAGES, tokenize=False)
        == "user: What is 2 + 2?<|im_end|>assistant: 4, of course.<|im_end|>"
    )


@pytest.mark.parametrize("name", ["chatml", "gemma", "qwen-3", "llama-3.1", "gpt-oss"])
def test_mapping(loaded, name):
    rows = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "So."},
    ]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    plain.append({"role": "assistant", "content": "So."})
    mapped, usual = get_chat_template(loaded, name, mapping=SHAREGPT), get_chat_template(loaded, name)
    assert mapped.apply_chat_template(rows, tokenize=False) == usual.apply_chat_template(plain, tokenize=False)
    assert masked(mapped, rows) == masked(usual, plain)
    # names that the mapping leaves out keep working, so that rows of both kinds of roles do
    half = get_chat_template(loaded, name, mapping={"user": "human"})
    said = [{**plain[1], "role": "human"}, plain[2]]
    assert masked(half, said) == masked(usual, plain[1:])


def test_system_message(loaded):
    made = get_chat_template(loaded, "chatml", system_message='It\'s "brief".\n')
    text = made.apply_chat_template(MESSAGES, tokenize=False)
    assert text.startswith('<|im_start|>system\nIt\'s "brief".\n<|im_end|>\n<|im_start|>user')
    own = made.apply_chat_template([{"role": "system", "content": "Mine."}, *MESSAGES], tokenize=False)
    assert own.startswith("<|im_start|>system\nMine.<|im_end|>") and "brief" not in own
    folded = get_chat_template(loaded, "gemma", system_message="Be brief.").apply_chat_template(
        MESSAGES, tokenize=False
    )
    assert "user\nBe brief.\n\nWhat is" in folded
    other = [{"role": "system", "content": "Mine."}, *MESSAGES]
    folded = get_chat_template(loaded, "gemma", system_message="Be brief.").apply_chat_template(other, tokenize=False)
    assert "user\nMine.\n\nWhat is" in folded and "brief" not in folded
    bare = chat_format("chatml").jinja  # no system message, and so none of its turn
    assert "system" not in get_chat_template(loaded, "chatml", system_message="").apply_chat_template(
        MESSAGES, tokenize=False
    )
    assert get_chat_template(loaded, "chatml", system_message="").chat_template == bare
    braces = get_chat_template(loaded, "gemma", system_message="{eos} {bos}").apply_chat_template(
        MESSAGES, tokenize=False
    )
    assert "user\n{eos} {bos}\n\nWhat is" in braces
    assert "Qwen" not in get_chat_template(loaded, "qwen-2.5", system_message="").apply_chat_template(
        MESSAGES, tokenize=False
    )


def test_mistakes(loaded):
    with pytest.raises(SpecError, match=r"chat format.*'chatmll'.*Did you mean 'chatml'"):
        get_chat_template(loaded, "chatmll")
    for given in (3, ("{{ 1 }}",), ("{{ 1 }}", 2), None):
        with pytest.raises(UsageError, match=r"chat_template: expected a format's name, or a pair"):
            get_chat_template(loaded, given)
    with pytest.raises(UsageError) as caught:
        get_chat_template(loaded, mapping={"rolle": "from", "user": 3, "assistant": "system"})
    text = str(caught.value)
    assert "mapping['rolle']" in text and "mapping['user']" in text and "another name for every role" in text
    with pytest.raises(UsageError, match=r"chat_template: expected a Jinja template, got .*Line 1: .*end of template"):
        get_chat_template(loaded, ("{% for m in messages %}{{ m['content'] }}<|im_end|>", "<|im_end|>"))
    with pytest.raises(UsageError, match=r"expected a pair \(jinja template, stop token\), got '{{ messages"):
        get_chat_template(loaded, "{{ messages }}")
    with pytest.raises(UsageError, match=r"tokenizer: expected a tokenizer, got 'x'"):
        get_chat_template("x", "gemma")
    with pytest.raises(UsageError, match="system_message"):
        get_chat_template(loaded, "gpt-oss", system_message="x")
    with pytest.raises(UsageError, match="system_message"):
        get_chat_template(loaded, ("{{ 1 }}", "<|im_end|>"), system_message="x")


def test_the_other_familiar_names():
    import fastft.chat_templates as module

    for name in ("train_on_responses_only", "standardize_sharegpt", "standardize_data_formats", "to_sharegpt"):
        assert callable(getattr(module, name)) and name in dir(module)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing
