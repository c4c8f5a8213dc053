"""Is everything of a conversation in its text? Chat templates leave out, without a word, what they do not know of.

Each part is changed and the conversation rendered again: where the text stays the same, the part was not in it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastft.errors import DataError, Problem, short

Messages = Sequence[Mapping[str, Any]]
REASONING = ("reasoning_content", "thinking", "reasoning")
_ANOTHER = "fastft.chat_templates.get_chat_template(tokenizer, name) has other formats"
_CALLS = f"Write the call into 'content' as the model is to write it; {_ANOTHER}."
_PARTS = "Take the part out, or the row."
_REASONING = f"Write it into 'content' with its markers, or take it out; {_ANOTHER}."
_TURNS = f"Write it into a turn that is rendered, the user's say, or take it out; {_ANOTHER}."
_TOOLS = f"Describe them in a system message, or take 'tools' out; {_ANOTHER}."


def with_texts(messages: Messages) -> Messages:
    """Return the messages, contents that are lists of texts alone joined to one text: for templates without lists."""
    if all(type(message.get("content")) is str for message in messages):
        return messages
    return [
        {**message, "content": "".join(part["text"] for part in message["content"])} if _is_texts(message) else message
        for message in messages
    ]


def is_plain(messages: Messages) -> bool:
    """Return whether messages are role and text alone, which every template renders."""
    return all(len(message) == 2 and type(message.get("content")) is str for message in messages)


def media_types(where: str, messages: Messages) -> list[str]:
    """Return the types of the parts that are no texts.

    Raises `DataError` for one in an assistant's turn: a model writes text.
    """
    if is_plain(messages):
        return []
    parts = [
        (number, place, part)
        for number, message in enumerate(messages)
        if isinstance(message.get("content"), list | tuple)
        for place, part in enumerate(message["content"])
        if part["type"] != "text"
    ]
    wrong = [
        Problem(f"{where}[{number}].content[{place}]", short(part), "text in an assistant's turn", _PARTS)
        for number, place, part in parts
        if messages[number]["role"] == "assistant"
    ]
    if wrong:
        raise DataError(*wrong)
    return [part["type"] for _, _, part in parts]


def refused_parts(where: str, messages: Messages, error: str = "") -> list[Problem]:
    """Return the problem of the first part that is no text, for a template that cannot take it."""
    told = f" The template says: {error}." if error else ""
    expected = "a part that the chat template renders"
    found = [
        Problem(f"{where}[{number}].content[{place}]", short(part), expected, f"{_PARTS}{told}")
        for number, message in enumerate(messages)
        if not isinstance(message.get("content"), str | None)
        for place, part in enumerate(message["content"])
        if part["type"] != "text"
    ]
    return found[:1]


def refused(where: str, messages: Messages, render: Callable[[Messages], str | None], error: str) -> list[Problem]:
    """Return the part for which a template refused messages, with what it said: empty where it is another reason.

    `render` returns the text of other messages, or None where they are refused, too.
    """
    if _calling(messages) and render(_without_calls(messages)) is not None:
        return _call_problem(where, messages, f" The template says: {error}.")
    if refused_parts(where, messages) and render(_without_parts(messages)) is not None:
        return refused_parts(where, messages, error)
    return []


def left_out(
    where: str,
    messages: Messages,
    tools: Any,
    text: str,
    render: Callable[..., str | None],
) -> list[Problem]:
    """Return a problem for tool calls, parts, turns, the last answer's reasoning, and tools that are not in `text`.

    `render(messages, tools)` returns the text of others, or None where they are refused. Reasoning in earlier answers
    is left out by the formats' own rules.
    """
    problems = []
    if _calling(messages) and render(_other_calls(messages), tools) == text:
        problems += _call_problem(where, messages)
    parts = refused_parts(where, messages)
    if parts and render(_without_parts(messages), tools) == text:
        problems += parts
    problems += [
        Problem(f"{where}[{number}]", short(messages[number]), "a turn that the chat template renders", _TURNS)
        for number in unsaid(messages, text)
        if render(_other_content(messages, number), tools) == text
    ]
    last = messages[-1]
    name = next((name for name in REASONING if isinstance(last.get(name), str) and last[name].strip()), None)
    if name and render([*messages[:-1], {**last, name: f"{last[name]}_"}], tools) == text:
        problems.append(reasoning_problem(f"{where}[{len(messages) - 1}]", name, last[name]))
    if tools and render(messages, None) == text:
        expected = "no tools, for the chat template does not list them"
        problems.append(Problem(f"{where.partition(',')[0]}, tools", short(tools), expected, _TOOLS))
    return problems


def unsaid(messages: Messages, text: str) -> list[int]:
    """Return the numbers of turns, but the assistant's, that may not stand in `text`, which rendering others tells.

    Templates that do not know a role leave its turns out, and so do some with a system message that is not the first:
    these are asked for whatever `text` holds, for an answer often repeats them.
    """
    return [
        number
        for number, message in enumerate(messages)
        if message["role"] != "assistant"
        and (said := _said(message))
        and (_may_be_unknown(number, message["role"]) or any(part.strip() not in text for part in said))
    ]


def _may_be_unknown(number: int, role: str) -> bool:
    return role == "tool" or (role == "system" and number > 0)


def _said(message: Mapping[str, Any]) -> list[str]:
    """Return the texts of a message's content."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content or () if part["type"] == "text"]


def reasoning_problem(where: str, name: str, value: Any) -> Problem:
    """Return the problem of reasoning under the field `name` that a template leaves out."""
    other = "" if name == REASONING[0] else f"Name it {REASONING[0]!r} where the template knows that. "
    return Problem(f"{where}.{name}", short(value), "reasoning that the chat template renders", f"{other}{_REASONING}")


def _is_texts(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return not isinstance(content, str | None) and all(part["type"] == "text" for part in content)


def _calling(messages: Messages) -> list[int]:
    return [number for number, message in enumerate(messages) if message.get("tool_calls")]


def _call_problem(where: str, messages: Messages, told: str = "") -> list[Problem]:
    first = _calling(messages)[0]
    expected = "tool calls that the chat template renders"
    value = short(messages[first]["tool_calls"])
    return [Problem(f"{where}[{first}].tool_calls", value, expected, f"{_CALLS}{told}")]


def _without_calls(messages: Messages) -> Messages:
    bare = [{name: part for name, part in message.items() if name != "tool_calls"} for message in messages]
    return [{**message, "content": message.get("content") or ""} for message in bare]


def _other_calls(messages: Messages) -> Messages:
    """Return the messages with other names of the functions that are called."""
    made = []
    for message in messages:
        calls = message.get("tool_calls") or ()
        others = [
            {**call, "function": {**call["function"], "name": f"{call['function'].get('name')}_"}}
            if isinstance(call.get("function"), Mapping)
            else {**call, "name": f"{call.get('name')}_"}
            for call in calls
            if isinstance(call, Mapping)
        ]
        made.append({**message, "tool_calls": others} if calls else message)
    return made


def _other_content(messages: Messages, number: int) -> Messages:
    message = messages[number]
    content = message["content"]
    if isinstance(content, str):
        other: Any = f"{content}_"
    else:
        other = [{**part, "text": f"{part['text']}_"} if part["type"] == "text" else part for part in content]
    return [*messages[:number], {**message, "content": other}, *messages[number + 1 :]]


def _without_parts(messages: Messages) -> Messages:
    """Return the messages without the parts that are no texts."""
    made = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str | None) or _is_texts(message):
            made.append(message)
            continue
        kept = [part for part in content if part["type"] == "text"]
        made.append({**message, "content": kept or [{"type": "text", "text": ""}]})
    return made
