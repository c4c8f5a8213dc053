"""Chat templates by the familiar names: choose a format for a tokenizer, and bring data into one shape."""

from collections.abc import Mapping
from typing import Any

from fastft.errors import Problem, UsageError, short

# name -> module that defines it, imported on first use
_EXPORTS = {
    "train_on_responses_only": "fastft.data.responses",
    "standardize_sharegpt": "fastft.data.standardize",
    "standardize_data_formats": "fastft.data.standardize",
    "to_sharegpt": "fastft.data.standardize",
}
__all__ = ["get_chat_template", *_EXPORTS]
_KEYS = ("role", "content")
_ROLES = ("system", "user", "assistant", "tool")


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastft.chat_templates' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def get_chat_template(
    tokenizer: Any,
    chat_template: str | tuple[str, str] = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> Any:
    """Return a copy of `tokenizer` that renders conversations in a chat format; the given one stays as it is.

    `chat_template` is the name of a format (`fastft registry formats` lists them) or a pair of a Jinja template and
    its stop token. `mapping` says how the data names things: `{"role": "from", "content": "value", "user": "human",
    "assistant": "gpt"}` is ShareGPT's; what it leaves out keeps its name.

    The format's stop token becomes the copy's EOS with `map_eos_token`. A stop token that the vocabulary lacks then
    takes the place of the EOS token: same id, new text, no embedding added. Without `map_eos_token` EOS stays, and the
    stop token has to be in the vocabulary. Formats that end turns with EOS itself take the tokenizer's.
    `system_message` is the system message of conversations that bring none: None leaves the format's own, an empty text
    is none at all.

    Raises SpecError for an unknown format and UsageError for anything else that cannot work.
    """
    from copy import deepcopy

    from fastft.given import tokenizer_problem
    from fastft.registry.chat_jinja import renamed

    wrong = tokenizer_problem(tokenizer)
    if wrong:
        raise UsageError(wrong)
    template, stop = _template(tokenizer, chat_template, system_message)
    keys, roles = _checked_mapping(mapping)
    changed = deepcopy(tokenizer)
    if stop is not None:
        changed = _with_stop(changed, stop, chat_template, map_eos_token)
    if keys != _KEYS or roles:
        template = renamed(template, *keys, roles)
    changed.chat_template = template
    return changed


def _template(tokenizer: Any, given: Any, system_message: str | None) -> tuple[str, str | None]:
    """Return the Jinja template and the stop token that the vocabulary must have; None where that is EOS."""
    from attrs import evolve

    from fastft.registry.chat import chat_format, has_own_template
    from fastft.registry.chat_jinja import jinja_template

    if isinstance(given, tuple | list):
        if len(given) != 2 or not all(isinstance(part, str) and part for part in given):
            raise UsageError(Problem("chat_template", given, "a format's name, or a pair (jinja template, stop token)"))
        if system_message is not None:
            remedy = "Write the system message into your template."
            raise UsageError(Problem("system_message", system_message, "None for a template of your own", remedy))
        _check_syntax(given[0])
        return given[0], given[1]
    if not isinstance(given, str):
        raise UsageError(Problem("chat_template", given, "a format's name, or a pair (jinja template, stop token)"))
    if "{{" in given or "{%" in given:
        remedy = "A template of your own comes with its stop token: (template, '<|im_end|>')."
        raise UsageError(Problem("chat_template", short(given), "a pair (jinja template, stop token)", remedy))
    form = chat_format(given)
    if system_message is not None:
        if has_own_template(form) or form.system_rule == "refused":
            remedy = "Put a system message into each conversation."
            raise UsageError(Problem("system_message", system_message, f"None for the format {form.name!r}", remedy))
        template = jinja_template(evolve(form, default_system=system_message or None))
    else:
        template = form.jinja
    if "{eos}" not in form.assistant.end:
        return template, form.stop_token
    if not tokenizer.eos_token:
        remedy = f"Set tokenizer.eos_token; {form.name} ends turns with it."
        raise UsageError(Problem("tokenizer.eos_token", tokenizer.eos_token, "an EOS token", remedy))
    return template, None


def _check_syntax(template: str) -> None:
    """Raise `UsageError` for a template that Jinja cannot read."""
    from jinja2 import TemplateSyntaxError

    from fastft.data.template import render
    from fastft.errors import DataError

    try:
        render(template, [{"role": "user", "content": "question"}])
    except DataError as error:
        # Other errors are about this conversation, which need not be one for the template.
        if isinstance(error.__cause__, TemplateSyntaxError):
            remedy = f"Line {error.__cause__.lineno}: {error.__cause__.message}"
            raise UsageError(Problem("chat_template", short(template), "a Jinja template", remedy)) from error


def _checked_mapping(mapping: Mapping[str, str] | None) -> tuple[tuple[str, str], dict[str, str]]:
    """Return the keys of a message and `{role in the data: role}`. Raises UsageError with every mistake."""
    mapping = mapping or {}
    problems = [
        Problem(f"mapping[{name!r}]", theirs, "a name in the data, for one of " + ", ".join((*_KEYS, *_ROLES)))
        for name, theirs in mapping.items()
        if name not in (*_KEYS, *_ROLES) or not isinstance(theirs, str) or not theirs
    ]
    names = [mapping.get(role, role) for role in _ROLES]
    if len(set(names)) < len(names):
        problems.append(Problem("mapping", dict(mapping), "another name for every role"))
    if problems:
        raise UsageError(*problems)
    roles = {mapping[role]: role for role in _ROLES if mapping.get(role, role) != role}
    return (mapping.get("role", "role"), mapping.get("content", "content")), roles


def _with_stop(tokenizer: Any, stop: str, format_name: Any, map_eos_token: bool) -> Any:
    """Return the tokenizer with `stop` among its tokens, as EOS where asked for."""
    known = stop in tokenizer.get_vocab()
    if known:
        if map_eos_token:
            tokenizer.eos_token = stop
        return tokenizer
    named = format_name if isinstance(format_name, str) else "the given template"
    if not map_eos_token:
        remedy = "Pass map_eos_token=True to give the EOS token that text, or add the token with fastft.add_tokens."
        raise UsageError(Problem(f"stop token of {named}", stop, "a token of the tokenizer's vocabulary", remedy))
    if not tokenizer.eos_token or not hasattr(tokenizer, "backend_tokenizer"):
        remedy = "Add the token with fastft.add_tokens, or choose a format whose stop token the tokenizer has."
        raise UsageError(
            Problem(f"stop token of {named}", stop, "a token of the vocabulary, or an EOS token to rename", remedy)
        )
    return _renamed_token(tokenizer, tokenizer.eos_token, stop)


def _renamed_token(tokenizer: Any, old: str, new: str) -> Any:
    """Give the token `old` of a tokenizer the text `new`, keeping its id, and return the tokenizer."""
    import json

    from tokenizers import Tokenizer

    table = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in table["added_tokens"]:
        token["content"] = new if token["content"] == old else token["content"]
    vocabulary = table["model"]["vocab"]
    if isinstance(vocabulary, dict):
        table["model"]["vocab"] = {new if word == old else word: number for word, number in vocabulary.items()}
    else:
        table["model"]["vocab"] = [[new if word == old else word, score] for word, score in vocabulary]
    if table.get("post_processor"):
        table["post_processor"] = _replaced(table["post_processor"], old, new)
    # The copy that is ours keeps its class and settings; its backend has no public setter.
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(table))
    for name, token in tokenizer.special_tokens_map.items():
        if token == old:
            setattr(tokenizer, name, new)
    return tokenizer


def _replaced(value: Any, old: str, new: str) -> Any:
    """Return plain data with every text and key equal to `old` replaced."""
    if isinstance(value, dict):
        return {new if key == old else key: _replaced(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, old, new) for item in value]
    return new if value == old else value
