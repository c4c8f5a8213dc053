"""The templates that models ship, of those that TRL packages, held against ours, and recognised as what they are."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from fastft.data.known_format import recognise_format, response_parts
from fastft.data.template import render
from fastft.errors import DataError
from fastft.registry.chat import chat_format

trl = pytest.importorskip("trl")

FOLDER = Path(trl.__file__).parent / "chat_templates"
SYSTEM = [{"role": "system", "content": "Be brief. Éà 漢字"}]
TURNS = [
    {"role": "user", "content": "What is 2 + 2?\nSay why."},
    {"role": "assistant", "content": "4, by counting."},
    {"role": "user", "content": "And {{ 3 }} <b>'3'</b>?"},
    {"role": "assistant", "content": "6\n\nas before."},
]
THOUGHT = [*TURNS[:3], {**TURNS[3], "reasoning_content": "3 and 3\n\nmake 6"}]
INLINE = [*TURNS[:1], {"role": "assistant", "content": "<think>\n2 and 2\n</think>\n\n4"}, *TURNS[2:3]]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Look at the sky.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "weather", "arguments": {"place": "l'Île\n", "n": 3}},
}
CALLED = [
    TURNS[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "no rain", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "It is dry."},
    TURNS[2],
]
TWICE = [
    TURNS[0],
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "no rain", "tool_call_id": "abcdefghi"},
    {"role": "tool", "content": "sun", "tool_call_id": "abcdefghi"},
]
# (messages, generation prompt, tools, further variables)
CASES = {
    "asked": (TURNS[:1], True, None, {}),
    "asked again": (TURNS[:3], True, None, {}),
    "answered": (TURNS, False, None, {}),
    "system, asked": (SYSTEM + TURNS[:3], True, None, {}),
    "system, answered": (SYSTEM + TURNS, False, None, {}),
    "tools, asked": (TURNS[:1], True, [TOOL, TOOL], {}),
    "tools, system": (SYSTEM + TURNS[:1], True, [TOOL], {}),
    "called": (SYSTEM + CALLED[:2], False, [TOOL], {}),
    "called, told": (SYSTEM + CALLED[:3], True, [TOOL], {}),
    "called, told, asked": (SYSTEM + CALLED, True, [TOOL], {}),
    "called twice": (SYSTEM + TWICE, True, [TOOL], {}),
    "thought": (SYSTEM + THOUGHT, False, None, {}),
    "thought earlier": (SYSTEM + INLINE, True, None, {}),
    "no thinking": (SYSTEM + TURNS[:1], True, None, {"enable_thinking": False}),
    "thinking": (SYSTEM + TURNS[:1], True, None, {"enable_thinking": True}),
}
PLAIN = ("asked", "asked again", "answered", "system, asked", "system, answered")
ASKED = ("asked", "asked again", "system, asked")
TOOLS = ("tools, asked", "tools, system", "called", "called, told", "called, told, asked")
THINKING = ("thought", "thought earlier", "no thinking", "thinking")
# template in TRL -> (format, what has to be equal)
OWN = {
    "cohere": ("command-r", PLAIN),
    "gemma": ("gemma", ("asked", "asked again", "answered")),  # it refuses system messages
    "gemma3": ("gemma-3", PLAIN),
    "gemma4": ("gemma-4", (*PLAIN, "thinking", "no thinking")),
    "gemma4_v5": ("gemma-4", (*PLAIN, "thought", "thinking", "no thinking")),
    "gptoss": ("gpt-oss", PLAIN),
    "lfm2": ("lfm-2", (*PLAIN, "tools, asked", "tools, system")),
    "lfm2_v2": ("lfm-2", (*PLAIN, *TOOLS, "called twice")),
    "lfm2_2_5": ("lfm-2.5", (*PLAIN, "tools, asked", "tools, system", "thought earlier")),
    "llama3": ("llama-3", PLAIN),
    "llama3_1": ("llama-3.1", (*PLAIN, *TOOLS)),
    "llama3_2": ("llama-3.1", (*PLAIN, *TOOLS)),
    "phi3": ("phi-3", ASKED),  # it writes EOS after a finished conversation
    "phi3_5": ("phi-3", ASKED),
    "qwen2_5": ("qwen-2.5", (*PLAIN, *TOOLS, "called twice")),
    "qwen3": ("qwen-3", (*PLAIN, *TOOLS, "called twice", *THINKING)),
    "qwen3_instruct_2507": ("qwen-3-instruct", (*PLAIN, *TOOLS, "called twice")),
    # it renders no reasoning in a last answer, which ours can be trained on, and leaves line feeds where it cuts it
    "deepseek_r1_distill": ("deepseek-r1", ASKED),
}


def own(name):
    form = chat_format(OWN[name][0])
    template = (FOLDER / f"{name}.jinja").read_text("utf-8")
    eos = form.eos or form.stop_token
    return SimpleNamespace(chat_template=template, bos_token=form.bos or None, eos_token=eos)


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, (_, cases) in OWN.items() for case in cases])
def test_same_text(name, case):
    tokenizer, form = own(name), chat_format(OWN[name][0])
    messages, prompt, tools, variables = CASES[case]
    variables = {"date_string": "1 Jan 2030", "bos_token": form.bos, "eos_token": tokenizer.eos_token, **variables}
    options = {"add_generation_prompt": prompt, "tools": tools, **variables}
    assert render(form, messages, **options).text == render(tokenizer.chat_template, messages, **options).text


@pytest.mark.parametrize("name", OWN)
def test_recognised(name):
    form = recognise_format(own(name))
    assert form is not None and form.name == OWN[name][0]
    assert response_parts(own(name)) == (form.instruction_part, form.response_part)


def test_neither_an_unknown_template_nor_a_near_one_is_recognised():
    chatml = chat_format("chatml").jinja
    for template in (
        chatml.replace("im_start", "im_begin"),
        chatml.replace("system\\n'", "system\\n\\n'"),
        "{{ messages[0]['content'] }}",
        "{% for",
        None,
    ):
        assert recognise_format(SimpleNamespace(chat_template=template, bos_token=None, eos_token="x")) is None
    assert recognise_format(SimpleNamespace(chat_template=chatml, bos_token=None, eos_token="x")).name == "chatml"


def test_parts_of_a_template_that_is_not_known():
    unknown = SimpleNamespace(
        chat_template=chat_format("chatml").jinja.replace("im_start", "im_begin"), bos_token=None, eos_token="x"
    )
    assert response_parts(unknown) == ("<|im_begin|>user\n", "<|im_begin|>assistant\n")
    for name in ("cohere2", "glm4moe", "nemotron_3_nano", "qwen3_5_think"):
        tokenizer = SimpleNamespace(
            chat_template=(FOLDER / f"{name}.jinja").read_text("utf-8"), bos_token="<s>", eos_token="</s>"
        )
        instruction, response = response_parts(tokenizer)
        text = render(tokenizer.chat_template, TURNS, bos_token="<s>", eos_token="</s>").text
        assert text.count(instruction + "What") == text.count(instruction + "And") == 1, (name, instruction)
        assert text.count(response) >= 2 or name in ("nemotron_3_nano", "qwen3_5_think"), (name, response)
    with pytest.raises(DataError, match=r"chat_template.*get_chat_template"):
        response_parts(SimpleNamespace(chat_template=None, bos_token=None, eos_token=None))
