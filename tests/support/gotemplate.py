"""An evaluator of Go's text/template, for the part of it that Ollama's templates use.

Written from the language's documentation: text, actions with trim markers, if/else if/else, range with index and
value, variables with `:=` and `=`, fields, calls with parentheses, and the functions and, or, not, eq, ne, lt, le, gt,
ge, len, index, slice, json and currentDate. Anything else is an error, so a template cannot pass by being misread.
"""

import json
import re

from attrs import frozen

ACTION = re.compile(r"\{\{(-(?=\s))?\s*(.*?)\s*((?<=\s)-)?\}\}", re.DOTALL)
TOKEN = re.compile(r'\s*(:=|=(?!=)|\(|\)|\||,|"(?:[^"\\]|\\.)*"|`[^`]*`|-?\d+|\$?\.?[\w.]*|\S)')
KEYWORDS = ("if", "else", "end", "range", "with", "define", "template", "block", "break", "continue")


class GoError(Exception):
    """A template that does not parse or does not run."""


@frozen
class Tool:
    """A tool as Ollama prints it: JSON. `spaces` writes it as Python does, for comparing with Jinja's `tojson`."""

    data: object
    spaces: bool = False

    def __str__(self):
        return dumps(self.data, self.spaces)


def dumps(data, spaces=False):
    separators = (", ", ": ") if spaces else (",", ":")
    return json.dumps(data, separators=separators, ensure_ascii=False)


def render(template, data, *, spaces=False, today="2024-07-26"):
    """Return what Go's text/template makes of a template and its data: mappings, lists, texts, numbers and booleans."""
    nodes, rest = parse(pieces(template), 0, top=True)
    assert rest is None
    out = []
    Evaluator(out, spaces, today).run(nodes, data, [{"$": data}])
    return "".join(out)


# Parsing --------------------------------------------------------------------------------------------------------------


def pieces(template):
    """Split into texts and the tokens of actions, with white space trimmed where the markers say so."""
    found, position, trim = [], 0, False
    for match in ACTION.finditer(template):
        text = template[position : match.start()]
        text = text.lstrip() if trim else text
        found.append(text.rstrip() if match[1] else text)
        tokens = [token for token in TOKEN.findall(match[2]) if token.strip()]
        if not tokens:
            raise GoError(f"an empty action at {match.start()}")
        found.append(tokens)
        position, trim = match.end(), bool(match[3])
    tail = template[position:]
    if "{{" in tail or any("{{" in text for text in found if isinstance(text, str)):
        raise GoError("an action that is not closed")
    return [*found, tail.lstrip() if trim else tail]


def parse(parts, position, top=False):
    """Return (nodes, what ended them); nodes are texts and tuples."""
    cursor = [position]
    nodes = _block(parts, cursor, top)
    return nodes


def _block(parts, cursor, top):
    nodes = []
    while cursor[0] < len(parts):
        part = parts[cursor[0]]
        cursor[0] += 1
        if isinstance(part, str):
            nodes.append(part)
        elif part[0] in ("end", "else"):
            if top:
                raise GoError(f"{part[0]!r} without an opening")
            return nodes, part
        elif part[0] in ("if", "range"):
            nodes.append(_control(parts, cursor, part))
        elif part[0] in KEYWORDS:
            raise GoError(f"{part[0]!r} is not among what this evaluator knows")
        else:
            nodes.append(("action", part))
    if not top:
        raise GoError("an action without its end")
    return nodes, None


def _control(parts, cursor, head):
    body, ended = _block(parts, cursor, False)
    other = []
    if ended[0] == "else" and len(ended) > 1:
        if head[0] != "if" or ended[1] != "if":
            raise GoError(f"{' '.join(ended)!r}")
        other = [_control(parts, cursor, ended[1:])]
    elif ended[0] == "else":
        other, ended = _block(parts, cursor, False)
        if ended != ["end"]:
            raise GoError("two elses")
    return (head[0], head[1:], body, other)


# Running --------------------------------------------------------------------------------------------------------------


def truth(value):
    return bool(value)


def kind(value):
    if isinstance(value, bool):
        return bool
    return str if isinstance(value, str) else type(value)


def equal(first, *others):
    if not others:
        raise GoError("eq needs two values")
    if any(kind(first) is not kind(other) for other in others):
        raise GoError(f"incompatible types for comparison: {first!r}, {others!r}")
    return any(first == other for other in others)


class Evaluator:
    def __init__(self, out, spaces, today):
        self.out, self.spaces, self.today = out, spaces, today

    def run(self, nodes, dot, scopes):
        for node in nodes:
            if isinstance(node, str):
                self.out.append(node)
            elif node[0] == "action":
                self.action(node[1], dot, scopes)
            elif node[0] == "if":
                chosen = node[2] if truth(self.value(node[1], dot, scopes)) else node[3]
                self.run(chosen, dot, [*scopes, {}])
            else:
                self.loop(node, dot, scopes)

    def action(self, tokens, dot, scopes):
        if len(tokens) > 2 and tokens[0].startswith("$") and tokens[1] in (":=", "="):
            value = self.value(tokens[2:], dot, scopes)
            if tokens[1] == ":=":
                scopes[-1][tokens[0]] = value
            else:
                self.scope(tokens[0], scopes)[tokens[0]] = value
            return
        value = self.value(tokens, dot, scopes)
        if isinstance(value, bool):
            self.out.append("true" if value else "false")
        elif isinstance(value, dict | list):
            self.out.append(dumps(value, self.spaces))
        elif value is None:
            raise GoError(f"{' '.join(tokens)} has no value")
        else:
            self.out.append(str(value))

    def scope(self, name, scopes):
        """Return the innermost scope that has a variable."""
        for scope in reversed(scopes):
            if name in scope:
                return scope
        raise GoError(f"undefined variable {name}")

    def loop(self, node, dot, scopes):
        tokens, names = node[1], []
        if ":=" in tokens:
            split = tokens.index(":=")
            names, tokens = [token for token in tokens[:split] if token != ","], tokens[split + 1 :]
        items = self.value(tokens, dot, scopes)
        pairs = sorted(items.items()) if isinstance(items, dict) else list(enumerate(items or []))
        for key, item in pairs:
            bound = dict(zip(names, (key, item) if len(names) == 2 else (item,)))
            self.run(node[2], item, [*scopes, bound])
        if not pairs:
            self.run(node[3], dot, [*scopes, {}])

    def value(self, tokens, dot, scopes):
        tokens = list(tokens)
        value = self.call(tokens, dot, scopes)
        if tokens:
            raise GoError(f"left over: {tokens}")
        return value

    def call(self, tokens, dot, scopes):
        """Evaluate a command: an operand, or a function with operands, up to a closing parenthesis."""
        head = tokens[0]
        if not re.fullmatch(r"[a-zA-Z]+", head) or head in ("true", "false", "nil"):
            return self.operand(tokens, dot, scopes)
        tokens.pop(0)
        arguments = []
        while tokens and tokens[0] != ")":
            arguments.append(self.operand(tokens, dot, scopes))
        return self.function(head, arguments)

    def operand(self, tokens, dot, scopes):
        token = tokens.pop(0)
        if token == "(":
            value = self.call(tokens, dot, scopes)
            if not tokens or tokens.pop(0) != ")":
                raise GoError("a parenthesis that is not closed")
            return value
        if token[0] == '"':
            return json.loads(token)
        if token[0] == "`":
            return token[1:-1]
        if re.fullmatch(r"-?\d+", token):
            return int(token)
        if token in ("true", "false"):
            return token == "true"
        if token.startswith("$"):
            name, *fields = token.split(".")
            return self.fields(self.scope(name, scopes)[name], fields)
        if token.startswith("."):
            return self.fields(dot, [field for field in token[1:].split(".") if field])
        raise GoError(f"what is {token!r}?")

    def fields(self, value, names):
        for name in names:
            if not isinstance(value, dict) or name not in value:
                raise GoError(f"no field {name} in {value!r}")
            value = value[name]
        return value

    def function(self, name, arguments):
        order = {"lt": "__lt__", "le": "__le__", "gt": "__gt__", "ge": "__ge__"}
        if name in ("and", "or"):
            wanted = name == "or"
            return next((value for value in arguments if truth(value) == wanted), arguments[-1])
        if name in order:
            return getattr(arguments[0], order[name])(arguments[1])
        known = {
            "not": lambda value: not truth(value),
            "eq": equal,
            "ne": lambda first, second: not equal(first, second),
            "len": len,
            "index": lambda value, key: value[key],
            "slice": lambda value, start=0, end=None: value[start:end],
            "json": lambda value: dumps(value, self.spaces),
            "currentDate": lambda: self.today,
        }
        if name not in known:
            raise GoError(f"function {name!r} not defined")
        return known[name](*arguments)


# Ollama's data --------------------------------------------------------------------------------------------------------


def ollama(template, messages, *, tools=None, think=None, spaces=True, today="2024-07-26"):
    """Render messages as Ollama does; `think` is None where a request does not say."""
    return render(template, ollama_data(messages, tools=tools, think=think, spaces=spaces), spaces=spaces, today=today)


def ollama_data(messages, *, tools=None, think=None, spaces=True):
    """Return what Ollama gives to a template."""
    return {
        "System": "\n\n".join(m["content"] for m in messages if m["role"] == "system"),
        "Messages": [_message(message) for message in messages],
        "Tools": [Tool(tool, spaces) for tool in tools or []],
        "Think": bool(think),
        "ThinkLevel": "",
        "IsThinkSet": think is not None,
    }


def _message(message):
    return {
        "Role": message["role"],
        "Content": message.get("content") or "",
        "Thinking": message.get("reasoning_content", ""),
        "ToolCalls": [
            {"ID": call.get("id", ""), "Function": {key.title(): value for key, value in call["function"].items()}}
            for call in message.get("tool_calls", [])
        ],
        "ToolCallID": message.get("tool_call_id", ""),
    }
