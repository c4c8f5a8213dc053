"""Writes the Go template that Ollama serves a chat format with, from the same markers as the Jinja template.

Ollama gives the template `.Messages` (with `.Role`, `.Content`, `.Thinking`, `.ToolCalls`), `.System` (all system
messages joined) and `.Tools`, and adds BOS itself. A last message of the assistant's is left open, to be continued.
"""

import re

from attrs import frozen

from fastft.registry.chat_format import ChatFormat, Tools

_PLACE = re.compile(r"\{([a-z_]+)\}")
_THOUGHTLESS = "and $.IsThinkSet (not $.Think)"
_THOUGHTFUL = "and $.IsThinkSet $.Think"


@frozen
class _Action:
    """What stands between double braces; anything else in a list of pieces is literal text."""

    code: str


Pieces = list["_Action | str"]


def ollama_template(form: ChatFormat) -> str:
    """Return the Go template of a format that is described by its markers alone."""
    pieces: Pieces = [
        *_text(form, form.prefix),
        *_opening(form),
        *_variables(form),
        *_do("range $i, $message := .Messages"),
        *_close_results(form, 'and $open (ne .Role "tool")', reopen=True),
        *_branches(form),
        *_do("$role = .Role"),
        *_do("end"),
        *_close_results(form, "$open", reopen=False),
        *_if('ne $role "assistant"', _prompt(form)),
    ]
    return _written(pieces)


def _written(pieces: Pieces) -> str:
    """Join pieces: actions that follow each other stand on lines of their own, literal text is left as it is."""
    out: list[str] = []
    previous: _Action | str = ""
    for piece in (piece for piece in pieces if piece != ""):
        if isinstance(piece, str):
            out.append(piece)
        else:
            out.append(f"\n{{{{- {piece.code} }}}}" if isinstance(previous, _Action) else f"{{{{ {piece.code} }}}}")
        previous = piece
    return "".join(out)


def _do(code: str) -> Pieces:
    return [_Action(code)]


def _if(condition: str, then: Pieces, otherwise: Pieces | None = None) -> Pieces:
    if not any(then) and not otherwise:
        return []
    other = [*_do("else"), *otherwise] if otherwise else []
    return [*_do(f"if {condition}"), *then, *other, *_do("end")]


def _text(form: ChatFormat, marker: str, **places: Pieces) -> Pieces:
    """Return the pieces of a marker. BOS is written between turns only, as Ollama writes the first one."""
    known: dict[str, Pieces] = {
        "bos": [*_if("$later", [form.bos]), *_do("$later = true")],
        "eos": [form.eos],
        "date": [form.date],
        "mode": _if(_THOUGHTLESS, ["/no_think"], ["/think"]),
        **places,
    }
    pieces: Pieces = []
    position = 0
    for found in _PLACE.finditer(marker):
        if found[1] in known:
            pieces += [marker[position : found.start()], *known[found[1]]]
            position = found.end()
    return [*pieces, marker[position:]]


def _variables(form: ChatFormat) -> Pieces:
    names = ['$role := ""']
    if "{bos}" in form.user.start:
        names.append("$later := false")
    if form.system_rule in ("first_user", "last_user"):
        names.append("$system := .System")
    if form.tools and form.tools.grouped:
        names.append("$open := false")
    if form.tools and form.tools.where == "first_user":
        names.append("$listed := false")
    pieces = [_Action(name) for name in names]
    if not _needs_last_user(form):
        return pieces
    loop = [*_do("range $i, $message := .Messages"), *_if('eq .Role "user"', _do("$user = $i")), *_do("end")]
    return [*pieces, *_do("$user := -1"), *loop]


def _needs_last_user(form: ChatFormat) -> bool:
    listed = form.tools is not None and form.tools.where == "last_user"
    return listed or form.system_rule == "last_user" or (form.thinking is not None and form.thinking.drop_earlier)


def _opening(form: ChatFormat) -> Pieces:
    """Return the system turn, where it is more than a system message in its place."""
    if not form.has_opening:
        return []
    tools = form.tools
    listed = tools is not None and tools.where == "system"
    default = [form.default_system] if form.default_system else None
    inside = _text(form, form.system.start)
    if form.thinking and form.thinking.on:
        inside += _if(_THOUGHTFUL, [form.thinking.on])
    if tools and tools.preface:
        inside += _if(".Tools", [tools.preface])
    inside += _text(form, form.system_preface)
    inside += _if(".System", _do(".System"), default) if default else _do(".System")
    inside += _text(form, form.system_after)
    if listed:
        joint = [tools.joint] if default else _if(".System", [tools.joint])
        inside += _if(".Tools", [*(joint if tools.joint else []), *_tool_list(tools)])
    inside += _text(form, form.system.end)
    if form.default_system is not None or form.system_preface:
        return inside
    reasons = [".System", *([".Tools"] if listed else [])]
    if form.thinking and form.thinking.on:
        reasons.append(f"({_THOUGHTFUL})")
    return _if(reasons[0] if len(reasons) == 1 else "or " + " ".join(reasons), inside)


def _tool_list(tools: Tools) -> Pieces:
    separator = _if("$j", [tools.separator]) if tools.separator else []
    before, _, behind = tools.each.partition("{tool}")
    loop = [*_do("range $j, $tool := $.Tools"), *separator, before, *_do("$tool"), behind, *_do("end")]
    return [tools.intro, *loop, tools.outro]


def _branches(form: ChatFormat) -> Pieces:
    bodies: list[tuple[str, Pieces]] = [("user", _user(form)), ("assistant", _assistant(form))]
    if form.system_rule == "turn" and not form.has_opening:
        bodies.insert(0, ("system", [*_text(form, form.system.start), *_do(".Content"), *_text(form, form.system.end)]))
    if form.tools:
        bodies.append(("tool", _tool_result(form, form.tools)))
    pieces: Pieces = []
    for number, (role, body) in enumerate(bodies):
        pieces += [*_do(f'{"else if" if number else "if"} eq .Role "{role}"'), *body]
    return [*pieces, *_do("end")]


def _user(form: ChatFormat) -> Pieces:
    tools = form.tools if form.tools and form.tools.where != "system" else None
    start, opener = form.user.start, ""
    if form.assistant.end_is_next:
        opener = form.assistant.end
        start = start.removeprefix(opener)
    listing: Pieces = []
    if tools and tools.where == "first_user":
        listing = _if("and $.Tools (not $listed)", [*_tool_list(tools), *_do("$listed = true")])
    elif tools:
        listing = _if("and $.Tools (eq $i $user)", _tool_list(tools))
    before = listing if tools and tools.own_turn else []
    inside = [] if tools and tools.own_turn else listing
    if form.system_rule in ("first_user", "last_user"):
        wrapped = [
            *_text(form, form.system.start),
            *_do("$system"),
            *_text(form, form.system.end),
            *_do('$system = ""'),
        ]
        inside += _if("$system" if form.system_rule == "first_user" else "and $system (eq $i $user)", wrapped)
    first = _if('ne $role "assistant"', [opener]) if opener else []
    return [*before, *first, *_text(form, start), *inside, *_do(".Content"), *_text(form, form.user.end)]


def _is_last() -> str:
    return "eq (len (slice $.Messages $i)) 1"


def _assistant(form: ChatFormat) -> Pieces:
    turn = form.assistant
    lead = _text(form, turn.lead)
    if form.tools and turn.lead:
        lead = _if("not .ToolCalls", lead)
    pieces = [*_text(form, turn.start), *_thought(form), *lead, *_do(".Content")]
    if form.tools:
        pieces += _if(".ToolCalls", _calls(form, form.tools))
    end = turn.end if turn.earlier_end is None else turn.earlier_end
    return [*pieces, *_if(f"not ({_is_last()})", [*_text(form, end), *_text(form, turn.after)])]


def _thought(form: ChatFormat) -> Pieces:
    thinking = form.thinking
    if thinking is None:
        return []
    shown = [thinking.start, *_do(".Thinking"), thinking.end]
    if thinking.drop_earlier:
        # An answer to a prompt that opens the reasoning cannot be without it.
        certain = thinking.always and thinking.prompted
        return _if("gt $i $user" if certain else "and .Thinking (gt $i $user)", shown)
    off = _if(_THOUGHTLESS, [thinking.off]) if thinking.off else None
    return _if(".Thinking", shown, off)


def _prompt(form: ChatFormat) -> Pieces:
    pieces = _text(form, form.assistant.start)
    if form.thinking and form.thinking.prompted:
        pieces += [form.thinking.start]
    if form.thinking and form.thinking.off:
        pieces += _if(_THOUGHTLESS, [form.thinking.off])
    return pieces


def _calls(form: ChatFormat, tools: Tools) -> Pieces:
    places: dict[str, Pieces] = {
        "name": _do(".Function.Name"),
        "arguments": _do(".Function.Arguments"),
        "keywords": _keywords(),
        "id": _do(".ID"),
    }
    between = _if("$j", [tools.call_joint]) if tools.call_joint else []
    joint = _if(".Content", [tools.content_joint]) if tools.content_joint else []
    each = [*_do("range $j, $call := .ToolCalls"), *between, *_text(form, tools.call, **places), *_do("end")]
    return [*joint, tools.calls_start, *each, tools.calls_end]


def _keywords() -> Pieces:
    """Return the pieces that write arguments as Python keywords; strings are quoted as JSON quotes them."""
    comma = [*_if("$more", [", "]), *_do("$more = true")]
    loop = [*_do("range $name, $value := .Function.Arguments"), *comma, *_do("$name"), "=", *_do("json $value")]
    return [*_do("$more := false"), *loop, *_do("end")]


def _tool_result(form: ChatFormat, tools: Tools) -> Pieces:
    places: dict[str, Pieces] = {
        "content": _do(".Content"),
        "content_json": _do("json .Content"),
        "id": _do(".ToolCallID"),
    }
    result = _text(form, tools.result, **places)
    if not tools.grouped:
        return [*_text(form, tools.turn.start), *result, *_text(form, tools.turn.end)]
    return [*_if("not $open", [*_text(form, tools.turn.start), *_do("$open = true")]), *result]


def _close_results(form: ChatFormat, condition: str, *, reopen: bool) -> Pieces:
    if not (form.tools and form.tools.grouped):
        return []
    return _if(condition, [*_text(form, form.tools.turn.end), *(_do("$open = false") if reopen else [])])
