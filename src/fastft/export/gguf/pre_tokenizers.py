"""Which of llama.cpp's pre-tokenisers splits text as a byte-level BPE tokenizer does, by the definitions of both.

A tokenizer.json says how text is split before merging: a list of regular expressions applied one after the other.
llama.cpp has its splits compiled in and picks one by the name in `tokenizer.ggml.pre`; names also fix whether merges
are skipped for whole words and whether spaces before punctuation are dropped when tokens become text.
"""

from collections.abc import Iterator
from typing import Any

from attrs import frozen

from fastft.errors import UsageError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
QWEN2 = rf"{_ENDINGS}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
TEKKEN = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_PATHS}|{_SPACES}"
_GPT4O_REST = rf"{_PATHS}|{_SPACES}"
GPT4O = rf"{_LEAD}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_LEAD}{_UPPER}+{_LOWER}*{_ENDINGS}?|\p{{N}}{{1,3}}|{_GPT4O_REST}"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^" + "\r\n" + r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[" + "\r\n" + r"]*|\s*[" + "\r\n" + r"]+|\s+(?!\S)|\s+"
)
_LETTERS = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭ"
    r"ℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⲳⲳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_HAN = "[一-龥ࠀ-一가-퟿]+"
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)


@frozen
class Pre:
    """One of llama.cpp's names: the splits, and what else it fixes (None: llama.cpp's does not matter here).

    `whole_words`: a word that is a token is taken without merging. `drops_spaces`: " ." becomes "." in text.
    `needs_bos`: it is meant for tokenizers that have (True) or have not (False) a token for the beginning of a text.
    """

    name: str
    splits: tuple[str, ...]
    whole_words: bool | None = False
    drops_spaces: bool = True
    has_bos: bool | None = None


_TABLE = (
    Pre("gpt-2", (GPT2,)),
    Pre("trillion", (GPT2,), drops_spaces=False),
    Pre("starcoder", (r"\p{N}", GPT2)),
    Pre("smollm", (r"\p{N}", GPT2), drops_spaces=False),
    Pre("llama-bpe", (LLAMA3,), whole_words=True, has_bos=True),
    Pre("glm4", (LLAMA3,), whole_words=True, has_bos=False),
    Pre("chatglm-bpe", (LLAMA3,), has_bos=False),
    Pre("dbrx", (LLAMA3,)),
    Pre("qwen2", (QWEN2,), drops_spaces=False),
    Pre("stablelm2", (QWEN2,)),
    Pre("qwen35", (QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}"),), False, False),
    Pre("tekken", (TEKKEN,), whole_words=None, drops_spaces=False),
    Pre("gpt-4o", (GPT4O,), drops_spaces=False),
    Pre("tiny_aya", (r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O), drops_spaces=False),
    Pre("deepseek-v3", (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3), drops_spaces=False),
    Pre("deepseek-coder", ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}"), drops_spaces=False),
    Pre(
        "deepseek-llm", ("[\r\n]", _LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _HAN, r"\p{N}+"), False, False
    ),
    Pre(
        "seed-coder",
        (rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}" + r"\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",),
        False,
        False,
    ),
    Pre("bailingmoe", (_BAILING,), drops_spaces=False),
    Pre("bloom", (r" ?[^(\s|[.,!?…。，、।۔،])]+",)),
)
NAMES = tuple(entry.name for entry in _TABLE)


def pre_tokenizer_name(data: dict[str, Any], has_bos: bool, drops_spaces: bool) -> str:
    """Return llama.cpp's name for the pre-tokeniser of a tokenizer.json (`data`).

    `has_bos`: the tokenizer has a token for the beginning; `drops_spaces`: it cleans spaces up when decoding. Raises
    UsageError with the definition that llama.cpp does not have and with what can be done.
    """
    splits = tuple(_splits(data.get("pre_tokenizer")))
    whole_words = bool(data["model"].get("ignore_merges", False))
    fitting = [
        entry
        for entry in _TABLE
        if tuple(map(_plain, entry.splits)) == tuple(map(_plain, splits))
        and entry.whole_words in (None, whole_words)
        and entry.has_bos in (None, has_bos)
    ]
    if not fitting:
        raise UsageError(
            f"the tokenizer splits text by {list(splits)} (ignore_merges={whole_words}), and fastft knows no "
            "pre-tokeniser of llama.cpp that does the same; if you know its name there, pass pre_tokenizer='...' "
            f"(one of {', '.join(NAMES)} or another that your llama.cpp has)"
        )
    return next((entry.name for entry in fitting if entry.drops_spaces == drops_spaces), fitting[0].name)


def _plain(split: str) -> str:
    """Return a regular expression with line ends written in one way."""
    return split.replace("\r", r"\r").replace("\n", r"\n")


def _splits(node: dict[str, Any] | None) -> Iterator[str]:
    """Yield the regular expressions of a pre-tokeniser in order; what is none is yielded by its description."""
    kind = (node or {}).get("type")
    if node is None:
        return
    if kind == "Sequence":
        for inner in node["pretokenizers"]:
            yield from _splits(inner)
    elif kind == "ByteLevel" and not node.get("add_prefix_space", True):
        if node.get("use_regex", True):
            yield GPT2
    elif kind == "Digits":
        yield r"\p{N}" if node.get("individual_digits") else r"\p{N}+"
    elif kind == "Split" and "Regex" in node["pattern"] and _isolates(node):
        yield node["pattern"]["Regex"]
    else:
        yield str(node)


def _isolates(node: dict[str, Any]) -> bool:
    behaviour, inverted = node.get("behavior"), bool(node.get("invert"))
    return (behaviour == "Isolated") or (behaviour == "Removed" and inverted)
