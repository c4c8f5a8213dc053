"""Chat templates: which one to render with, so that what the assistant says is marked, and the rendering itself."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import evolve, frozen

from fastft.data import left_out
from fastft.data.check import short
from fastft.data.mask import GENERATION, Scaffold, Span, find_scaffold
from fastft.data.unlearnt import NO_RULES, Rules, find_rules
from fastft.errors import DataError, Problem, did_you_mean

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
    answers. `problem` says why messages cannot
    be rendered, or (`unmarked`) why their assistant turns cannot be told from the rest.
    """

    plain: str = ""
    tools: str = ""
    compare: tuple[str, str] | None = None
    ends: tuple[str, ...] = ()
    lists: bool = True
    rules: Rules = NO_RULES
    problem: Problem | None = None
    unmarked: Problem | None = None

    def same(self, text: str, own: str) -> bool:
        """Return whether the known format's text is that of the tokenizer's own template, but for its end."""
        if text == own:
            return True
        shorter, longer = sorted((text, own), key=len)
        rest = longer.removeprefix(shorter.rstrip())
        for token in self.ends:
            rest = rest.replace(token, "")
        return longer.startswith(shorter.rstrip()) and not rest.strip()


def render(
    tokenizer: Any,
    template: str,
    conversations: Sequence[Any],
    opened: bool,
    tools: Any = None,
    extra: Mapping[str, Any] | None = None,
    marked: bool = False,
) -> list[tuple[str, list[Span]]]:
    """Render conversations with a template; return each one's text and the character spans of its generation blocks.

    `opened` adds the generation prompt. Raises what Jinja raises.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    settings = {**tokenizer.special_tokens_map, **(extra or {})}
    texts, spans = render_jinja_template(
        conversations=[list(messages) for messages in conversations],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=marked,
        add_generation_prompt=opened,
        **settings,
    )
    return list(zip(texts, spans if marked else [[] for _ in texts], strict=True))


@frozen
class Renderer:
    """Renders conversations with a tokenizer's templates; nothing of a conversation is left out unsaid."""

    tokenizer: Any
    templates: Templates

    def alone(
        self, where: str, messages: Any, opened: bool, tools: Any = None, extra: Mapping[str, Any] | None = None
    ) -> tuple[str, list[Span]]:
        """Return text and generation spans of one conversation, called `where` in errors. Raises `DataError`."""

        def text_of(messages: Any, tools: Any = tools) -> str | None:
            try:
                return self.rendered([messages], opened, tools, extra)[0][0]
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
            ((text, spans),) = self.rendered([messages], opened, tools, extra)
        except DataError as error:
            raise DataError(*(evolve(problem, where=where) for problem in error.problems)) from error
        except render_errors() as error:
            general = Problem(where, short(messages), "messages that the template takes", f"The template says: {error}")
            raise DataError(*(left_out.refused(where, messages, text_of, str(error)) or [general])) from error
        problems = left_out.left_out(where, messages, tools, text, text_of)
        if problems:
            raise DataError(*problems)
        return text, spans

    def rendered(
        self, conversations: Sequence[Any], opened: bool, tools: Any = None, extra: Mapping[str, Any] | None = None
    ) -> list[tuple[str, list[Span]]]:
        """Return text and generation spans of every conversation.

        Raises what Jinja raises, and `DataError` where the texts of `compare` differ.
        """
        template = self.templates.tools if tools else self.templates.plain
        marked = GENERATION.search(template) is not None
        found = render(self.tokenizer, template, conversations, opened, tools, extra, marked)
        if self.templates.compare is None:
            return found
        own = self.templates.compare[1 if tools else 0]
        pairs = render(self.tokenizer, own, conversations, opened, tools, extra)
        for (text, _), (wanted, _), messages in zip(found, pairs, conversations, strict=True):
            if not self.templates.same(text, wanted):
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


def own_templates(tokenizer: Any) -> tuple[str, str]:
    """Return the tokenizer's templates for conversations without and with tools; empty where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return "", ""
    if isinstance(template, str):
        return template, template
    plain = template.get("default") or next(iter(template.values()))
    return plain, template.get("tool_use") or plain


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
    marked = all(GENERATION.search(template) for template in (plain, tools))
    known = None if marked else _known_format(tokenizer)

    def probe(messages: Sequence[Any], opened: bool, template: str = plain) -> tuple[str, list[Span]] | None:
        try:
            return render(tokenizer, template, [messages], opened, marked=marked or template != plain)[0]
        except render_errors():
            return None

    scaffold = find_scaffold(tokenizer, probe, known.stop_tokens if known else ())
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


def _known_format(tokenizer: Any) -> Any:
    from fastft.data.template import recognise_format

    return recognise_format(tokenizer)


def render_errors() -> tuple[type[Exception], ...]:
    """Return what a template may raise for messages that it does not take."""
    from jinja2.exceptions import TemplateError

    return (TemplateError, TypeError, ValueError, KeyError, AttributeError)
