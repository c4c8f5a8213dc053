"""Real tokenizers, rebuilt from the vocabulary files of a llama.cpp source folder, with the token ids they must give.

Set FASTFT_LLAMA_CPP_SOURCE to an unpacked llama.cpp (llama-cpp-python's source package carries one in vendor/). Its
converter needs the packages sentencepiece and protobuf.
"""

import os
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastft.export.gguf import pre_tokenizers as known
from fastft.export.gguf.file import read_gguf

MISSING = "set FASTFT_LLAMA_CPP_SOURCE to a folder with llama.cpp's sources"
_SPLITS = {entry.name: entry for entry in known._TABLE}
_LIKE = {"mpt": "gpt-2", "command-r": "smollm", "refact": "starcoder"}
NAMES = (
    "command-r", "deepseek-coder", "deepseek-llm", "gpt-2", "llama-bpe", "llama-spm", "mpt", "phi-3", "qwen2", "qwen35",
    "refact", "starcoder", "bert-bge",
)  # fmt: skip


def source() -> Path | None:
    folder = os.environ.get("FASTFT_LLAMA_CPP_SOURCE")
    return Path(folder) if folder and Path(folder).is_dir() else None


def vectors(name: str) -> list[tuple[str, list[int]]]:
    """Return texts and the ids that the original tokenizer gives them, without special tokens around."""
    stem = source() / "models" / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{stem}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    ids = Path(f"{stem}.out").read_text(encoding="utf-8").splitlines()
    assert len(texts) - 1 == len(ids), (len(texts), len(ids))
    return [(text, [int(index) for index in line.split()]) for text, line in zip(texts, ids)]


def real_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of llama.cpp's `ggml-vocab-<name>.gguf` as a transformers one."""
    keys = read_gguf(source() / "models" / f"ggml-vocab-{name}.gguf").metadata
    keys = {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items()}
    make = {"gpt2": _byte_level, "llama": _sentencepiece, "bert": _wordpiece}[keys["model"]]
    backend = make(keys, name)
    tokens, types = keys["tokens"], keys["token_type"]
    added = [
        AddedToken(tokens[index], special=kind == 3, normalized=False)
        for index, kind in enumerate(types)
        if kind in (2, 3, 4)
    ]
    backend.add_tokens(added)
    named = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "seperator": "sep", "cls": "cls"}
    special = {
        f"{ours}_token": tokens[keys[f"{theirs}_token_id"]]
        for theirs, ours in named.items()
        if f"{theirs}_token_id" in keys
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=name in ("llama-bpe", "gpt-2", "mpt", "refact", "starcoder"),
        **special,
    )


def _byte_level(keys, name):
    tokens = keys["tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in keys["merges"]]
    pre = _SPLITS[_LIKE.get(keys["pre"], keys["pre"])]
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=bool(pre.whole_words)))
    if pre.splits[-1] == known.GPT2:
        steps = [pre_tokenizers.Digits(individual_digits=True)] if len(pre.splits) > 1 else []
        backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=True)])
    else:
        steps = [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
        backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    if name == "llama-bpe":
        begin = tokens[keys["bos_token_id"]]
        backend.post_processor = processors.TemplateProcessing(f"{begin} $A", None, [(begin, keys["bos_token_id"])])
    return backend


def _sentencepiece(keys, name):
    tokens, scores, types = keys["tokens"], keys["scores"], keys["token_type"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    plain = {token: scores[index] for token, index in vocabulary.items() if types[index] == 1}
    merges = []
    for token in plain:
        for cut in range(1, len(token)):
            if token[:cut] in plain and token[cut:] in plain:
                merges.append((-plain[token], vocabulary[token[:cut]], vocabulary[token[cut:]]))
    merges = [(tokens[left], tokens[right]) for _, left, right in sorted(merges)]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    begin = tokens[keys["bos_token_id"]]
    backend.post_processor = processors.TemplateProcessing(f"{begin} $A", None, [(begin, keys["bos_token_id"])])
    return backend


def _wordpiece(keys, name):
    types = keys["token_type"]
    texts = [
        token if kind != 1 else token[1:] if token.startswith("▁") else f"##{token}"
        for token, kind in zip(keys["tokens"], types)
    ]
    texts = [text if text else f"[unused-{index}]" for index, text in enumerate(texts)]
    backend = Tokenizer(models.WordPiece({text: index for index, text in enumerate(texts)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = {name: texts.index(name) for name in ("[CLS]", "[SEP]")}
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, list(ids.items()))
    return backend
