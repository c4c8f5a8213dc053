"""The tokenizer as a GGUF file holds it: tokens, their types, merges or scores, special ids and the chat template.

All is read from the tokenizer that the model was trained with, so tokens added to it are there too. Behaviour counts,
not names: whether a token is put at the beginning is found by encoding a text.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from fastft.errors import Problem, UsageError
from fastft.export.gguf.file import Value, text, truth, u32
from fastft.export.gguf.pre_tokenizers import pre_tokenizer_name

# llama.cpp's types of tokens
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE = "▁"
# Added tokens that checkpoints often do not mark as special, though they stand for no text.
_LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)
_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0


@frozen
class Vocabulary:
    """The keys of a tokenizer, and notes on what llama.cpp does otherwise."""

    metadata: dict[str, Value]
    notes: tuple[str, ...] = ()


@frozen
class _Tokens:
    texts: list[str]
    types: list[int]


def vocabulary_of(
    tokenizer: Any, rows: int, pre_tokenizer: str | None = None, folder: Path | None = None, ends: tuple[int, ...] = ()
) -> Vocabulary:
    """Return the keys of a tokenizer for a model whose embedding has `rows` rows.

    * `pre_tokenizer`: llama.cpp's name for how text is split, where fastft does not find it by itself.
    * `folder`: where a SentencePiece `tokenizer.model` may lie, which has the exact scores.
    * `ends`: further tokens at which generation stops (the generation config's).

    Raises UsageError for a tokenizer that llama.cpp has no counterpart of, with what to do.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        kind = type(tokenizer).__name__
        remedy = "Load the model's tokenizer.json (transformers' fast tokenizer) and pass that."
        raise UsageError(Problem("tokenizer", kind, "a tokenizer with a tokenizer.json", remedy))
    data = json.loads(backend.to_str())
    kind, notes = data["model"]["type"], []
    tokens = _tokens(tokenizer, data, rows)
    if kind == "BPE" and data["model"].get("byte_fallback"):
        keys, notes = _sentencepiece(tokenizer, data, tokens, folder)
    elif kind == "BPE":
        keys, notes = _byte_level(tokenizer, data, tokens, pre_tokenizer)
    elif kind == "WordPiece":
        keys = _wordpiece(data, tokens)
    else:
        remedy = "llama.cpp has no counterpart that fastft writes."
        raise UsageError(Problem("tokenizer model", kind, "BPE, SentencePiece BPE or WordPiece", remedy))
    special, more = _special(tokenizer, ends)
    keys |= special | _chat_template(tokenizer)
    return Vocabulary({f"tokenizer.{key}": value for key, value in keys.items()}, (*notes, *more))


def _tokens(tokenizer: Any, data: dict[str, Any], rows: int) -> _Tokens:
    """Return the text and type of each of `rows` tokens; rows without a token are padded."""
    known = {index: token for token, index in tokenizer.get_vocab().items()}
    beyond = sorted(index for index in known if index >= rows)
    if beyond:
        raise UsageError(
            f"{len(beyond)} tokens of the tokenizer have no row in the embeddings ({rows} rows), such as "
            f"{known[beyond[0]]!r} (id {beyond[0]}); give them rows (fastft.add_tokens), or pass the model's own "
            "tokenizer"
        )
    added = {entry["id"]: entry for entry in data.get("added_tokens", ())}
    unknown = data["model"].get("unk_token")
    subword = data["model"]["type"] != "BPE" or data["model"].get("byte_fallback")
    texts, types = [], []
    for index in range(rows):
        token = known.get(index)
        if token is None:
            token, kind = f"[PAD{index}]", UNUSED
        elif subword and token == unknown:
            kind = UNKNOWN
        elif index in added:
            token = added[index]["content"]
            special = added[index]["special"] or bool(_LOOKS_SPECIAL.fullmatch(token))
            kind = CONTROL if special else USER_DEFINED
            # llama.cpp looks for these in text as it was given
            token = token if special or not subword else token.replace(_SPACE, " ")
        else:
            kind = BYTE if subword and _BYTE_TOKEN.fullmatch(token) else NORMAL
        texts.append(token)
        types.append(kind)
    twice = {token: index for index, token in enumerate(texts)}
    if len(twice) != rows:
        first = next(index for index, token in enumerate(texts) if twice[token] != index)
        raise UsageError(
            f"tokens {first} and {twice[texts[first]]} are both {texts[first]!r}; llama.cpp needs each once"
        )
    return _Tokens(texts, types)


def _listed(tokens: _Tokens) -> dict[str, Value]:
    return {"ggml.tokens": Value("str", tokens.texts), "ggml.token_type": Value("i32", tokens.types)}


# Kinds ----------------------------------------------------------------------------------------------------------------


def _byte_level(
    tokenizer: Any, data: dict[str, Any], tokens: _Tokens, pre: str | None
) -> tuple[dict[str, Value], list[str]]:
    has_bos = tokenizer.bos_token_id is not None
    cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    name = pre or pre_tokenizer_name(data, has_bos, cleans)
    keys = {"ggml.model": text("gpt2"), "ggml.pre": text(name)} | _listed(tokens)
    keys["ggml.merges"] = Value("str", [f"{_merged(left)} {_merged(right)}" for left, right in _merges(data)])
    changes = [kind for kind in _normalizers(data.get("normalizer")) if kind != "NFC"]
    note = f"llama.cpp does not normalise text ({', '.join(changes)}) before this tokenizer splits it"
    return keys, [note] if changes else []


def _merges(data: dict[str, Any]) -> list[tuple[str, str]]:
    merges = data["model"]["merges"]
    return [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges]


def _merged(part: str) -> str:
    """Return half a merge with spaces as byte-level BPE writes them, since a space parts the halves."""
    return part.replace(" ", "Ġ")


def _normalizers(node: dict[str, Any] | None) -> list[str]:
    if node is None:
        return []
    if node["type"] == "Sequence":
        return [name for inner in node["normalizers"] for name in _normalizers(inner)]
    return [node["type"]]


def _sentencepiece(
    tokenizer: Any, data: dict[str, Any], tokens: _Tokens, folder: Path | None
) -> tuple[dict[str, Value], list[str]]:
    """Keys of a SentencePiece BPE: a pair is merged in the order of the scores of what it makes."""
    exact = _exact_scores(tokenizer, tokens, folder)
    scores = _scores(data, tokens) if exact is None else exact
    prefix, notes = _prefix_space(data)
    keys = {"ggml.model": text("llama"), "ggml.pre": text("default")} | _listed(tokens)
    keys["ggml.scores"] = Value("f32", scores)
    keys["ggml.add_space_prefix"] = truth(prefix != "never")
    return keys, notes


def _exact_scores(tokenizer: Any, tokens: _Tokens, folder: Path | None) -> list[float] | None:
    """Return scores from the SentencePiece model beside the tokenizer, None where there is none that fits."""
    named = str(getattr(tokenizer, "vocab_file", None) or "")
    found = [Path(named)] if named.endswith(".model") else []
    found += [folder / "tokenizer.model"] if folder is not None else []
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        return None
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(path))
    count = model.vocab_size()
    if count > len(tokens.texts):
        return None
    scores = [_ADDED_SCORE if kind != UNUSED else _PADDING_SCORE for kind in tokens.types]
    for index in range(count):
        if tokens.types[index] in (NORMAL, BYTE, UNKNOWN):
            if model.id_to_piece(index) != tokens.texts[index]:
                return None
            scores[index] = model.get_score(index)
    return scores


def _scores(data: dict[str, Any], tokens: _Tokens) -> list[float]:
    """Return scores that merge in the order of the tokenizer's merges: minus the first rank that makes a token."""
    merges = _merges(data)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    last = float(-len(merges) - 1)
    scores = []
    for token, kind in zip(tokens.texts, tokens.types):
        if kind in (NORMAL, BYTE, UNKNOWN):
            scores.append(-float(ranks[token]) if token in ranks else last if kind == NORMAL else 0.0)
        else:
            scores.append(_PADDING_SCORE if kind == UNUSED else _ADDED_SCORE)
    return scores


def _prefix_space(data: dict[str, Any]) -> tuple[str, list[str]]:
    """Return when a space is put before a text, and where llama.cpp, which always puts one or never, differs.

    `always` is also after special tokens, `first` only at the beginning.
    """
    nodes = [*_nodes(data.get("normalizer"), "normalizers"), *_nodes(data.get("pre_tokenizer"), "pretokenizers")]
    for node in nodes:
        if node["type"] == "Prepend":
            return "always", []
        if node["type"] == "Metaspace":
            scheme = node.get("prepend_scheme", "always")
            doubled = (
                "the tokenizer puts no space before a text that begins with one; llama.cpp does, as SentencePiece does"
            )
            once = (
                "the tokenizer puts a space at the beginning of a text only, llama.cpp also after special tokens: "
                "texts that follow one may be split otherwise"
            )
            return scheme, {"always": [doubled], "first": [doubled, once]}.get(scheme, [])
    return "never", []


def _nodes(node: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if node is None:
        return []
    return [leaf for child in node[inner] for leaf in _nodes(child, inner)] if node["type"] == "Sequence" else [node]


def _wordpiece(data: dict[str, Any], tokens: _Tokens) -> dict[str, Value]:
    """Keys of a WordPiece vocabulary: llama.cpp marks beginnings of words where WordPiece marks continuations."""
    mark = data["model"].get("continuing_subword_prefix", "##")
    texts = []
    for token, kind in zip(tokens.texts, tokens.types):
        plain = kind in (CONTROL, UNUSED, UNKNOWN)
        texts.append(token if plain else token[len(mark) :] if token.startswith(mark) else _SPACE + token)
    types = [CONTROL if kind == UNKNOWN else kind for kind in tokens.types]
    keys = {"ggml.model": text("bert"), "ggml.pre": text("default")} | _listed(_Tokens(texts, types))
    for node in _nodes(data.get("normalizer"), "normalizers"):
        if node["type"] == "BertNormalizer":
            keys["ggml.normalizer.lowercase"] = truth(node.get("lowercase", True))
            strip = node.get("strip_accents")
            keys["ggml.normalizer.strip_accents"] = truth(node.get("lowercase", True) if strip is None else strip)
    return keys


# Special tokens -------------------------------------------------------------------------------------------------------


def _special(tokenizer: Any, ends: tuple[int, ...]) -> tuple[dict[str, Value], list[str]]:
    """Return the ids of special tokens, what is put around a text, and notes."""
    notes: list[str] = []
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
        "seperator": getattr(tokenizer, "sep_token_id", None),
        "cls": getattr(tokenizer, "cls_token_id", None),
        "mask": getattr(tokenizer, "mask_token_id", None),
    }
    before, after = _around(tokenizer)
    if ids["bos"] is None:
        ids["bos"] = ids["cls"]
    if ids["eos"] is None:
        ids["eos"] = ids["seperator"]
    # llama.cpp takes a token of its own choice for the end of a turn unless told
    turn = turn_end(tokenizer)
    others = [index for index in dict.fromkeys(ends) if index not in (ids["eos"], turn)]
    stops = ([] if turn is None else [turn]) + others
    ids |= dict(zip(("eot", "eom"), stops))
    if len(stops) > 2:
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(index)) for index in stops[2:])
        notes.append(f"GGUF names three tokens that end generation; llama.cpp knows {names} only if it does by name")
    keys = {f"ggml.{name}_token_id": u32(index) for name, index in ids.items() if index is not None}
    keys["ggml.add_bos_token"] = truth(bool(before) and before == [ids["bos"]])
    keys["ggml.add_eos_token"] = truth(bool(after) and after == [ids["eos"]])
    for where, found in (("before", before), ("after", after)):
        if found and found not in ([ids["bos"]], [ids["eos"]]):
            tokens = tokenizer.convert_ids_to_tokens(found)
            notes.append(
                f"the tokenizer puts {tokens} {where} every text, llama.cpp does not; the chat template is as it is"
            )
    return keys, notes


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that are put before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def turn_end(tokenizer: Any) -> int | None:
    """Return the token with which the chat template closes an answer, None if there is no such special token."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        return None
    answer = "qzvx"
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    try:
        rendered = tokenizer.apply_chat_template(conversation, tokenize=False)
    except (TemplateError, TypeError, ValueError, KeyError):
        return None  # a template that wants other roles or fields says nothing of this
    rest = rendered.rpartition(answer)[2].lstrip()
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    fitting = [token for token in added if rest.startswith(token)]
    return added[max(fitting, key=len)] if answer in rendered and fitting else None


def _chat_template(tokenizer: Any) -> dict[str, Value]:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return {}
    if isinstance(template, str):
        return {"chat_template": text(template)}
    named: Mapping[str, str] = template
    keys = {f"chat_template.{name}": text(value) for name, value in named.items() if name != "default"}
    if keys:
        keys["chat_templates"] = Value("str", sorted(name for name in named if name != "default"))
    return keys | ({"chat_template": text(named["default"])} if "default" in named else {})
