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
_LETTERS = (  # written by number, since some look like others
    "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-"
    "\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-"
    "\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
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
        "deepseek-llm",
        (
            "[\r\n]",
            _LETTERS,
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _HAN,
            r"\p{N}+",
        ),
        False,
        False,
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
