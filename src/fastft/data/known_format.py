"""The known chat format that a tokenizer's own template writes, told by what it renders; the markers of turns."""

from collections.abc import Mapping, Sequence
from datetime import date
from functools import cache
from typing import Any

from attrs import frozen

from fastft.data.template import own_templates, render, same_but_end
from fastft.errors import DataError, Problem
from fastft.registry.chat import chat_formats, with_tokens
from fastft.registry.chat_format import ChatFormat


def recognise_format(tokenizer: Any) -> ChatFormat | None:
    """Return the known chat format that a tokenizer's own template renders, with the tokenizer's BOS and EOS.

    A handful of conversations is rendered by both and the texts are compared; the template's wording does not matter.
    The end of a finished conversation may differ by stop tokens alone. None: no known format, or no template.
    """
    template, _ = own_templates(tokenizer)
    if not template:
        return None
    tokens = _tokens(tokenizer)
    own = _renderings(template, tokens)
    if own[0] is None:
        return None
    best, most = None, (0, 0)
    for form in chat_formats():
        # Of formats that agree equally the plainest: tools, reasoning and images that the template lacks are no gain.
        rank = (_agreement(form, own, tokens), -sum(map(bool, (form.tools, form.thinking, form.image))))
        if rank[0] and (best is None or rank > most):
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
    template, _ = own_templates(tokenizer)
    if not template:
        remedy = "Choose a format with fastft.chat_templates.get_chat_template, or name both parts."
        raise DataError(Problem("tokenizer.chat_template", None, "a chat template to find the parts in", remedy))
    return _parts_of(template, _tokens(tokenizer))


# Recognition ----------------------------------------------------------------------------------------------------------

# Llama's templates differ in the date that they fall back to.
_DATE = {"date_string": "26 Jul 2024"}
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
_SHOWN = [{"role": "user", "content": [{"type": "text", "text": _USER}, {"type": "image"}]}]


@frozen
class _Probe:
    """A conversation to render by both.

    Formats that disagree where they `must` agree are out, and so are those that disagree on what neither refuses with
    `unless_refused`; `weight` counts towards the choice among the others.
    """

    messages: list[dict[str, Any]]
    prompt: bool = True
    tools: bool = False
    must: bool = False
    unless_refused: bool = False
    weight: int = 1


_PROBES = (
    _Probe(_TURNS[:1], must=True),
    _Probe(_TURNS[:3], must=True),
    _Probe(_TURNS, prompt=False, must=True),
    _Probe(_RULES + _TURNS[:3], unless_refused=True, weight=4),
    _Probe(_TURNS[:1], tools=True, weight=2),
    _Probe(_SHOWN),
    _Probe(_REASONED, prompt=False),
)


def _tokens(tokenizer: Any) -> dict[str, str]:
    return {name: getattr(tokenizer, name, None) or "" for name in ("bos_token", "eos_token")}


@cache
def _renderings_of(template: str, bos: str, eos: str, day: date) -> tuple[str | None, ...]:
    """Return the text of every probe, None where it is refused; `day` is part of the key, as templates may show it."""
    found: list[str | None] = []
    for probe in _PROBES:
        options = {"tools": [_TOOL] if probe.tools else None, "add_generation_prompt": probe.prompt}
        try:
            found.append(render(template, probe.messages, bos_token=bos, eos_token=eos, **_DATE, **options).text)
        except DataError:
            found.append(None)
    return tuple(found)


def _renderings(template: str, tokens: Mapping[str, str]) -> tuple[str | None, ...]:
    return _renderings_of(template, tokens["bos_token"], tokens["eos_token"], date.today())


def _agreement(form: ChatFormat, own: Sequence[str | None], tokens: Mapping[str, str]) -> int:
    """Return how well a format agrees with a template on the probes; 0 where it has to and does not."""
    ends = {*form.stop_tokens, tokens["eos_token"]} - {""}
    score = 1
    for probe, mine, theirs in zip(_PROBES, _renderings(form.jinja, tokens), own):
        if mine is None or theirs is None or probe.prompt:
            same = mine == theirs
        else:
            same = any(same_but_end(text, theirs, ends) for text in (mine, _thoughtless(form, mine)))
        if not same and (probe.must or (probe.unless_refused and mine is not None and theirs is not None)):
            return 0
        score += probe.weight * same
    return score


def _thoughtless(form: ChatFormat, text: str) -> str:
    """Return a text without the empty reasoning that a prompted answer has here; models' own templates leave it out."""
    thinking = form.thinking
    return text.replace(thinking.start + thinking.end, "") if thinking and thinking.prompted else text


def _parts_of(template: str, tokens: Mapping[str, str]) -> tuple[str, str]:
    def text(messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        return render(template, messages, add_generation_prompt=prompt, **tokens, **_DATE).text

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
