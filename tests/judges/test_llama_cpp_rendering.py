"""llama.cpp's own renderings of the formats that it knows, held against ours: the same text, character by character."""

import ctypes
from pathlib import Path

import pytest
from attrs import field, frozen

from fastft.data.template import render
from fastft.registry.chat import chat_format, with_tokens

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's library comes with the package xllamacpp")


class Message(ctypes.Structure):
    _fields_ = [("role", ctypes.c_char_p), ("content", ctypes.c_char_p)]


@pytest.fixture(scope="module")
def library():
    found = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    found.llama_chat_apply_template.restype = ctypes.c_int32
    found.llama_chat_apply_template.argtypes = (
        ctypes.c_char_p, ctypes.POINTER(Message), ctypes.c_size_t, ctypes.c_bool, ctypes.c_char_p, ctypes.c_int32,
    )  # fmt: skip
    return found


def theirs(library, name, messages, prompt):
    chat = (Message * len(messages))(*((m["role"].encode(), m["content"].encode()) for m in messages))
    buffer = ctypes.create_string_buffer(1 << 16)
    length = library.llama_chat_apply_template(name.encode(), chat, len(messages), prompt, buffer, len(buffer))
    assert 0 < length < len(buffer), f"llama.cpp does not know {name}"
    return buffer.raw[:length].decode()


SYSTEM = [{"role": "system", "content": "Be brief. Éà 漢字"}]
TURNS = [
    {"role": "user", "content": "What is 2 + 2?\nSay why."},
    {"role": "assistant", "content": "4, by counting."},
    {"role": "user", "content": "And {{ 3 }} <b>'3'</b>?"},
    {"role": "assistant", "content": "6\n\nas before."},
]
CASES = {
    "asked": (TURNS[:1], True),
    "asked, system": (SYSTEM + TURNS[:1], True),
    "asked again": (TURNS[:3], True),
    "asked again, system": (SYSTEM + TURNS[:3], True),
    "answered": (TURNS[:2], False),
    "answered, system": (SYSTEM + TURNS[:2], False),
    "answered twice": (TURNS, False),
    "answered twice, system": (SYSTEM + TURNS, False),
}


# Deliberate differences, each for one format --------------------------------------------------------------------------


def system_of_its_own(form, messages):
    """The format has a system message where the conversation has none; llama.cpp never adds one."""
    return (
        messages if messages[0]["role"] == "system" else [{"role": "system", "content": form.default_system}, *messages]
    )


def preface(form, messages):
    """The format opens every system turn with text of its own; llama.cpp leaves that to the caller."""
    start = form.system_preface.replace("{date}", form.date).replace("{mode}", "/think")
    given = system_of_its_own(form, messages) if form.default_system else messages
    content, rest = (given[0]["content"], given[1:]) if given[0]["role"] == "system" else ("", given)
    return [{"role": "system", "content": start + content + form.system_after}, *rest]


def system_in_the_last_question(form, messages):
    """mistral-common writes the system message into the last user turn; llama.cpp into the first."""
    if messages[0]["role"] != "system":
        return messages
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    whole = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[last]['content']}"}
    return [*messages[1:last], whole, *messages[last + 1 :]]


def meta_spaces(text):
    """Meta's reference puts a space on either side of an answer; llama.cpp none."""
    for answer in (TURNS[1]["content"], TURNS[3]["content"]):
        text = text.replace(f"[/INST]{answer}</s>", f"[/INST] {answer} </s>")
    return text


def one_line(text):
    """Vicuna's own separators are a space, and nothing after EOS; llama.cpp writes line feeds."""
    for content in (SYSTEM[0]["content"], TURNS[0]["content"], TURNS[2]["content"]):
        text = text.replace(f"{content}\n\nUSER", f"{content} USER").replace(f"{content}\nASS", f"{content} ASS")
    return text.replace("questions.\n\n", "questions. ").replace("</s>\n", "</s>")


def no_gap(text):
    """DeepSeek's own template puts nothing between the system message and the first user turn."""
    return text.replace(f"{SYSTEM[0]['content']}\n\n", SYSTEM[0]["content"])


def stop_at_the_end(text):
    """GLM-4 stops by sampling <|user|>; a finished conversation ends with it, so that it can be learnt."""
    return text if text.endswith("<|assistant|>\n") else text + "<|user|>"


def empty_system(text):
    """llama.cpp trims contents, and so the preface where no system message follows it."""
    return text.replace("26 Jul 2024<|eot_id|>", "26 Jul 2024\n\n<|eot_id|>")


def harmony(text):
    """llama.cpp leaves out the channel, ends every answer with <|return|> and has no system turn of its own."""
    text = text.replace("<|start|>assistant<|message|>", "<|start|>assistant<|channel|>final<|message|>")
    head, mark, tail = text.rpartition("<|return|>")
    text = head.replace("<|return|>", "<|end|>") + mark + tail if not tail else text.replace("<|return|>", "<|end|>")
    rules = SYSTEM[0]["content"]
    instructions = f"<|start|>developer<|message|># Instructions\n\n{rules}\n\n<|end|>"
    text = text.replace(f"<|start|>system<|message|>{rules}<|end|>", instructions)
    own = render(chat_format("gpt-oss"), TURNS[:1], current_date="2024-07-26").text
    return own[: own.index("<|start|>user")] + text


def thinking_of_the_last(text):
    """A last answer of a model that reasons has the reasoning's markers; llama.cpp has no reasoning."""
    return text.replace("assistant\n6\n\nas", "assistant\n<think>\n\n</think>\n\n6\n\nas")


@frozen
class Judged:
    name: str
    by: str
    conversation: object = field(default=lambda form, messages: messages)
    text: object = field(default=lambda text: text)
    eos: str | None = None


JUDGED = [
    Judged("chatml", "chatml"),
    Judged("gemma-chatml", "chatml"),
    Judged("yi", "chatml"),
    Judged("lfm-2", "chatml"),
    Judged("lfm-2.5", "chatml"),
    Judged("qwen-2.5", "chatml", conversation=system_of_its_own),
    Judged("qwen-3-instruct", "chatml"),
    Judged("smollm-3", "chatml", conversation=preface),
    Judged("llama-2", "llama2-sys-bos", text=meta_spaces),
    Judged("llama-3", "llama3"),
    Judged("llama-3.1", "llama3", conversation=preface, text=empty_system),
    Judged("mistral-v1", "mistral-v1"),
    Judged("mistral-v3", "mistral-v3", conversation=system_in_the_last_question),
    Judged("mistral-v3-tekken", "mistral-v3-tekken", conversation=system_in_the_last_question),
    Judged("mistral-v7", "mistral-v7"),
    Judged("mistral-v7-tekken", "mistral-v7-tekken"),
    Judged("gemma", "gemma"),
    Judged("gemma-3", "gemma"),
    Judged("gemma-3n", "gemma"),
    Judged("phi-3", "phi3"),
    Judged("phi-4", "phi4"),
    # llama.cpp has StableLM's EOS, ours takes the tokenizer's
    Judged("zephyr", "zephyr", eos="<|endoftext|>"),
    Judged("vicuna", "vicuna", conversation=system_of_its_own, text=one_line),
    Judged("command-r", "command-r"),
    Judged("deepseek-v3", "deepseek3", text=no_gap),
    Judged("granite", "granite"),
    Judged("glm-4", "chatglm4", text=stop_at_the_end),
    Judged("starling", "openchat"),
    Judged("gpt-oss", "gpt-oss", text=harmony),
]
# Formats that reason: prompts, and conversations whose last answer is not in question
PROMPTS = [Judged("qwen-3", "chatml"), Judged("deepseek-r1", "deepseek3", text=no_gap)]


def compare(library, judged, case):
    messages, prompt = CASES[case]
    form = with_tokens(chat_format(judged.name), eos=judged.eos)
    ours = render(form, messages, add_generation_prompt=prompt, current_date="2024-07-26").text
    told = theirs(library, judged.by, judged.conversation(form, messages), prompt)
    # llama.cpp leaves the first BOS to the tokenizer
    bos = form.bos if ours.startswith(form.bos) else ""
    return ours, bos + judged.text(told)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("judged", JUDGED, ids=lambda judged: judged.name)
def test_same_text(library, judged, case):
    ours, expected = compare(library, judged, case)
    assert ours == expected


@pytest.mark.parametrize("case", [case for case, (_, prompt) in CASES.items() if prompt])
@pytest.mark.parametrize("judged", PROMPTS, ids=lambda judged: judged.name)
def test_same_prompt_of_formats_that_reason(library, judged, case):
    ours, expected = compare(library, judged, case)
    thinking = chat_format(judged.name).thinking
    assert ours == expected + (thinking.start if thinking.prompted else "")


def test_a_finished_conversation_of_qwen_3(library):
    judged = Judged("qwen-3", "chatml", text=thinking_of_the_last)
    ours, expected = compare(library, judged, "answered twice, system")
    assert ours == expected and "<think>" in ours


@pytest.mark.parametrize(
    "name", ["chatml", "llama-3", "gemma", "phi-3", "phi-4", "command-r", "granite", "glm-4", "starling"]
)
def test_llama_cpp_recognises_our_template_as_the_format(library, name):
    """It reads the template in a GGUF file by its markers."""
    by = next(judged.by for judged in JUDGED if judged.name == name)
    messages, prompt = CASES["asked again, system"]
    assert theirs(library, chat_format(name).jinja, messages, prompt) == theirs(library, by, messages, prompt)
