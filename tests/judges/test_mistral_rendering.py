"""mistral-common's own rendering, with Mistral's real tokenizers: the same text, and the same token ids."""

import re
from pathlib import Path

import pytest

from fastft.data.template import render
from fastft.registry.chat import chat_format

# `Tokenized.text` is the judge's only text; mistral-common would rather have token ids decoded
pytestmark = pytest.mark.filterwarnings("ignore:`text` property of `Tokenized`:DeprecationWarning")
mistral_common = pytest.importorskip("mistral_common", reason="Mistral's tokenizers come with mistral-common")

from mistral_common.protocol.instruct import messages as theirs  # noqa: E402
from mistral_common.protocol.instruct.request import ChatCompletionRequest  # noqa: E402
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool, ToolCall  # noqa: E402
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer  # noqa: E402

FILES = {
    "mistral-v1": "tokenizer.model.v1",
    "mistral-v3": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral-v3-tekken": "tekken_240718.json",
    "mistral-v7": "mistral_instruct_tokenizer_241114.model.v7",
}
SYSTEM = [{"role": "system", "content": "Be brief. Éà 漢字"}]
TURNS = [
    {"role": "user", "content": "What is 2 + 2?\nSay why."},
    {"role": "assistant", "content": "4, by counting."},
    {"role": "user", "content": "And <b>'3'</b>?"},
    {"role": "assistant", "content": "6\n\nas before."},
    {"role": "user", "content": "Thanks"},
]
CASES = {
    "one": TURNS[:1],
    "one, system": SYSTEM + TURNS[:1],
    "two": TURNS[:3],
    "two, system": SYSTEM + TURNS[:3],
    "three, system": SYSTEM + TURNS,
}
WEATHER = {
    "name": "weather",
    "description": "Look at the sky.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"place": "Rome"}}}
CALLED = [
    {"role": "user", "content": "Rain in Rome?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "no rain", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "It is dry."},
    {"role": "user", "content": "And Oslo?"},
]
KINDS = {
    "system": theirs.SystemMessage,
    "user": theirs.UserMessage,
    "assistant": theirs.AssistantMessage,
    "tool": theirs.ToolMessage,
}


@pytest.fixture(scope="module")
def tokenizers():
    folder = Path(mistral_common.__file__).parent / "data"
    return {name: MistralTokenizer.from_file(str(folder / file)) for name, file in FILES.items()}


def encoded(tokenizer, messages, tools=()):
    calls = [ToolCall(id=CALL["id"], function=FunctionCall(name="weather", arguments='{"place": "Rome"}'))]
    made = []
    for message in messages:
        fields = {name: value for name, value in message.items() if name not in ("role", "tool_calls")}
        made.append(KINDS[message["role"]](**fields, **({"tool_calls": calls} if "tool_calls" in message else {})))
    return tokenizer.encode_chat_completion(ChatCompletionRequest(messages=made, tools=list(tools) or None))


def plain(text):
    """Return mistral-common's debugging text with SentencePiece's signs for spaces and bytes undone."""
    bytes_ = re.sub(r"(<0x[0-9A-F]{2}>)+", lambda m: bytes.fromhex(re.sub("<0x|>", "", m[0])).decode(), text)
    return bytes_.replace("▁", " ")


def ids(tokenizer, text, special):
    """Tokenise a rendering: control tokens as themselves, the text between them piece by piece."""
    inner = tokenizer.instruct_tokenizer.tokenizer
    pattern = "(" + "|".join(re.escape(token) for token in special) + ")"
    found = []
    for piece in (piece for piece in re.split(pattern, text) if piece):
        if piece in special:
            found.append(inner.get_special_token(piece))
        else:
            # SentencePiece puts a space before every piece by itself
            spaced = piece.removeprefix(" ") if hasattr(inner, "_model") and "tekken" not in str(type(inner)) else piece
            found += inner.encode(spaced, bos=False, eos=False)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FILES)
def test_same_text_and_ids(tokenizers, name, case):
    expected = encoded(tokenizers[name], CASES[case])
    text = render(chat_format(name), CASES[case], add_generation_prompt=True).text
    assert text == plain(expected.text)
    special = ["<s>", "</s>"] + (
        ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"] if "v1" not in name else []
    )
    assert ids(tokenizers[name], text, special) == expected.tokens


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("name", ["mistral-v3", "mistral-v3-tekken"])
def test_same_text_with_tools(tokenizers, name, count):
    expected = encoded(tokenizers[name], CALLED[:count], [Tool(function=Function(**WEATHER))])
    tools = [{"type": "function", "function": WEATHER}]
    assert render(chat_format(name), CALLED[:count], tools=tools).text == plain(expected.text)
