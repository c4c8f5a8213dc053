"""Chat formats as records: looked up, complete, and rendered with a mask that is exactly what a model samples."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastft
from fastft.data.template import has_generation_markers, render, without_generation_markers
from fastft.errors import DataError, SpecError
from fastft.registry.chat import FOLDER, chat_format, chat_formats, has_own_template, with_tokens
from fastft.registry.packaged import packaged_specs

FORMATS = chat_formats()
each_format = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
# The names of the field, and those that people bring along
FAMILIAR = """
chatml llama-2 llama-3 llama-3.1 mistral mistral-v1 mistral-v3 mistral-nemo gemma gemma2 gemma-3 gemma-3n
gemma-4 qwen-2.5 qwen-3 qwen3-instruct qwen3-thinking phi-3 phi-4 vicuna alpaca zephyr command-r command-a
deepseek-v3 deepseek-r1 gpt-oss granite granite-code glm-4 olmo starling yi lfm-2 lfm-2.5 smollm-3 llama
llama3 llama-31 phi-35 phi-3.5 qwen-25 qwen25 qwen2.5 gemma3 gemma3n gemma4 gemma-4-thinking gemma4-thinking
gptoss yi-chat vicuna_old gemma_chatml gemma2_chatml qwen3 qwen-2.5-coder qwen25-coder Mistral LLAMA-3
"""


# Look-up --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIAR.split())
def test_familiar_names(name):
    assert chat_format(name) in FORMATS


def test_names_are_used_once_and_folded():
    names = [name for form in FORMATS for name in (form.name, *form.aliases)]
    assert len(set(names)) == len(names) and all(name == name.lower() and "_" not in name for name in names)


def test_every_format_of_a_spec_is_known():
    for spec in packaged_specs():
        for name in (spec.chat_format, *(variant.chat_format for variant in spec.variants)):
            assert name is None or chat_format(name).name == name, (spec.name, name)


@pytest.mark.parametrize(
    ("name", "near"), [("chat-ml", "chatml"), ("qwen-3-instuct", "qwen-3-instruct"), ("lama3", "llama3")]
)
def test_unknown_names(name, near):
    with pytest.raises(SpecError, match=f"chat format: expected one of.*{name}.*Did you mean '{near}'"):
        chat_format(name)


def test_names_of_other_types():
    with pytest.raises(SpecError, match="chat format"):
        chat_format(3)


def test_files_have_no_unknown_fields():
    """A misspelt field would fail at once, as records take no others; `like` and `without` are the files' own."""
    fields = {field.name for field in attrs.fields(type(FORMATS[0]))} | {"like", "without"}
    for path in FOLDER.glob("*.toml"):
        assert set(tomllib.loads(path.read_text("utf-8"))) <= fields, path.name


def test_a_look_up_loads_nothing_heavy():
    code = "import sys; from fastft.registry.chat import chat_format; chat_format('qwen-3').jinja; print(*sys.modules)"
    source = str(Path(fastft.__file__).parents[1])
    env = {"PYTHONPATH": source, "PATH": ""}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout.split()
    assert "fastft.registry.chat" in out and not {"torch", "jinja2", "transformers", "cattrs", "typer"} & set(out)


# Records --------------------------------------------------------------------------------------------------------------


@each_format
def test_complete_and_consistent(form):
    assert form.title and form.stop_tokens and form.ollama_stops and form.jinja and form.ollama_template
    assert form.instruction_part and form.response_part and "{" not in form.instruction_part + form.response_part
    assert form.stop_token in form.assistant.end.replace("{eos}", form.eos)
    assert any(form.stop_token in text for text in form.sampled)
    assert set(form.roles) | set(form.refused_roles) == {"system", "user", "assistant", "tool"}
    assert not set(form.roles) & set(form.refused_roles)
    assert has_generation_markers(form.jinja) and form.jinja.count("generation %}") == 2
    assert form.jinja == form.jinja.strip() and "  \n" not in form.jinja and len(form.jinja) < 10_000
    assert hash(form) == hash(attrs.evolve(form))


@each_format
def test_parts_are_in_the_text(form):
    messages = turns("Why?", "Because.", "How?", "So.")
    text = render(form, messages).text
    for part, contents in ((form.instruction_part, ("Why?", "How?")), (form.response_part, ("Because.", "So."))):
        for content in contents:
            before = text[: text.index(content)]
            # Reasoning may stand between the response part and the answer
            assert part in before[-len(part) - 60 :], (part, before)


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


# Masks: exactly what the model would have to sample ------------------------------------------------------------------

CONTENT = st.text(alphabet="abcd é漢\n.,'\"{}<>%-\\", min_size=1, max_size=24).filter(
    lambda text: text == text.strip() != ""
)


@st.composite
def conversations(draw):
    count = draw(st.integers(1, 4))
    system = [{"role": "system", "content": draw(CONTENT)}] if draw(st.booleans()) else []
    return system + turns(*(draw(CONTENT) for _ in range(2 * count)))


def sampled_of(form, content, last):
    """Return what a model samples for an answer without reasoning, from the record alone."""
    turn, thinking = form.assistant, form.thinking
    if form.name == "gpt-oss":
        return turn.lead + content + (turn.end if last else "")
    block = ""
    if thinking and thinking.always and last:
        block = thinking.end if thinking.prompted else thinking.start + thinking.end
    return turn.lead + block + content + turn.end.replace("{eos}", form.eos)


generated = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@each_format
@generated
@given(messages=conversations())
def test_the_mask_is_the_answers_with_their_stop_token(form, messages):
    rendered = render(form, messages)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    masked = [rendered.text[start:end] for start, end in rendered.spans]
    assert masked == [sampled_of(form, answer, number == len(answers)) for number, answer in enumerate(answers, 1)]


@each_format
@generated
@given(messages=conversations())
def test_what_is_sampled_begins_where_the_prompt_ends(form, messages):
    rendered = render(form, messages)
    prompt = render(form, messages[:-1], add_generation_prompt=True).text
    start, end = rendered.spans[-1]
    assert rendered.text[:start] == prompt
    behind = rendered.text[end:]
    assert behind == (form.assistant.after if form.assistant.after_last else "")


@pytest.mark.parametrize("form", [form for form in FORMATS if form.thinking], ids=lambda form: form.name)
@generated
@given(messages=conversations(), reasoning=CONTENT, switch=st.sampled_from([None, True, False]))
def test_reasoning_is_sampled_unless_the_prompt_has_it(form, messages, reasoning, switch):
    options = {} if switch is None else {"enable_thinking": switch}
    with_reasoning = [*messages[:-1], {**messages[-1], "reasoning_content": reasoning}]
    for conversation in (messages, with_reasoning):
        if conversation is with_reasoning and switch is False and form.thinking.off:
            continue  # reasoning in an answer to a prompt that has switched it off: no prompt leads there
        rendered = render(form, conversation, **options)
        prompt = render(form, messages[:-1], add_generation_prompt=True, **options).text
        start, end = rendered.spans[-1]
        assert rendered.text[:start] == prompt
        assert (reasoning in rendered.text[start:end]) or conversation is messages


@pytest.mark.parametrize("form", [form for form in FORMATS if form.thinking], ids=lambda form: form.name)
def test_reasoning_of_earlier_turns(form):
    messages = turns("Why?", "Because.", "How?", "So.")
    messages[1] |= {"reasoning_content": "EARLIER"}
    text = render(form, messages).text
    assert ("EARLIER" in text) is not form.thinking.drop_earlier
    inline = turns("Why?", f"{form.thinking.start}EARLIER{form.thinking.end}Because.", "How?", "So.")
    if form.name != "gpt-oss":  # Harmony's reasoning is a message of its own, never a part of the content
        assert render(form, inline).text == text


# Render, then parse ---------------------------------------------------------------------------------------------------


def parse(form, text):
    """Read a rendered conversation back by the record's markers alone: roles from the markers, contents between."""
    turn = form.assistant
    eos = turn.end.replace("{eos}", form.eos)
    starts = {"user": form.user.start.replace("{bos}", form.bos), "assistant": turn.start + turn.lead}
    if form.system_rule == "turn" and form.system.start:
        starts["system"] = form.system.start.replace("{eos}", form.eos)
    ends = {"user": form.user.end.replace("{eos}", form.eos), "assistant": eos, "system": form.system.end}
    ends["system"] = ends["system"].replace("{eos}", form.eos)
    after = {"assistant": turn.after}
    if turn.end_is_next:  # the token belongs to both turns
        ends["assistant"], after["assistant"] = "", ""
        text = text.removesuffix(turn.end)
    found = []
    while text:
        role = max((role for role in starts if text.startswith(starts[role])), key=lambda role: len(starts[role]))
        text = text[len(starts[role]) :]
        following = "|".join(re.escape(start) for start in starts.values())
        behind = re.escape(after.get(role, "")) if turn.after_last else f"(?:{re.escape(after.get(role, ''))}|$)"
        closing = re.escape(ends[role]) + (behind if role == "assistant" else "")
        match = re.search(f"{closing}(?={following}|$)", text, re.DOTALL)
        found.append({"role": role, "content": text[: match.start()]})
        text = text[match.end() :]
    return found


def round_trip(form):
    """Return whether markers alone tell turns apart: the format has them for every role it is given here."""
    return not (form.thinking and form.thinking.always) and form.name not in ("gpt-oss", "smollm-3")


@pytest.mark.parametrize("form", [form for form in FORMATS if round_trip(form)], ids=lambda form: form.name)
@generated
@given(messages=conversations())
def test_parsing_gives_the_conversation_back(form, messages):
    given = [message for message in messages if message["role"] != "system"]
    text = render(form, given).text
    assert parse_after_opening(form, text) == given
    if "system" in form.roles and form.system_rule == "turn" and form.system.start and not form.system_preface:
        text = render(form, messages).text.removeprefix(form.bos).removeprefix(form.prefix)
        opening = [] if messages != given or not form.default_system else [system(form.default_system)]
        assert parse(form, text) == opening + messages


def system(content):
    return {"role": "system", "content": content}


def parse_after_opening(form, text):
    if "{bos}" not in form.user.start:
        text = text.removeprefix(form.bos)
    text = text.removeprefix(form.prefix)
    if form.has_opening and (form.default_system or form.system_preface):
        preface = form.system_preface.replace("{date}", form.date)
        opening = form.system.start + preface + (form.default_system or "") + form.system_after + form.system.end
        assert text.startswith(opening)
        text = text[len(opening) :]
    return parse(form, text)


# What is refused ------------------------------------------------------------------------------------------------------


@each_format
@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (
            [{"role": "user", "content": "a"}, {"role": "narrator", "content": "b"}],
            "is of role narrator, but the roles are",
        ),
        ([{"content": "a"}], "is of role , but the roles are"),
        ([{"role": "user"}], "a message of role user without content"),
        ([{"role": "user", "content": None}], "without content"),
        ([{"role": "user", "content": [{"type": "video"}]}], "a part of type video"),
        ([{"role": "user", "content": ["a"]}], "a part of type "),
    ],
    ids=["role", "no role", "no content", "null", "part", "no type"],
)
def test_broken_messages(form, messages, told):
    with pytest.raises(DataError, match=f"{form.name}: .*{told}"):
        render(form, messages)


@each_format
def test_tools_where_there_is_no_place_for_them(form):
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    messages = [{"role": "user", "content": "a"}]
    if form.tools:
        assert "look" in render(form, messages, tools=[tool]).text
    else:
        with pytest.raises(DataError, match=f"{form.name}: tools were given"):
            render(form, messages, tools=[tool])
        with pytest.raises(DataError, match="is of role tool"):
            render(form, [*messages, {"role": "tool", "content": "b"}])


@each_format
def test_turns_that_follow_each_other(form):
    twice = [*turns("a", "b"), {"role": "assistant", "content": "c"}]
    if form.alternate:
        with pytest.raises(DataError, match="message 2 is of role assistant, but user and assistant take turns"):
            render(form, twice)
        with pytest.raises(DataError, match="take turns"):
            render(form, [{"role": "user", "content": "a"}] * 2)
        with pytest.raises(DataError, match="take turns"):
            render(form, [{"role": "assistant", "content": "a"}])
    elif form.assistant.end_is_next:
        with pytest.raises(DataError, match="follows an answer and is no user message"):
            render(form, twice)
    else:
        assert len(render(form, twice).spans) == 2


@pytest.mark.parametrize("form", [form for form in FORMATS if form.system_rule != "turn"], ids=lambda form: form.name)
def test_system_messages_that_are_folded(form):
    assert "system" in form.roles
    with pytest.raises(DataError, match="a system message, which can only be the first"):
        render(form, [*turns("a", "b"), system("s")])
    with pytest.raises(DataError, match="goes into a user turn, and there is none"):
        render(form, [system("s")])


# Parts of contents ----------------------------------------------------------------------------------------------------


@each_format
def test_content_lists(form):
    text = [{"type": "text", "text": "Look "}, {"type": "text", "text": "here."}]
    whole = render(form, turns("Look here.", "Yes."))
    assert render(form, [{"role": "user", "content": text}, turns("", "Yes.")[1]]) == whole
    image = [{"role": "user", "content": [{"type": "image"}, *text]}]
    if form.image:
        assert f"{form.image}Look here." in render(form, image).text
    else:
        with pytest.raises(DataError, match=rf"{form.name}: (an image part|a part of type image)"):
            render(form, image)


# Tools ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [form for form in FORMATS if form.tools], ids=lambda form: form.name)
def test_a_tool_call_is_sampled_and_its_result_is_not(form):
    call = {"id": "abcdefghi", "function": {"name": "weather", "arguments": {"place": "Rome"}}}
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "RESULT", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "ANSWER"},
    ]
    rendered = render(form, messages)
    masked = [rendered.text[start:end] for start, end in rendered.spans]
    assert len(masked) == 2 and "weather" in masked[0] and "Rome" in masked[0] and "ANSWER" in masked[1]
    assert all(text.endswith(form.stop_token) for text in masked)
    assert "RESULT" in rendered.text and not any("RESULT" in text for text in masked)
    prompt = render(form, messages[:1], add_generation_prompt=True).text
    assert rendered.text[: rendered.spans[0][0]] == prompt
    if form.tools.single:
        with pytest.raises(DataError, match="one tool call a turn"):
            render(form, [messages[0], {**messages[1], "tool_calls": [call, call]}])
    if form.tools.alone:
        with pytest.raises(DataError, match="either content or tool calls"):
            render(form, [messages[0], {**messages[1], "content": "I look."}])
    if form.tools.id_length:
        with pytest.raises(DataError, match="need an id of 9"):
            render(form, [messages[0], {**messages[1], "tool_calls": [{**call, "id": "a"}]}])


# Other tokens, other programs -----------------------------------------------------------------------------------------


def test_tokens_of_a_tokenizer():
    form = with_tokens(chat_format("zephyr"), eos="<end>")
    assert (form.eos, form.stop_tokens, form.sampled) == ("<end>", ("<end>",), ("<end>",))
    assert render(form, turns("a", "b")).text == "<|user|>\na<end>\n<|assistant|>\nb<end>\n"
    assert "<end>" in form.ollama_template and "</s>" not in form.ollama_template
    chatml = chat_format("chatml")
    assert with_tokens(chatml, eos="<end>").stop_tokens == chatml.stop_tokens


@each_format
def test_without_markers_the_text_is_the_same(form):
    import jinja2

    plain = without_generation_markers(form.jinja)
    assert not has_generation_markers(plain) and plain.count("{%") == form.jinja.count("{%")
    # no extension of transformers' is needed any more
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["strftime_now"] = lambda form: "2024-07-26"
    messages = turns("Why?", "Because.", "How?", "So.")
    text = environment.from_string(plain).render(messages=messages, bos_token=form.bos, eos_token=form.eos)
    assert text == render(form, messages, current_date="2024-07-26").text


def test_own_templates_are_few():
    assert [form.name for form in FORMATS if has_own_template(form)] == ["gpt-oss"]


def test_the_how_to_page_lists_every_format():
    page = (Path(__file__).parents[2] / "docs/how-to/chat-formats.md").read_text("utf-8")
    rows = re.findall(r"^\| `([^`]*)` \| ([^|]*) \|", page, re.MULTILINE)
    assert rows == [(form.name, form.title) for form in FORMATS]
