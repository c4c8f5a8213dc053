"""Conversations of rows to text: which template marks what the assistant says, and that nothing is left out."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import evolve, frozen

from fastft.data import left_out
from fastft.data.known_format import recognise_format
from fastft.data.mask import Scaffold, find_scaffold, merged
from fastft.data.template import (
    Rendered,
    has_generation_markers,
    own_templates,
    render_all,
    render_errors,
    same_but_end,
)
from fastft.data.unlearnt import NO_RULES, Rules, find_rules
from fastft.errors import DataError, Problem, did_you_mean, short

NO_TEMPLATE = "Set tokenizer.chat_template, or give rows with 'prompt' and 'completion' or 'text'."
NO_MARKERS = (
    "Give tokenizer.chat_template a version with {% generation %} ... {% endgeneration %} around assistant turns "
    "(fastft.chat_templates.get_chat_template(tokenizer, name) has one for every known format), or use train_on='all'."
)
OTHERWISE = (
    "The tokenizer's template has no {% generation %} markers and renders this row otherwise than the known format it "
    "resembles; put the markers into tokenizer.chat_template, or fastft.chat_templates.get_chat_template(tokenizer, "
    "name)."
)


@frozen
class Templates:
    """The chat templates to render with, for rows without and with tools.

    Where `compare` is set, `plain` and `tools` are those of a known format, marked with `{% generation %}`, and a row
    is only used if the tokenizer's own template in `compare` renders the same text, stop tokens in `ends` and white
    space at its end excepted. `lists`: it takes contents that are lists of parts. `rules` say what it does to earlier
    answers. `problem` says why messages cannot be rendered, or (`unmarked`) why their assistant turns cannot be told
    from the rest.
    """

    plain: str = ""
    tools: str = ""
    compare: tuple[str, str] | None = None
    ends: tuple[str, ...] = ()
    lists: bool = True
    rules: Rules = NO_RULES
    problem: Problem | None = None
    unmarked: Problem | None = None


@frozen
class Renderer:
    """Renders conversations with a tokenizer's templates; nothing of a conversation is left out unsaid."""

    tokenizer: Any
    templates: Templates

    def alone(
        self, where: str, messages: Any, opened: bool, tools: Any = None, extra: Mapping[str, Any] | None = None
    ) -> Rendered:
        """Return one conversation, called `where` in errors, as text. Raises `DataError`."""

        def text_of(messages: Any, tools: Any = tools) -> str | None:
            try:
                return self.rendered([messages], opened, tools, extra)[0].text
            except (*render_errors(), DataError):
                return None

        problems = _setting_problems(where, extra, self.templates)
        if problems:
            raise DataError(*problems)
        if not self.templates.lists:
            messages = left_out.with_texts(messages)
            problems = left_out.refused_parts(where, messages)
            if problems:
                raise DataError(*problems)
        try:
            (made,) = self.rendered([messages], opened, tools, extra)
        except DataError as error:
            raise DataError(*(evolve(problem, where=where) for problem in error.problems)) from error
        except render_errors() as error:
            general = Problem(where, short(messages), "messages that the template takes", f"The template says: {error}")
            raise DataError(*(left_out.refused(where, messages, text_of, str(error)) or [general])) from error
        problems = left_out.left_out(where, messages, tools, made.text, text_of)
        if problems:
            raise DataError(*problems)
        return made

    def rendered(
        self, conversations: Sequence[Any], opened: bool, tools: Any = None, extra: Mapping[str, Any] | None = None
    ) -> list[Rendered]:
        """Return every conversation as text; `opened` adds the generation prompt.

        Raises what Jinja raises, and `DataError` where the texts of `compare` differ.
        """
        template = self.templates.tools if tools else self.templates.plain
        variables = {**self.tokenizer.special_tokens_map, **(extra or {})}
        found = render_all(template, conversations, variables, tools=tools, add_generation_prompt=opened)
        if self.templates.compare is None:
            return found
        own = self.templates.compare[1 if tools else 0]
        wanted = render_all(own, conversations, variables, tools=tools, add_generation_prompt=opened)
        for made, other, messages in zip(found, wanted, conversations, strict=True):
            if not same_but_end(made.text, other.text, self.templates.ends):
                raise DataError(Problem("messages", short(messages), "the rendering of the known format", OTHERWISE))
        return found


def _setting_problems(where: str, settings: Any, templates: Templates) -> list[Problem]:
    """Return a problem for every setting that no template reads: its name does not stand in one."""
    where = f"{where.partition(',')[0]}, chat_template_kwargs"
    if settings is not None and not isinstance(settings, Mapping):
        return [Problem(where, short(settings), "a dict of settings of the chat template")]
    texts = [templates.plain, templates.tools, *(templates.compare or ())]
    words = {word for text in texts for word in re.findall(r"[A-Za-z_]\w*", text)} if settings else set()
    return [
        Problem(f"{where}[{name!r}]", short(value), "a setting that the chat template reads", did_you_mean(name, words))
        for name, value in (settings or {}).items()
        if name not in words
    ]


def templates_of(tokenizer: Any, train_on: str) -> tuple[Templates, Scaffold]:
    """Return what to render a tokenizer's conversations with, and what its template puts around an answer.

    A template without `{% generation %}` that renders like a known format is exchanged for that format's, which has
    the same text and the markers. With `train_on="all"` no markers are needed.
    """
    plain, tools = own_templates(tokenizer)
    if not plain:
        problem = Problem(
            "tokenizer.chat_template",
            getattr(tokenizer, "chat_template", None),
            "a chat template to render messages with",
            NO_TEMPLATE,
        )
        return Templates(problem=problem), find_scaffold(tokenizer)
    marked = all(has_generation_markers(template) for template in (plain, tools))
    known = None if marked else recognise_format(tokenizer)

    def probe(messages: Sequence[Any], opened: bool, template: str = plain) -> Rendered | None:
        try:
            return render_all(template, [messages], tokenizer.special_tokens_map, add_generation_prompt=opened)[0]
        except render_errors():
            return None

    scaffold = find_scaffold(tokenizer, probe, known.stop_tokens if known else ())
    form = recognise_format(tokenizer) if marked and _ends_differ(probe) else known
    scaffold = evolve(scaffold, earlier_end=(form and form.assistant.earlier_end) or "")
    parts = probe([{"role": "user", "content": [{"type": "text", "text": "question"}]}], False)
    lists = parts is not None and parts == probe([{"role": "user", "content": "question"}], False)
    if train_on == "all":
        return Templates(plain, tools, lists=lists), scaffold
    if marked:
        rules = find_rules(lambda messages: probe(messages, False), scaffold.prompt)
        return Templates(plain, tools, lists=lists, rules=rules), scaffold
    if known is not None:
        ends = tuple({*known.stop_tokens, tokenizer.eos_token or ""} - {""})
        rules = find_rules(lambda messages: probe(messages, False, known.jinja), scaffold.prompt)
        made = Templates(known.jinja, known.jinja, compare=(plain, tools), ends=ends, lists=lists, rules=rules)
        return made, scaffold
    unmarked = Problem("tokenizer.chat_template", "no {% generation %} markers", "markers", NO_MARKERS)
    return Templates(plain, tools, lists=lists, unmarked=unmarked), scaffold


def _ends_differ(probe: Callable[..., Rendered | None]) -> bool:
    """Return whether the same answer is marked otherwise at the end of a conversation than before it."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    whole = probe([*turns, *turns], False)
    return whole is not None and len({whole.text[slice(*span)] for span in merged(whole.spans)}) > 1
