"""Contents that are lists, tool calls, reasoning and tools: rendered, or an error that names them; never left out."""

import pytest
from transformers import AutoTokenizer

from fastft.chat_templates import get_chat_template
from fastft.data.chat import chat_dataset
from fastft.demo import MODEL_FOLDER
from fastft.errors import DataError

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
FUNCTION = {"type": "function", "function": {"name": "look", "arguments": {"x": 1}}}
CALL, RESULT = {"role": "assistant", "tool_calls": [FUNCTION]}, {"role": "tool", "content": "3"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
IMAGE = {"type": "image", "image": "x.png"}


@pytest.fixture(scope="module", params=["demo", "adding", "printing"])
def text_only(request, build_tokenizer, marked):
    """Tokenizers whose templates know text alone: the third writes a list as Python does."""
    if request.param == "demo":
        return AutoTokenizer.from_pretrained(MODEL_FOLDER)
    printing = marked.replace("message['content'] + '<|im_end|>'", "message['content'] ~ '<|im_end|>'")
    return build_tokenizer("bytes", marked if request.param == "adding" else printing)


def learnt(messages, tokenizer, **beside):
    (row,) = chat_dataset([{"messages": messages, **beside}], tokenizer)
    text = tokenizer.decode([label for label in row["labels"] if label != -100])
    return text, tokenizer.decode(row["input_ids"])


def told(messages, tokenizer, **beside):
    with pytest.raises(DataError) as caught:
        chat_dataset([{"messages": [USER, BOT]}, {"messages": messages, **beside}], tokenizer)
    return str(caught.value)


def texts(*parts):
    return [{"type": "text", "text": part} for part in parts]


def test_lists_of_texts_are_texts(text_only):
    lists = [{**USER, "content": texts("q ", "r")}, {**BOT, "content": texts("a")}]
    assert learnt(lists, text_only) == learnt([{**USER, "content": "q r"}, BOT], text_only)
    with_lists = get_chat_template(text_only, "qwen-2.5")
    assert learnt(lists, with_lists) == learnt([{**USER, "content": "q r"}, BOT], with_lists)


def test_other_parts(text_only):
    messages = [{**USER, "content": [*texts("q"), IMAGE]}, BOT]
    start = "row 1, messages[0].content[1]: expected a part that the chat template renders, got {'type': 'image', "
    assert told(messages, text_only).startswith(start)
    refusing = told(messages, get_chat_template(text_only, "chatml"))
    assert refusing.startswith(start) and "The template says: chatml: an image part" in refusing
    assert "<|image_pad|>" in learnt(messages, get_chat_template(text_only, "qwen-2.5"))[1]


def test_parts_that_a_template_passes_over(build_tokenizer):
    """This template takes lists, and writes their texts alone."""
    passing = (
        "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' }}{%- generation %}"
        "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}"
        "{%- for part in message['content'] %}{{- part['text'] }}"
        "{%- endfor %}{%- endif %}{{- '<|im_end|>' }}{%- endgeneration %}{%- endfor %}"
    )
    tokenizer = build_tokenizer("bytes", passing)
    assert learnt([{**USER, "content": texts("q")}, BOT], tokenizer)
    assert "messages[0].content[1]: expected a part" in told(
        [{**USER, "content": [*texts("q"), IMAGE]}, BOT], tokenizer
    )


@pytest.mark.parametrize("content", [None, "", "So: ", "absent"])
def test_tool_calls(text_only, content):
    call = CALL if content == "absent" else {**CALL, "content": content}
    line = told([USER, call, RESULT, BOT], text_only)
    assert line.startswith("row 1, messages[1].tool_calls: expected tool calls that the chat template renders, got [")
    assert "Write the call into 'content'" in line
    said, _ = learnt([USER, call, RESULT, BOT], get_chat_template(text_only, "qwen-2.5"))
    assert '"name": "look"' in said and said.endswith("<|im_end|>a<|im_end|>")


def test_a_template_that_refuses_calls_says_so(build_tokenizer):
    two = {**CALL, "tool_calls": [FUNCTION, FUNCTION]}
    line = told([USER, two], get_chat_template(build_tokenizer(), "llama-3.1"))
    assert "messages[1].tool_calls" in line and "one tool call a turn, not several" in line


def test_tools(text_only):
    assert told([USER, BOT], text_only, tools=[TOOL]).startswith(
        "row 1, tools: expected no tools, for the chat template"
    )
    assert '"look"' in learnt([USER, BOT], get_chat_template(text_only, "qwen-2.5"), tools=[TOOL])[1]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking"])
def test_reasoning(text_only, name):
    thought = [USER, {**BOT, name: "why"}]
    assert f"row 1, messages[1].{name}: expected reasoning" in told(thought, text_only)
    assert learnt([*thought, USER, BOT], get_chat_template(text_only, "qwen-3"))  # earlier reasoning: the format's rule
    if name == "reasoning_content":
        assert "why" in learnt(thought, get_chat_template(text_only, "qwen-3"))[0]


def test_a_pair_is_named_as_one(text_only):
    with pytest.raises(DataError, match=r"row 0, prompt \+ completion\[1\].tool_calls"):
        chat_dataset([{"prompt": [USER], "completion": [CALL]}], text_only)


def thought(content, **fields):
    return {"role": "assistant", "content": content, **fields}


LATER = [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]
EARLIER = {
    "field": thought("a", reasoning_content="why"),
    "another field": thought("a", reasoning="why"),
    "in the content": thought("<think>\nwhy\n</think>\n\na"),
}


@pytest.mark.parametrize("answer", EARLIER.values(), ids=EARLIER)
def test_an_earlier_answer_without_its_reasoning_is_not_learnt(text_only, answer, capsys):
    tokenizer = get_chat_template(text_only, "qwen-3")
    assert learnt([USER, answer, *LATER], tokenizer)[0] == "<think>\n\n</think>\n\nb<|im_end|>"
    assert "fastft: 1 earlier answers bear no loss" in capsys.readouterr().out
    assert learnt([USER, BOT, *LATER], tokenizer)[0] == "a<|im_end|><think>\n\n</think>\n\nb<|im_end|>"
    assert "bear no loss" not in capsys.readouterr().out


def test_reasoning_that_the_prompt_opens(text_only):
    said, whole = learnt([USER, BOT, *LATER], get_chat_template(text_only, "deepseek-r1"))
    assert "a" not in said.partition("</think>")[0] and said.count("b") == 1 and "a<" in whole


@pytest.mark.parametrize("name", ["reasoning", "thinking", "reasoning_content"])
def test_reasoning_that_no_template_knows(text_only, name):
    assert f"row 1, messages[1].{name}: expected reasoning" in told([USER, thought("a", **{name: "why"})], text_only)
    line = told([USER, thought("a", **{name: "why"}), *LATER], text_only)
    assert f"row 1, messages[1].{name}: expected reasoning" in line


def test_weights(text_only):
    turns = [USER, {**BOT, "weight": 0}, *LATER]
    assert learnt(turns, text_only)[0] == "b<|im_end|>"
    assert learnt([{**USER, "weight": 0}, {**BOT, "weight": 1}, *LATER], text_only)[0] == "a<|im_end|>b<|im_end|>"
    pair = {"prompt": [USER, {**BOT, "weight": 0}, LATER[0]], "completion": [{**LATER[1], "weight": 0}, *turns]}
    (row,) = chat_dataset([pair], text_only)
    assert text_only.decode([label for label in row["labels"] if label != -100]) == "b<|im_end|>"
    assert "row 1, messages[1].weight: expected 0 or 1, got 0.5" in told([USER, {**BOT, "weight": 0.5}], text_only)
    with pytest.raises(DataError, match=r"row 0, messages\[1\].weight: expected no weight of 0 with train_on='all'"):
        chat_dataset([{"messages": turns}], text_only, "all")
    assert "nothing to learn" in told([USER, {**BOT, "weight": 0}], text_only)


def test_settings_that_no_template_reads(text_only):
    tokenizer, settings = get_chat_template(text_only, "qwen-3"), {"enable_thinkin": False}
    line = told([USER, BOT], tokenizer, chat_template_kwargs=settings)
    assert line.startswith("row 1, chat_template_kwargs['enable_thinkin']: expected a setting that the chat template")
    assert "did you mean 'enable_thinking'?" in line
    assert "expected a dict of settings" in told([USER, BOT], tokenizer, chat_template_kwargs="x")
    assert learnt([USER, BOT], tokenizer, chat_template_kwargs={"enable_thinking": False})[0] == "a<|im_end|>"


def test_calls_as_they_once_were_written(text_only):
    for content in (None, "So:"):
        call = {**BOT, "content": content, "function_call": FUNCTION["function"]}
        line = told([USER, call], text_only)
        assert "row 1, messages[1].function_call: expected calls under 'tool_calls'" in line and "Remove" not in line


def test_images_are_said_and_never_learnt(text_only, capsys):
    tokenizer = get_chat_template(text_only, "qwen-2.5")
    assert "image" not in learnt([{**USER, "content": [*texts("q"), IMAGE]}, BOT], tokenizer)[0]
    assert "fastft: 1 images or the like become" in capsys.readouterr().out
    line = told([USER, {**BOT, "content": [*texts("a"), IMAGE]}], tokenizer)
    assert line.startswith("row 1, messages[1].content[1]: expected text in an assistant's turn, got {'type': 'image'")


def test_turns_that_a_template_passes_over(build_tokenizer):
    """Of the system's it knows the first message alone, of a tool's none."""
    knowing = (
        "{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '<|im_end|>' }}{%- endif %}"
        "{%- for message in messages %}{%- if message['role'] == 'user' %}{{- message['content'] | trim }}"
        "{%- elif message['role'] == 'assistant' %}{%- generation %}{{- message['content'] + '<|im_end|>' }}"
        "{%- endgeneration %}{%- endif %}{%- endfor %}"
    )
    tokenizer = build_tokenizer("bytes", knowing)
    system, late = {"role": "system", "content": "be"}, {"role": "system", "content": "brief"}
    assert learnt([system, {**USER, "content": " q "}, BOT], tokenizer) == ("a<|im_end|>", "be<|im_end|>qa<|im_end|>")
    for messages, place in (([system, USER, BOT, late, USER, BOT], 3), ([USER, RESULT, BOT], 1)):
        assert told(messages, tokenizer) == (
            f"row 1, messages[{place}]: expected a turn that the chat template renders, got {messages[place]}. "
            "Write it into a turn that is rendered, the user's say, or take it out; "
            "fastft.chat_templates.get_chat_template(tokenizer, name) has other formats."
        )
    repeats = [{**USER, "content": "brief q"}, {**BOT, "content": f"It is {RESULT['content']}."}]
    for messages, place in (([system, USER, BOT, late, *repeats], 3), ([USER, RESULT, repeats[1]], 1)):
        assert told(messages, tokenizer).startswith(f"row 1, messages[{place}]: expected a turn that the chat template")
    doubling = knowing.replace("message['content'] | trim", "message['content'] | upper")  # otherwise is not left out
    assert learnt([system, USER, BOT], build_tokenizer("bytes", doubling))[1] == "be<|im_end|>Qa<|im_end|>"
