"""One row of a recognised kind to its canonical form, with every mistake in it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import evolve

from fastft.data.check import message_problems, repeated_answers, text_problem
from fastft.data.kinds import CALL_ROLES, ROLE_OF, ROLES, SYSTEM_COLUMNS, Recognised
from fastft.errors import Problem, did_you_mean, short

Row = dict[str, Any]
Problems = list[Problem]
CHAT_KEYS = ("role", "content")


def convert_row(
    where: str, row: Any, recognised: Recognised, features: Mapping[str, Any] | None = None, alternate: bool = True
) -> tuple[Row, Problems]:
    """Return the canonical form of one row, and what is wrong with it (the row then is not to be used).

    `features` are those of the Arrow table that the row is from: keys that the table filled with None are absent.
    `alternate` refuses two assistant turns in a row. A row that is canonical already comes back as it is.
    """
    fields = recognised.fields
    if not isinstance(row, Mapping):
        return {}, [Problem(where, short(row), "a dict", f"The other rows are {recognised.statement}.")]
    missing = [column for part, column in fields.items() if part in _NEEDED[recognised.kind] and column not in row]
    if missing:
        return {}, [_other_shape(where, row, recognised, missing)]
    if features is not None:
        row = {name: present(value, features.get(name)) for name, value in row.items()}
    return _CONVERT[recognised.kind](where, row, recognised, alternate)


def present(value: Any, feature: Any) -> Any:
    """Return `value` without the keys that an Arrow struct filled with None because other rows have them.

    Only structs fill in keys: what a `Json` feature holds is as it was written and stays.
    """
    inner = getattr(feature, "feature", None)
    if isinstance(feature, dict) and isinstance(value, Mapping):
        return {name: present(part, feature.get(name)) for name, part in value.items() if part is not None}
    if isinstance(feature, list) and len(feature) == 1:
        inner = feature[0]
    if inner is not None and isinstance(value, list):
        return [present(part, inner) for part in value]
    return value


def standard_messages(
    where: str, messages: Sequence[Any], keys: tuple[str, str], roles: Mapping[str, str] = ROLE_OF
) -> tuple[list[Row], Problems]:
    """Return turns as `{"role", "content"}` with the roles' usual names; their other fields are kept.

    `roles` are the names of roles in lower case and which role each is.
    A turn that is a call ("function_call": a JSON object with name and arguments) becomes the assistant's `tool_calls`.
    """
    role_key, content_key = keys
    made, problems = [], []
    for number, message in enumerate(messages):
        name = message[role_key]
        rest = {key: value for key, value in message.items() if key not in keys}
        content = {"content": message[content_key]} if content_key in message else {}
        lower = name.strip().lower()
        if lower in CALL_ROLES:
            calls, problem = _calls(f"{where}[{number}].{content_key}", message.get(content_key))
            made.append({"role": "assistant", "content": "", "tool_calls": calls, **rest})
            problems.extend(problem)
        elif lower in roles:
            made.append({"role": roles[lower], **content, **rest})
        else:
            problems.append(_unknown_role(f"{where}[{number}].{role_key}", name, roles))
    return made, problems


def _calls(where: str, text: Any) -> tuple[list[Row], Problems]:
    """Return the tool calls in the JSON text of a call turn."""
    expected = 'a JSON object {"name", "arguments"}, or a list of them'
    try:
        found = json.loads(text) if isinstance(text, str) else text
    except ValueError as error:
        return [], [Problem(where, short(text), expected, f"It is no JSON: {error}.")]
    found = found if isinstance(found, list) else [found]
    if not found or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in found):
        return [], [Problem(where, short(text), expected)]
    return [{"type": "function", "function": dict(call)} for call in found], []


def _other_shape(where: str, row: Mapping[str, Any], recognised: Recognised, missing: Sequence[str]) -> Problem:
    """Return the problem of a row that lacks columns which the recognised kind needs."""
    wanted = " and ".join(
        repr(column) for part, column in recognised.fields.items() if part in _NEEDED[recognised.kind]
    )
    near = next((hint for name in row for hint in [did_you_mean(str(name), missing)] if hint), "")
    remedy = near or f"The set is {recognised.statement}; take rows of another kind out, as a set of their own."
    return Problem(f"{where}, fields", sorted(map(str, row)), wanted, remedy)


def _turns(
    where: str, value: Any, recognised: Recognised, alternate: bool, system: str = ""
) -> tuple[list[Row], Problems]:
    """Return a checked list of messages from a cell, with the system message of a column before it."""
    keys = recognised.keys or CHAT_KEYS
    value, problem = _parsed(where, value)
    if problem is None and (keys != CHAT_KEYS or recognised.kind == "sharegpt"):
        problems = message_problems(where, value, keys)
        if not problems:
            value, problems = standard_messages(where, value, keys)
        if alternate and not problems:
            problems = repeated_answers(where, value, keys[0])
    else:
        problems = [problem] if problem else conversation_problems(where, value, alternate=alternate)
    if problems:
        return [], problems
    if system:
        if value[0]["role"] == "system":
            problems = [Problem(f"{where}[0]", short(value[0]), "no system message beside the column's", _TWO_SYSTEMS)]
        value = [{"role": "system", "content": system}, *value]
    return value, problems


def conversation_problems(where: str, messages: Any, *, alternate: bool = True) -> Problems:
    """Return every mistake of a list of `{"role", "content"}`: also roles that nobody knows, or by other names than
    templates know, and, with `alternate`, two assistant turns in a row.
    """
    problems = message_problems(where, messages)
    if problems:
        return problems
    for number, message in enumerate(messages):
        role = message["role"]
        if role in ROLES:
            continue
        meant = ROLE_OF.get(role.strip().lower())
        if meant in ("user", "assistant", "system"):
            problems.append(Problem(f"{where}[{number}].role", role, repr(meant), _RENAME))
        elif meant is None:
            problems.append(_unknown_role(f"{where}[{number}].role", role))
    return problems or (repeated_answers(where, messages) if alternate else [])


def _unknown_role(where: str, name: str, roles: Mapping[str, str] = ROLE_OF) -> Problem:
    """Return the problem of a role that is not known: a template would render the turn, and nothing of it be learnt."""
    known = [*roles, *CALL_ROLES]
    hint = did_you_mean(name.strip().lower(), known) or f"Rename it: known are {', '.join(known)}."
    hint = _RENAME if name.strip().lower() in CALL_ROLES else hint
    return Problem(where, short(name), "a known role", hint)


_RENAME = "fastft.standardize_sharegpt(rows) renames the roles."
_TWO_SYSTEMS = "Keep one of the two."
_PAIR = "Make both texts, or both lists of messages, in every row."


def _parsed(where: str, value: Any, expected: str = "a list of messages") -> tuple[Any, Problem | None]:
    """Return a list that a table keeps as JSON text."""
    if not isinstance(value, str):
        return value, None
    try:
        return json.loads(value), None
    except ValueError as error:
        start = value.lstrip()[:3]
        remedy = f"It is no JSON: {error}." if start[:1] == "[" else ""
        if start == "[{'":
            remedy = "This is Python's notation, as pandas writes lists to CSV; save JSON Lines or Parquet instead."
        return value, Problem(where, short(value), expected, remedy)


def _tools(where: str, row: Row) -> tuple[Row, Problems]:
    """Return the row with `tools` as a list of dicts, or without it where there are none."""
    if "tools" not in row:
        return row, []
    tools = row["tools"]
    problem = None
    if isinstance(tools, str) and tools.strip():
        tools, problem = _parsed(f"{where}, tools", tools, "a list of JSON schemas")
    if problem is None and tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        problem = Problem(f"{where}, tools", short(tools), "a list of JSON schemas, or None")
    rest = {name: value for name, value in row.items() if name != "tools"}
    return ({**rest, "tools": tools} if tools else rest), [problem] if problem else []


def _system(where: str, row: Row, recognised: Recognised) -> tuple[str, Problems]:
    """Return the text of the system column; empty where there is none."""
    column = _optional(row, recognised, "system")
    text = row.get(column)
    if text is None or text == "":
        return "", []
    problem = text_problem(f"{where}, {column}", text, may_be_empty=True)
    return text, [problem] if problem else []


def _optional(row: Row, recognised: Recognised, part: str) -> str:
    """Return the column of a part that rows may lack: not all rows that have it need have it under the same name."""
    plain = recognised.fields.get("instruction") == "instruction"
    names = {"system": SYSTEM_COLUMNS, "history": ("history",), "prompt": ("prompt",)}
    usual = recognised.fields.get(part, "")
    known = (usual, *names.get(part, ("input", "context") if plain else ()))
    return next((name for name in known if row.get(name) is not None), usual)


def _without(row: Row, recognised: Recognised) -> Row:
    used = set(recognised.fields.values())
    return {name: value for name, value in row.items() if name not in used}


def _from_conversation(where: str, row: Row, recognised: Recognised, alternate: bool) -> tuple[Row, Problems]:
    column = recognised.fields["messages"]
    system, problems = _system(where, row, recognised)
    messages, wrong = _turns(f"{where}, {column}", row[column], recognised, alternate, system)
    if not wrong and messages is row[column] and column == "messages" and "tools" not in row:
        return row, problems  # it is canonical as it stands
    made, bad = _tools(where, {**_without(row, recognised), "messages": messages})
    problems = [*problems, *wrong, *bad]
    if problems:
        return {}, problems
    return made, []


def _from_pair(where: str, row: Row, recognised: Recognised, alternate: bool) -> tuple[Row, Problems]:
    columns = [recognised.fields[part] for part in ("prompt", "completion")]
    values = [row[column] for column in columns]
    if recognised.keys is None:
        found = [text_problem(f"{where}, {column}", value) for column, value in zip(columns, values, strict=True)]
        mixed = [
            Problem(f"{where}, {column}", short(value), "a text, as in the first rows", _PAIR)
            for column, value in zip(columns, values, strict=True)
            if isinstance(value, list)
        ]
        return row, mixed or [problem for problem in found if problem]
    halves = [
        _turns(f"{where}, {column}", value, recognised, False) for column, value in zip(columns, values, strict=True)
    ]
    problems = [problem for _, wrong in halves for problem in wrong]
    prompt, completion = (turns for turns, _ in halves)
    if alternate and not problems:
        problems.extend(repeated_answers(f"{where}, prompt + completion", [*prompt, *completion]))
    made, bad = _tools(where, {**row, "prompt": prompt, "completion": completion})
    return made, [*problems, *bad]


def _from_instruction(where: str, row: Row, recognised: Recognised, alternate: bool) -> tuple[Row, Problems]:
    fields = recognised.fields
    system, problems = _system(where, row, recognised)
    texts = {}
    for part in ("instruction", "output"):
        texts[part] = row[fields[part]]
        problem = text_problem(f"{where}, {fields[part]}", texts[part])
        problems.extend([problem] if problem else [])
    column = _optional(row, recognised, "input")
    given = row.get(column)
    if given is not None and given != "":
        problem = text_problem(f"{where}, {column}", given, may_be_empty=True)
        problems.extend([problem] if problem else [])
    made, bad = _tools(where, _without(row, recognised))
    problems.extend(bad)
    if problems:
        return {}, problems
    earlier, problems = _history(where, row, recognised)
    if problems:
        return {}, problems
    asked = f"{texts['instruction']}\n\n{given}" if given and not given.isspace() else texts["instruction"]
    messages = [*earlier, {"role": "user", "content": asked}, {"role": "assistant", "content": texts["output"]}]
    return {**made, "messages": [{"role": "system", "content": system}, *messages] if system else messages}, []


def _history(where: str, row: Row, recognised: Recognised) -> tuple[list[Row], Problems]:
    """Return the earlier turns of a history column, a list of pairs of question and answer."""
    column = _optional(row, recognised, "history")
    pairs = row.get(column) or []
    turns, problems = [], []
    for number, pair in enumerate(pairs):
        place = f"{where}, {column}[{number}]"
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            problems.append(Problem(place, short(pair), "a pair of question and answer"))
            continue
        for role, text in zip(("user", "assistant"), pair, strict=True):
            problem = text_problem(place, text)
            problems.extend([problem] if problem else [])
            turns.append({"role": role, "content": text})
    return turns, problems


def _from_preference(where: str, row: Row, recognised: Recognised, alternate: bool) -> tuple[Row, Problems]:
    """Make both answers whole conversations, the prompt at their start."""
    fields = recognised.fields
    problems: Problems = []
    prompt: list[Row] = []
    given = row.get(_optional(row, recognised, "prompt"))
    if given is not None:
        prompt, problems = _side(f"{where}, prompt", given, "user", recognised)
    made = _without(row, recognised)
    for part in ("chosen", "rejected"):
        turns, wrong = _side(f"{where}, {fields[part]}", row[fields[part]], "assistant", recognised)
        if not wrong and turns[0]["role"] == "assistant":
            wrong = (
                [] if prompt or problems else [Problem(f"{where}, {fields[part]}", short(turns), _WHOLE, _NO_PROMPT)]
            )
            turns = [*prompt, *turns]
        elif not wrong and prompt and prompt[-1]["content"] not in [turn.get("content") for turn in turns]:
            wrong = [Problem(f"{where}, {fields[part]}", short(turns), "the row's prompt in it", "Which one is meant?")]
        if alternate and not wrong and not problems:
            wrong = repeated_answers(f"{where}, {fields[part]}", turns)
        problems = [*problems, *wrong]
        made[part] = turns
    if not problems:
        problems = _pair_problems(where, made["chosen"], made["rejected"])
    made, bad = _tools(where, made)
    return made, [*problems, *bad]


_WHOLE = "a conversation that starts with what the answer is to"
_NO_PROMPT = "Add a column 'prompt', or put the user's turns before the answer."


def _pair_problems(where: str, chosen: list[Row], rejected: list[Row]) -> Problems:
    if chosen == rejected:
        return [Problem(f"{where}, chosen and rejected", "equal answers", "two that differ", "Remove the row.")]
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1]["role"] != "assistant":
            return [Problem(f"{where}, {name}", short(turns[-1]), "an answer of the assistant at the end")]
    if chosen[0] != rejected[0]:
        return [Problem(f"{where}, rejected[0]", short(rejected[0]), f"the start of 'chosen', {short(chosen[0])!r}")]
    return []


def _side(where: str, value: Any, role: str, recognised: Recognised) -> tuple[list[Row], Problems]:
    """Return a prompt or an answer as messages: a text is one turn of `role`, or several of a marked dialogue."""
    turns = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if turns or (isinstance(value, str) and value.lstrip().startswith('[{"')):
        return _turns(where, value, recognised, False)
    problem = text_problem(where, value)
    if problem:
        role_key, content_key = recognised.keys or CHAT_KEYS
        either = f"a text, or a list of {{{role_key!r}, {content_key!r}}}"
        return [], [problem if isinstance(value, str) else evolve(problem, expected=either)]
    return (_dialogue(value) if value.startswith(_HUMAN) else [{"role": role, "content": value}]), []


_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def _dialogue(text: str) -> list[Row]:
    """Return the turns of a text that marks them with "Human:" and "Assistant:"."""
    turns = []
    for piece in text.split(_HUMAN)[1:]:
        asked, *answers = piece.split(_ASSISTANT)
        turns.append({"role": "user", "content": asked.strip()})
        turns.extend({"role": "assistant", "content": answer.strip()} for answer in answers)
    return turns if not turns or turns[-1]["content"] else turns[:-1]


def _from_text(where: str, row: Row, recognised: Recognised, alternate: bool) -> tuple[Row, Problems]:
    column = recognised.fields["text"]
    problem = text_problem(f"{where}, {column}", row[column])
    made = row if column == "text" else {**_without(row, recognised), "text": row[column]}
    return made, [problem] if problem else []


def _from_ids(where: str, row: Row, recognised: Recognised, alternate: bool) -> tuple[Row, Problems]:
    return row, []


_NEEDED = {
    "messages": ("messages",),
    "sharegpt": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "preference": ("chosen", "rejected"),
    "text": ("text",),
    "input_ids": ("input_ids",),
}
_CONVERT = {
    "messages": _from_conversation,
    "sharegpt": _from_conversation,
    "prompt_completion": _from_pair,
    "instruction": _from_instruction,
    "preference": _from_preference,
    "text": _from_text,
    "input_ids": _from_ids,
}
