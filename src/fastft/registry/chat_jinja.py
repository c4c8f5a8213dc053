"""Writes the Jinja template of a chat format from its markers.

The result is one plain template for transformers' environment (trim_blocks, lstrip_blocks, `{% generation %}`). Every
tag begins with `{%-` or `{{-`, so the indentation between tags is never part of the text.
"""

import re
from collections.abc import Iterable

from fastft.registry.chat_format import AnswerTurn, ChatFormat, Thinking, Tools

_VARIABLES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "date": "date",
    "mode": "('/no_think' if enable_thinking is false else '/think')",
}
_PLACE = re.compile(r"\{([a-z_]+)\}")


def jinja_template(form: ChatFormat) -> str:
    """Return the Jinja template of a format that is described by its markers alone."""
    lines = [
        *_text_macro(form),
        *(_thinking_macros(form.thinking) if form.thinking else ()),
        *(_tool_macros(form.tools) if form.tools else _refused_tools(form)),
        *([f"{{%- set date = date_string or {_quoted(form.date)} %}}"] if form.date else ()),
        *_put(("{bos}" if form.bos and "{bos}" not in form.user.start else "") + form.prefix),
        *_opening(form),
        *_last_user(form),
        *_fold(form),
        *(["{%- set before = namespace(role='') %}"] if form.alternate else ()),
        "{%- for message in messages %}",
        *_indented([*_alternation(form), *_branches(form)]),
        "{%- endfor %}",
        *_unfolded(form),
        *_when("add_generation_prompt", _put_expression(_prompt(form))),
    ]
    return "\n".join(lines)


def renamed(template: str, role: str, content: str, roles: dict[str, str]) -> str:
    """Return `template` for messages whose keys and role names differ.

    `role` and `content` are the keys of a message, `roles` maps the names in the data to those that the template
    knows; names that are not in it stay, and messages that have the usual keys are taken as well.
    """
    table = ", ".join(f"{_quoted(theirs)}: {_quoted(ours)}" for theirs, ours in roles.items())
    key, value = _quoted(role), _quoted(content)
    lines = [
        f"{{%- set names = {{{table}}} %}}",
        "{%- set all = namespace(messages=[]) %}",
        "{%- for message in messages %}",
        f"    {{%- set name = message.get({key}, message['role']) %}}",
        f"    {{%- set said = message.get({value}, message['content']) %}}",
        "    {%- set all.messages = all.messages + [dict(message, role=names.get(name, name), content=said)] %}",
        "{%- endfor %}",
        "{%- set messages = all.messages %}",
    ]
    return "\n".join([*lines, template])


# Small pieces ---------------------------------------------------------------------------------------------------------


def _quoted(text: str) -> str:
    """Return a Jinja string literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def _expression(marker: str, **places: str) -> str:
    """Return a Jinja expression for a marker; `places` are expressions for more names in braces."""
    known = {**_VARIABLES, **places}
    parts, position = [], 0
    for found in _PLACE.finditer(marker):
        if found[1] in known:
            parts += [_quoted(marker[position : found.start()])] if found.start() > position else []
            parts.append(known[found[1]])
            position = found.end()
    parts += [_quoted(marker[position:])] if position < len(marker) else []
    # `~` rather than `+`: a tokenizer without BOS leaves `bos_token` undefined, which is then an empty text
    return " ~ ".join(parts)


def _joined(*expressions: str) -> str:
    return " ~ ".join(expression for expression in expressions if expression)


def _put(marker: str) -> list[str]:
    return _put_expression(_expression(marker))


def _put_expression(expression: str) -> list[str]:
    return [f"{{{{- {expression} }}}}"] if expression else []


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _when(condition: str, lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    if not lines:
        return []
    return [f"{{%- if {condition} %}}", *_indented(lines), "{%- endif %}"]


def _refuse(form: ChatFormat, problem: str) -> str:
    """Return a statement that raises; `problem` is a Jinja expression that begins with a quoted text."""
    return f"{{{{- raise_exception('{form.name}: {problem.removeprefix(chr(39))}) }}}}"


# Contents -------------------------------------------------------------------------------------------------------------


def _text_macro(form: ChatFormat) -> list[str]:
    """Return the macro that gives a message's content as text: a string, or a list of parts."""
    image = _put(form.image) or [_refuse(form, "'an image part, but the format has no place for images'")]
    return [
        "{%- macro text(message) %}",
        "    {%- if message['content'] is string %}",
        "        {{- message['content'] }}",
        "    {%- elif message['content'] %}",
        "        {%- for part in message['content'] %}",
        "            {%- if part['type'] == 'text' %}",
        "                {{- part['text'] }}",
        "            {%- elif part['type'] == 'image' %}",
        *(f"                {line}" for line in image),
        "            {%- else %}",
        "                " + _refuse(form, "'a part of type ' ~ part['type'] ~ ', but only text and image are known'"),
        "            {%- endif %}",
        "        {%- endfor %}",
        "    {%- elif not message['tool_calls'] %}",
        "        " + _refuse(form, "'a message of role ' ~ message['role'] ~ ' without content'"),
        "    {%- endif %}",
        "{%- endmacro %}",
    ]


def _content(form: ChatFormat, message: str = "message") -> str:
    return f"text({message})" + (" | trim" if form.trim else "")


def _thinking_macros(thinking: Thinking) -> list[str]:
    open_, close = _quoted(thinking.start.strip()), _quoted(thinking.end.strip())
    return [
        "{%- macro thought(message) %}",
        "    {%- if message['reasoning_content'] is string %}",
        "        {{- message['reasoning_content'].strip('\\n') }}",
        f"    {{%- elif {close} in text(message) %}}",
        f"        {{{{- text(message).split({close})[0].split({open_})[-1].strip('\\n') }}}}",
        "    {%- endif %}",
        "{%- endmacro %}",
    ]


# Before the messages --------------------------------------------------------------------------------------------------


def _opening(form: ChatFormat) -> list[str]:
    """Return the system turn that opens a conversation, where it is more than the first message."""
    tools = form.tools if form.tools and form.tools.where == "system" else None
    switched = form.thinking.on if form.thinking else ""
    if not form.has_opening:
        return []
    turn = form.system
    default = _quoted(form.default_system or "")
    lines = [
        f"{{%- set opening = namespace(text={default}, given=false) %}}",
        "{%- if messages[0]['role'] == 'system' %}",
        "    {%- set opening.text = " + _content(form, "messages[0]") + " %}",
        "    {%- set opening.given = true %}",
        "    {%- set messages = messages[1:] %}",
        "{%- endif %}",
    ]
    inside = _put(turn.start)
    if switched:
        inside += _when("enable_thinking", _put(switched))
    if form.tools and form.tools.preface:
        inside += _when("tools", _put(form.tools.preface))
    inside += _put_expression(_joined(_expression(form.system_preface), "opening.text", _expression(form.system_after)))
    if tools:
        inside += _when(
            "tools", _put_expression(_joined(f"({_quoted(tools.joint)} if opening.text else '')", "tool_list()"))
        )
    inside += _put(turn.end)
    if form.default_system is not None or form.system_preface:
        return [*lines, *inside]
    reasons = ["opening.given", *(["tools"] if tools else ()), *(["enable_thinking"] if switched else ())]
    return [*lines, *_when(" or ".join(reasons), inside)]


def _last_user(form: ChatFormat) -> list[str]:
    listed = form.tools is not None and form.tools.where == "last_user"
    if not (form.thinking or listed or form.system_rule == "last_user"):
        return []
    return [
        "{%- set last = namespace(user=-1) %}",
        "{%- for message in messages %}",
        "    {%- if message['role'] == 'user' %}",
        "        {%- set last.user = loop.index0 %}",
        "    {%- endif %}",
        "{%- endfor %}",
    ]


def _fold(form: ChatFormat) -> list[str]:
    if form.system_rule not in ("first_user", "last_user"):
        return []
    start, end = _expression(form.system.start), _expression(form.system.end)
    default = _joined(start, _quoted(form.default_system), end) if form.default_system else "''"
    return [f"{{%- set fold = namespace(system={default}) %}}"]


def _unfolded(form: ChatFormat) -> list[str]:
    if form.system_rule not in ("first_user", "last_user") or form.default_system:
        return []
    problem = _refuse(form, "'the system message goes into a user turn, and there is none'")
    return _when("fold.system", [problem])


def _alternation(form: ChatFormat) -> list[str]:
    if not form.alternate:
        return []
    twice = "message['role'] == before.role or (message['role'] == 'assistant' and not before.role)"
    problem = _refuse(
        form, "'message ' ~ loop.index0 ~ ' is of role ' ~ message['role'] ~ ', but user and assistant take turns'"
    )
    return [
        "{%- if message['role'] in ('user', 'assistant') and (" + twice + ") %}",
        f"    {problem}",
        "{%- endif %}",
        "{%- if message['role'] != 'system' %}",
        "    {%- set before.role = message['role'] %}",
        "{%- endif %}",
    ]


# The turns ------------------------------------------------------------------------------------------------------------


def _branches(form: ChatFormat) -> list[str]:
    bodies = {"system": _system(form), "user": _user(form), "assistant": _assistant(form)}
    if form.tools:
        bodies["tool"] = _tool_result(form, form.tools)
    lines, word = [], "if"
    for role in form.roles:
        lines += [f"{{%- {word} message['role'] == '{role}' %}}", *_indented(bodies[role])]
        word = "elif"
    known = ", ".join(form.roles)
    problem = f"'message ' ~ loop.index0 ~ ' is of role ' ~ message['role'] ~ ', but the roles are {known}'"
    return [*lines, "{%- else %}", *_indented([_refuse(form, problem)]), "{%- endif %}"]


def _system(form: ChatFormat) -> list[str]:
    if form.system_rule == "refused":
        return []
    turn = form.system
    whole = _joined(_expression(turn.start), _content(form), _expression(turn.end))
    if form.system_rule == "turn":
        return _put_expression(whole)
    problem = _refuse(form, "'message ' ~ loop.index0 ~ ' is a system message, which can only be the first'")
    return [*_when("not loop.first", [problem]), f"{{%- set fold.system = {whole} %}}"]


def _user(form: ChatFormat) -> list[str]:
    start, end = form.user.start, _expression(form.user.end)
    lines, fold = [], ""
    tools = form.tools if form.tools and form.tools.where != "system" else None
    here = {"first_user": "listed.not_yet", "last_user": "loop.index0 == last.user"}
    listing = _when(f"tools and {here[tools.where]}", ["{{- tool_list() }}"]) if tools else []
    if form.assistant.end_is_next:
        opener = form.assistant.end
        lines += _when("loop.first or loop.previtem['role'] != 'assistant'", _put(opener))
        start = start.removeprefix(opener)
    if tools and tools.own_turn:
        lines, listing = [*lines, *listing], []
    if listing:
        lines += [*_put(start), *listing]
        if tools.where == "first_user":
            lines += ["{%- set listed.not_yet = false %}"]
        start = ""
    if form.system_rule == "first_user":
        fold = "fold.system"
    elif form.system_rule == "last_user":
        fold = "(fold.system if loop.index0 == last.user else '')"
    content = _joined(fold, f"({_content(form)})" if fold else _content(form))
    # Llama 2 cuts white space round the whole of system and user text
    content = f"({content}) | trim" if fold and form.trim else content
    lines += _put_expression(_joined(_expression(start), f"({content})" if "|" in content else content, end))
    if form.system_rule == "first_user":
        lines += ["{%- set fold.system = '' %}"]
    elif form.system_rule == "last_user":
        lines += _when("loop.index0 == last.user", ["{%- set fold.system = '' %}"])
    return lines


def _assistant(form: ChatFormat) -> list[str]:
    turn, lines = form.assistant, []
    if turn.end_is_next:
        problem = _refuse(form, "'message ' ~ loop.index ~ ' follows an answer and is no user message'")
        lines += _when("not loop.last and loop.nextitem['role'] != 'user'", [problem])
    lines += _put(turn.start)
    answer = _content(form)
    if form.thinking:
        before, answer, inside = _thought(form, form.thinking)
        lines += before
    else:
        inside = ""
    lead = _expression(turn.lead)
    if form.tools:
        answer = f"({answer})" if "|" in answer else answer
        answer = _joined(answer, "calls(message)")
        lead = lead and f"({lead} if not message['tool_calls'] else '')"
    if turn.earlier_end is not None:
        lines += _generated(_joined(lead, inside, f"({answer})", f"({_quoted(turn.end)} if loop.last else '')"))
        return [*lines, *_when("not loop.last", _put(turn.earlier_end))]
    wrapped = f"({answer})" if "|" in answer else answer
    lines += _generated(_joined(lead, inside, wrapped, _expression(turn.end)))
    after = _put(turn.after)
    return [*lines, *(after if turn.after_last or not after else _when("not loop.last", after))]


def _generated(expression: str) -> list[str]:
    return ["{%- generation %}", f"{{{{- {expression} }}}}", "{%- endgeneration %}"]


def _thought(form: ChatFormat, thinking: Thinking) -> tuple[list[str], str, str]:
    """Return what comes before the sampled part, the answer without its reasoning, and the reasoning as sampled."""
    recent = "loop.index0 > last.user" if thinking.drop_earlier else "true"
    shown = f"{recent} and (reasoning or loop.last)" if thinking.always else f"{recent} and reasoning"
    # An answer to a prompt that opens the reasoning cannot be without it.
    shown = recent if thinking.always and thinking.prompted else shown
    lines = ["{%- set reasoning = thought(message) %}", f"{{%- set shown = {shown} %}}"]
    block = _joined("reasoning", _expression(thinking.end))
    if thinking.prompted:
        lines += _when("shown", _put(thinking.start))
    else:
        block = _joined(_expression(thinking.start), block)
    silent = ""
    if thinking.off:
        where = "shown and not reasoning" if thinking.always else f"{recent} and not reasoning"
        lines += [f"{{%- set off = enable_thinking is false and {where} %}}", *_when("off", _put(thinking.off))]
        silent = " and not off"
    answer = f"text(message).split({_quoted(thinking.end.strip())})[-1].lstrip('\\n')"
    return lines, answer + (" | trim" if form.trim else ""), f"({block} if shown{silent} else '')"


def _prompt(form: ChatFormat) -> str:
    turn: AnswerTurn = form.assistant
    thinking = form.thinking
    if thinking is None:
        return _expression(turn.start)
    off = f"({_quoted(thinking.off)} if enable_thinking is false else '')" if thinking.off else ""
    return _joined(_expression(turn.start + (thinking.start if thinking.prompted else "")), off)


# Tools ----------------------------------------------------------------------------------------------------------------


def _refused_tools(form: ChatFormat) -> list[str]:
    return _when("tools", [_refuse(form, "'tools were given, but the format has no place for them'")])


def _tool_macros(tools: Tools) -> list[str]:
    each = _expression(tools.each, tool="(tool | tojson" + (f"(indent={tools.indent})" if tools.indent else "") + ")")
    lines = [
        *(["{%- set listed = namespace(not_yet=true) %}"] if tools.where == "first_user" else ()),
        "{%- macro tool_list() %}",
        *_indented(_put(tools.intro)),
        "    {%- for tool in tools %}",
        *_indented(_indented(_put_expression(each))),
        *(_indented(_indented(_when("not loop.last", _put(tools.separator)))) if tools.separator else ()),
        "    {%- endfor %}",
        *_indented(_put(tools.outro)),
        "{%- endmacro %}",
    ]
    if "{keywords}" in tools.call:
        lines += _keywords_macro()
    return [*lines, *_calls_macro(tools)]


def _calls_macro(tools: Tools) -> list[str]:
    arguments = "(function['arguments'] if function['arguments'] is string else function['arguments'] | tojson)"
    places = {"name": "function['name']", "arguments": arguments, "id": "call['id']"}
    call = _expression(tools.call, keywords="keywords(function['arguments'])", **places)
    checks: list[str] = []
    if tools.single:
        checks += _when(
            "message['tool_calls'] | length > 1", ["{{- raise_exception('one tool call a turn, not several') }}"]
        )
    if tools.alone:
        checks += _when("text(message)", ["{{- raise_exception('a turn has either content or tool calls') }}"])
    return [
        "{%- macro calls(message) %}",
        "    {%- if message['tool_calls'] %}",
        *_indented(_indented(checks)),
        *(_indented(_indented(_when("text(message)", _put(tools.content_joint)))) if tools.content_joint else ()),
        *_indented(_indented(_put(tools.calls_start))),
        "        {%- for call in message['tool_calls'] %}",
        "            {%- set function = call['function'] or call %}",
        *(_indented(_indented(_indented(_need_id(tools, "call['id']")))) if tools.id_length else ()),
        f"            {{{{- {call} }}}}",
        *(_indented(_indented(_indented(_when("not loop.last", _put(tools.call_joint))))) if tools.call_joint else ()),
        "        {%- endfor %}",
        *_indented(_indented(_put(tools.calls_end))),
        "    {%- endif %}",
        "{%- endmacro %}",
    ]


def _need_id(tools: Tools, value: str) -> list[str]:
    problem = f"a tool call and its result need an id of {tools.id_length} letters and digits"
    return _when(f"({value} or '') | length != {tools.id_length}", [f"{{{{- raise_exception({_quoted(problem)}) }}}}"])


def _keywords_macro() -> list[str]:
    """Return the macro that writes arguments as Python keywords."""
    quoted = "\"'\" ~ value | replace('\\\\', '\\\\\\\\') | replace(\"'\", \"\\\\'\") | replace('\\n', '\\\\n') ~ \"'\""
    return [
        "{%- macro keywords(arguments) %}",
        "    {%- for name, value in arguments.items() %}",
        "        {{- name ~ '=' }}",
        "        {%- if value is string %}",
        f"            {{{{- {quoted} }}}}",
        "        {%- else %}",
        "            {{- value | tojson }}",
        "        {%- endif %}",
        *_indented(_indented(_when("not loop.last", ["{{- ', ' }}"]))),
        "    {%- endfor %}",
        "{%- endmacro %}",
    ]


def _tool_result(form: ChatFormat, tools: Tools) -> list[str]:
    content = f"({_content(form)})" if form.trim else _content(form)
    places = {"content": content, "content_json": f"({content} | tojson)", "id": "message['tool_call_id']"}
    result = _expression(tools.result, **places)
    checks = _need_id(tools, "message['tool_call_id']") if tools.id_length else []
    if not tools.grouped:
        return [*checks, *_put_expression(_joined(_expression(tools.turn.start), result, _expression(tools.turn.end)))]
    return [
        *checks,
        *_when("loop.first or loop.previtem['role'] != 'tool'", _put(tools.turn.start)),
        *_put_expression(result),
        *_when("loop.last or loop.nextitem['role'] != 'tool'", _put(tools.turn.end)),
    ]
