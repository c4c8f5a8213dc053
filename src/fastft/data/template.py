"""Chat templates: those that a tokenizer has, their markers, and the one call that makes text of conversations."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attrs import frozen

from fastft.errors import DataError, Problem, short
from fastft.registry.chat_format import ChatFormat

GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


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
    if isinstance(template, ChatFormat):
        variables = {"bos_token": template.bos, "eos_token": template.eos, **variables}
        template = template.jinja
    try:
        return render_all(template, [messages], variables, tools=tools, add_generation_prompt=add_generation_prompt)[0]
    except render_errors() as error:
        remedy = f"The template says: {error}."
        raise DataError(
            Problem("messages", short(list(messages)), "messages that the template takes", remedy)
        ) from error


def render_all(
    template: str,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    variables: Mapping[str, Any],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> list[Rendered]:
    """Render conversations by a Jinja template, each on its own. Raises one of `render_errors`."""
    from transformers.utils.chat_template_utils import render_jinja_template

    marked = has_generation_markers(template)
    texts, spans = render_jinja_template(
        conversations=[list(messages) for messages in conversations],
        tools=list(tools) if tools else None,
        chat_template=template,
        return_assistant_tokens_mask=marked,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    return [Rendered(text, tuple(own)) for text, own in zip(texts, spans if marked else [()] * len(texts), strict=True)]


def render_errors() -> tuple[type[Exception], ...]:
    """Return what a template may raise: Jinja's errors, and Python's own where messages are not as it expected."""
    from jinja2.exceptions import TemplateError

    return (TemplateError, TypeError, ValueError, LookupError, AttributeError)


def own_templates(tokenizer: Any) -> tuple[str, str]:
    """Return the tokenizer's templates for conversations without and with tools; empty where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return "", ""
    if isinstance(template, str):
        return template, template
    plain = template.get("default") or next(iter(template.values()))
    return plain, template.get("tool_use") or plain


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


def same_but_end(one: str, other: str, ends: Iterable[str]) -> bool:
    """Return whether two texts differ at most in the stop tokens `ends` and white space at their end."""
    if one == other:
        return True
    shorter, longer = sorted((one, other), key=len)
    shorter = shorter.rstrip()
    rest = longer.removeprefix(shorter)
    for token in ends:
        rest = rest.replace(token, "")
    return longer.startswith(shorter) and not rest.strip()
