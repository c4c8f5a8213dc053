"""Small tokenizers of the kinds there are, with ChatML's two tokens and a template that marks what is sampled."""

import pytest

MARKED = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' %}{%- generation %}{{- message['content'] + '<|im_end|>' }}"
    "{%- endgeneration %}{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}{{- '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
UNMARKED = MARKED.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
TEXTS = ["What is the opposite of hot? Cold.", "user system tool assistant\n\n", "Größe, naïve 日本 😀 \n\tx = 1"] * 9


def build(kind="bytes", template=MARKED):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<unk>"]
    if kind == "bytes":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    else:  # as sentencepiece does it: blanks are part of words, unknown characters are bytes
        inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        bytes_ = [f"<0x{value:02X}>" for value in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*special, *bytes_], limit_alphabet=40)
    inner.train_from_iterator(TEXTS, trainer)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=["<|im_start|>"], clean_up_tokenization_spaces=False, **names
    )
    made.chat_template = template
    return made


@pytest.fixture(scope="session")
def build_tokenizer():
    return build


@pytest.fixture(scope="session")
def unmarked():
    return UNMARKED


@pytest.fixture(scope="session")
def marked():
    return MARKED


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is kept among the user's files, and nothing found there."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def chats():
    """Return (count) -> that many short conversations, all different."""

    def made(count, answer="It is {n}."):
        return [
            {
                "messages": [
                    {"role": "user", "content": f"What is {n}?"},
                    {"role": "assistant", "content": answer.format(n=n)},
                ]
            }
            for n in range(count)
        ]

    return made
