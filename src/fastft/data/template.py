"""Rendering conversations to text, and recognising the chat format that a tokenizer's own template writes."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from attrs import frozen

from fastft.errors import DataError, Problem
from fastft.registry.chat import chat_formats, with_tokens
from fastft.registry.chat_format import ChatFormat

GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
# Fixed where a template would write the day's date, so that renderings of one template on two days are equal.
_DATES = {"date_string": "26 Jul 2024", "current_date": "2024-07-26"}


@frozen
class Rendered:
    """A conversation as text; `spans` are the `(start, end)` characters that the model would have to sample."""

    text: str
    spans: tuple[tuple[int, int], ...]


def render(
    template: str | ChatFormat,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> Rendered:
    """Render messages by a Jinja template or a chat format, in transformers' environment, without a tokenizer.

    `variables` are further variables of the template, such as `bos_token`, `eos_token` and `enable_thinking`; a chat
    format brings its own BOS and EOS. Raises DataError where the template refuses the messages.
    """
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    if isinstance(template, ChatFormat):
        variables = {"bos_token": template.bos, "eos_token": template.eos, **variables}
        template = template.jinja
    try:
        texts, spans = render_jinja_template(
            conversations=[list(messages)],
            tools=list(tools) if tools else None,
            chat_template=template,
            return_assistant_tokens_mask=has_generation_markers(template),
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
    except (TemplateError, TypeError, AttributeError) as error:
        # A template that meets a value it did not expect fails with Python's own errors.
        short = repr(list(messages))
        short = short if len(short) <= 120 else short[:117] + "..."
        raise DataError(
            Problem("messages", short, "messages that the template takes", f"The template says: {error}.")
        ) from error
    return Rendered(texts[0], tuple(spans[0]) if spans else ())


def has_generation_markers(template: str) -> bool:
    """Return whether a template says which of its text the model samples."""
    return GENERATION.search(template) is not None


def without_generation_markers(template: str) -> str:
    """Return a template that renders the same text in programs that do not know `{% generation %}`.

    The tags are replaced by blocks that do nothing and trim white space as the tags did.
    """

    def plain(tag: re.Match[str]) -> str:
        left, right = ("-" if tag[0][2] == "-" else ""), ("-" if tag[0][-3] == "-" else "")
        return f"{{%{left} endif {right}%}}" if tag[1] else f"{{%{left} if true {right}%}}"

    return GENERATION.sub(plain, template)


def recognise_format(tokenizer: Any) -> ChatFormat | None:
    """Return the known chat format that a tokenizer's own template renders, with the tokenizer's BOS and EOS.

    A handful of conversations is rendered by both and the texts are compared; the template's wording does not matter.
    The end of a finished conversation may differ by stop tokens alone. None: no known format, or no template.
    """
    template = _own_template(tokenizer)
    if template is None:
        return None
    tokens = _tokens(tokenizer)
    own = _renderings(template, tokens)
    if own[0] is None:
        return None
    best, most = None, (-1, 0)
    for form in chat_formats():
        score = _agreement(form, own, tokens)
        # Of formats that agree equally, the plainest: tools and reasoning that the template does not have are no gain.
        rank = (score, -len(form.jinja))
        if score >= 0 and rank > most or score >= 0 and best is None:
            best, most = form, rank
    return best and with_tokens(best, bos=tokens["bos_token"] or None, eos=tokens["eos_token"] or None)


def response_parts(tokenizer: Any) -> tuple[str, str]:
    """Return `(instruction_part, response_part)`: the text before a user's content and before the assistant's answer.

    They come from the format that the tokenizer's template is recognised as, or else from the template's rendering of
    a conversation. Raises DataError where it has no template, or one that does not render user and assistant turns.
    """
    form = recognise_format(tokenizer)
    if form is not None:
        return form.instruction_part, form.response_part
    template = _own_template(tokenizer)
    if template is None:
        remedy = "Choose a format with fastft.chat_templates.get_chat_template, or name both parts."
        raise DataError(Problem("tokenizer.chat_template", None, "a chat template to find the parts in", remedy))
    return _parts_of(template, _tokens(tokenizer))


# Recognition ----------------------------------------------------------------------------------------------------------

_USER, _ANSWER, _NEXT, _LAST, _SYSTEM = "first question", "first answer", "second question", "second answer", "rules"
_TURNS = [
    {"role": "user", "content": _USER},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": _NEXT},
    {"role": "assistant", "content": _LAST},
]
_RULES = [{"role": "system", "content": _SYSTEM}]
_TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}
_REASONED = [*_TURNS[:3], {"role": "assistant", "content": _LAST, "reasoning_content": "because"}]
# (messages, with a generation prompt, with tools, must agree)
_PROBES: tuple[tuple[list[dict[str, Any]], bool, bool, bool], ...] = (
    (_TURNS[:1], True, False, True),
    (_TURNS[:3], True, False, True),
    (_TURNS, False, False, True),
    (_RULES + _TURNS[:3], True, False, False),
    (_TURNS[:1], True, True, False),
    (_REASONED, False, False, False),
)


def _own_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    return template or None


def _tokens(tokenizer: Any) -> dict[str, str]:
    return {name: getattr(tokenizer, name, None) or "" for name in ("bos_token", "eos_token")}


@cache
def _renderings_of(template: str, bos: str, eos: str) -> tuple[str | None, ...]:
    found: list[str | None] = []
    for messages, prompt, tools, _ in _PROBES:
        try:
            options: dict[str, Any] = {"tools": [_TOOL] if tools else None, "add_generation_prompt": prompt}
            found.append(render(template, messages, bos_token=bos, eos_token=eos, **_DATES, **options).text)
        except DataError:
            found.append(None)
    return tuple(found)


def _renderings(template: str, tokens: Mapping[str, str]) -> tuple[str | None, ...]:
    return _renderings_of(template, tokens["bos_token"], tokens["eos_token"])


def _agreement(form: ChatFormat, own: Sequence[str | None], tokens: Mapping[str, str]) -> int:
    """Return on how many probes a format and a template agree, or -1 where they have to and do not."""
    ours = _renderings(form.jinja, tokens)
    ends = {*form.stop_tokens, tokens["eos_token"]} - {""}
    score = 0
    for (_, prompt, _, must), mine, theirs in zip(_PROBES, ours, own):
        same = mine == theirs if prompt or mine is None or theirs is None else _same_but_end(mine, theirs, ends)
        if must and not same:
            return -1
        # A template that refuses system messages may agree with a format that has a place for them.
        score += bool(same)
    return score


def _same_but_end(one: str, other: str, ends: set[str]) -> bool:
    """Return whether two texts differ at most in stop tokens and white space at their end."""
    short, long = sorted((one, other), key=len)
    rest = long.removeprefix(short)
    if len(rest) == len(long) and short:
        # White space at the end of the shorter one, or a stop token in front of it
        short = short.rstrip()
        rest = long.removeprefix(short)
    for token in ends:
        rest = rest.replace(token, "")
    return long.startswith(short) and not rest.strip()


def _parts_of(template: str, tokens: Mapping[str, str]) -> tuple[str, str]:
    def text(messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        return render(template, messages, add_generation_prompt=prompt, **tokens, **_DATES).text

    whole, asked, bare = text(_TURNS), text(_TURNS[:1], True), text(_TURNS[:1])
    places = [whole.find(content) for content in (_USER, _ANSWER, _NEXT, _LAST)]
    if -1 in places or places != sorted(places):
        remedy = "Name instruction_part and response_part yourself."
        raise DataError(Problem("tokenizer.chat_template", whole, "the contents of all turns, in order", remedy))
    between = whole[places[0] + len(_USER) : places[1]]
    behind = whole[places[1] + len(_ANSWER) : places[2]]
    opened = asked.removeprefix(bare) if asked.startswith(bare) else ""
    tail = whole[places[3] + len(_LAST) :]
    return behind.removeprefix(tail) or behind, opened or between
