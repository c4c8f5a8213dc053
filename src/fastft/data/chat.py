"""Conversations, prompts with completions, and plain text to token ids and labels that say what is learnt.

What the model would write itself is learnt, the stop token included; what it is given is not. Nothing is dropped or
cut without being asked for: a row that cannot be used is an error that names it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from fastft.data.check import check_tokenised, named, refuse, refuse_empty, row_problem
from fastft.errors import DataError, Problem, UsageError, did_you_mean

TRAIN_ON = ("assistant", "completion", "all")
KINDS = {"messages": ("messages",), "prompt and completion": ("prompt", "completion"), "text": ("text",)}
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
IGNORE = -100
Encoded = tuple[list[int], list[int]]
Span = tuple[int, int]


def chat_dataset(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    train_on: Literal["assistant", "completion", "all"] = "assistant",
    *,
    max_length: int | None = None,
    overlong: Literal["refuse", "truncate"] = "refuse",
) -> Any:
    """Render, tokenise and mask `rows`; return a `datasets.Dataset` with `input_ids` and `labels` (-100: not learnt).

    A row holds `messages` (a list of `{"role", "content"}`, with `tools` if there are any), or `prompt` and
    `completion` (two texts, or two lists of messages), or `text`. `train_on`:

    * "assistant": every assistant turn with its stop token, by the template's `{% generation %}` markers; of a prompt
      with completion, the completion.
    * "completion": the completion; of messages, the last assistant turn.
    * "all": every token.

    Plain texts and completions end with the tokenizer's EOS token, added where it is missing. Where a template's
    markers end just before the turn's stop token, that token is learnt all the same. `max_length` is a number of
    tokens; a longer row is refused, or cut at its end with `overlong="truncate"`.

    Raises `UsageError` for wrong arguments, and `DataError` naming row, field, value and remedy for rows of a wrong
    type, without text, or with nothing to learn, and for a template without markers where they are needed.
    """
    from datasets import Dataset

    _check_arguments(train_on, max_length, overlong)
    _need_rows(rows)
    rows = list(rows)
    refuse_empty(rows)
    problems: list[Problem | str] = []
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for index, row in enumerate(rows):
        where = f"row {index}"
        try:
            ids, labels = _encode(where, row, tokenizer, train_on)
        except DataError as error:
            if any(str(problem).startswith("tokenizer.") for problem in error.problems):
                raise  # it would be the same for every row
            problems.extend(error.problems)
            continue
        problem = _length_problem(where, ids, max_length, overlong)
        ids, labels = ids[:max_length], labels[:max_length]
        problem = problem or row_problem(where, ids, labels)
        if problem:
            problems.append(problem)
        columns["input_ids"].append(ids)
        columns["labels"].append(labels)
    refuse(problems)
    return Dataset.from_dict(columns)


def tokenised(data: Any, tokenizer: Any, train_on: str, name: str) -> Any:
    """Return token ids: `data` itself after a check, or what `chat_dataset` makes of its rows; errors tell its `name`.

    Raises `UsageError` and `DataError`.
    """
    if isinstance(data, list) and data and isinstance(data[0], Mapping) and "input_ids" in data[0]:
        from datasets import Dataset

        data = Dataset.from_list(data)
    if not isinstance(data, Mapping) and "input_ids" in (getattr(data, "column_names", None) or ()):
        check_tokenised(data, name)
        return data
    try:
        return chat_dataset(data, tokenizer, train_on=train_on)
    except DataError as error:
        raise DataError(*(named(problem, name) for problem in error.problems)) from error


def _need_rows(rows: Any) -> None:
    """Raise `DataError` for what is no list of rows: a path, one row, several splits."""
    if isinstance(rows, str):
        remedy = "Read the file first, with datasets.load_dataset('json', data_files=..., split='train'), say."
    elif isinstance(rows, Mapping):
        splits = [str(name) for name, part in rows.items() if hasattr(part, "column_names")]
        remedy = f"Choose one of its splits: {', '.join(splits)}." if splits else "Put the row into a list."
    elif not isinstance(rows, Iterable):
        remedy = "A row is {'messages': [...]}, {'prompt', 'completion'} or {'text'}."
    else:
        return
    value = rows if isinstance(rows, str) or rows is None else type(rows).__name__
    raise DataError(Problem("rows", value, "a list of rows, each a dict, or a datasets.Dataset", remedy))


def _check_arguments(train_on: str, max_length: int | None, overlong: str) -> None:
    problems = []
    if train_on not in TRAIN_ON:
        problems.append(Problem("train_on", train_on, f"one of {TRAIN_ON}", did_you_mean(train_on, TRAIN_ON)))
    if overlong not in ("refuse", "truncate"):
        problems.append(Problem("overlong", overlong, "'refuse' or 'truncate'"))
    if max_length is not None and max_length < 2:
        problems.append(Problem("max_length", max_length, "at least 2: the first token is never predicted"))
    if problems:
        raise UsageError(*problems)


def _length_problem(where: str, ids: Sequence[int], max_length: int | None, overlong: str) -> Problem | None:
    if max_length is None or len(ids) <= max_length or overlong == "truncate":
        return None
    remedy = "Raise max_length, or cut such rows with overlong='truncate'."
    return Problem(where, f"{len(ids)} tokens", f"at most max_length={max_length}", remedy)


def _encode(where: str, row: Any, tokenizer: Any, train_on: str) -> Encoded:
    """Return token ids and labels of one row. Raises `DataError`."""
    if not isinstance(row, Mapping):
        raise DataError(
            Problem(where, row, "a dict", "A row is {'messages': [...]}, {'prompt', 'completion'} or {'text'}.")
        )
    kind = next((kind for kind, fields in KINDS.items() if all(field in row for field in fields)), None)
    if kind is None:
        expected = "'messages', or 'prompt' and 'completion', or 'text'"
        raise DataError(Problem(f"{where}, fields", sorted(map(str, row)), expected, _field_remedy(row)))
    if kind == "messages":
        return _encode_messages(where, row, tokenizer, train_on)
    if kind == "text":
        return _encode_text(where, row["text"], tokenizer, train_on)
    return _encode_pair(where, row, tokenizer, train_on)


def _field_remedy(row: Mapping[str, Any]) -> str:
    """Return what to do about a row whose fields are no kind that can be rendered."""
    if {"chosen", "rejected"} <= set(row):
        return "Rows with 'chosen' and 'rejected' are preferences; fine-tune on the chosen answers as 'messages'."
    if "input_ids" in row:
        return "Token ids need no rendering: pass them to sft or the trainer as a datasets.Dataset."
    known = [name for fields in KINDS.values() for name in fields]
    halves = [fields for fields in KINDS.values() if set(fields) & set(row)]
    missing = next((name for fields in halves for name in fields if name not in row), "")
    near = next((hint for name in row if name not in known for hint in [did_you_mean(str(name), known)] if hint), "")
    return near or (f"It has no {missing!r}." if missing else "")


def _encode_text(where: str, text: Any, tokenizer: Any, train_on: str) -> Encoded:
    _need_text(f"{where}, text", text)
    if train_on != "all":
        remedy = "A plain text has no turns: train on all of it with train_on='all'."
        raise DataError(Problem(f"{where}, text", _short(text), f"a row with turns for train_on={train_on!r}", remedy))
    ids = _with_eos(_tokens(tokenizer, text, start=True), tokenizer, where)
    return ids, list(ids)


def _encode_pair(where: str, row: Mapping[str, Any], tokenizer: Any, train_on: str) -> Encoded:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        _need_text(f"{where}, prompt", prompt)
        _need_text(f"{where}, completion", completion)
        given = _tokens(tokenizer, prompt, start=True)
        learnt = _with_eos(_tokens(tokenizer, completion, start=False), tokenizer, where)
        ids = given + learnt
        return ids, list(ids) if train_on == "all" else [IGNORE] * len(given) + learnt
    _need_messages(f"{where}, prompt", prompt)
    _need_messages(f"{where}, completion", completion)
    given = _render(where, prompt, row, tokenizer, add_generation_prompt=True)["input_ids"]
    ids = _render(where, [*prompt, *completion], row, tokenizer)["input_ids"]
    if ids[: len(given)] != given:
        remedy = "The template renders the prompt otherwise alone than in the whole; use 'messages' rows instead."
        raise DataError(
            Problem(f"{where}, prompt", _short(prompt), "a prompt that the whole conversation starts with", remedy)
        )
    _need_stop(where, ids, [(len(given), len(ids))], tokenizer)
    return ids, list(ids) if train_on == "all" else [IGNORE] * len(given) + ids[len(given) :]


def _encode_messages(where: str, row: Mapping[str, Any], tokenizer: Any, train_on: str) -> Encoded:
    messages = row["messages"]
    _need_messages(f"{where}, messages", messages)
    if train_on == "all":
        ids = _render(where, messages, row, tokenizer)["input_ids"]
        return ids, list(ids)
    if not any(message["role"] == "assistant" for message in messages):
        roles = [message["role"] for message in messages]
        raise DataError(Problem(f"{where}, messages", roles, "an assistant turn to learn", "Or train_on='all'."))
    if not GENERATION.search(_template(tokenizer, where)):
        remedy = (
            "Give tokenizer.chat_template a version with {% generation %} ... {% endgeneration %} around assistant "
            "turns (trl.chat_template_utils.get_training_chat_template has some), or use train_on='all'."
        )
        raise DataError(Problem("tokenizer.chat_template", "no {% generation %} markers", "markers", remedy))
    rendered = _render(where, messages, row, tokenizer, return_assistant_tokens_mask=True)
    ids, spans = rendered["input_ids"], _spans(rendered["assistant_masks"])
    if not spans:
        remedy = "The template's {% generation %} block renders nothing for it."
        raise DataError(Problem(f"{where}, messages", _short(messages), "an assistant turn that leaves tokens", remedy))
    spans = _need_stop(where, ids, spans if train_on == "assistant" else spans[-1:], tokenizer)
    labels = [IGNORE] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return ids, labels


def _need_stop(
    where: str, ids: Sequence[int], spans: Sequence[tuple[int, int]], tokenizer: Any
) -> list[tuple[int, int]]:
    """Return the spans with the stop token that ends each turn in them. Raises `DataError` where a turn has none."""
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    whole = []
    for number, (start, end) in enumerate(spans):
        if special.intersection(ids[max(start, end - 2) : end]):
            whole.append((start, end))
        elif end < len(ids) and ids[end] in special:
            whole.append((start, end + 1))
        else:
            remedy = "End the turn with the EOS token in the chat template, or the model never learns to stop."
            tail = tokenizer.decode(ids[max(start, end - 8) : end + 1])
            raise DataError(Problem(f"{where}, assistant turn {number}", tail, "a stop token at its end", remedy))
    return whole


def _spans(mask: Sequence[int]) -> list[Span]:
    """Return (start, end) of every run of ones."""
    padded = [0, *mask, 0]
    edges = [index for index in range(len(mask) + 1) if padded[index] != padded[index + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _render(where: str, messages: Any, row: Mapping[str, Any], tokenizer: Any, **options: Any) -> Mapping[str, Any]:
    from jinja2.exceptions import TemplateError

    _template(tokenizer, where)
    extra = row.get("chat_template_kwargs") or {}
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tools=row.get("tools"),
            tokenize=True,
            return_dict=True,
            tokenizer_kwargs={"verbose": False},  # how long rows may be is our question, see max_length
            **options,
            **extra,
        )
    except TemplateError as error:
        remedy = f"The chat template says: {error}"
        raise DataError(
            Problem(f"{where}, messages", _short(messages), "messages that the template takes", remedy)
        ) from error


def _template(tokenizer: Any, where: str) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        remedy = "Set tokenizer.chat_template, or give rows with 'prompt' and 'completion' or 'text'."
        raise DataError(Problem("tokenizer.chat_template", template, f"a chat template to render {where} with", remedy))
    return template if isinstance(template, str) else str(template)


def _tokens(tokenizer: Any, text: str, *, start: bool) -> list[int]:
    """Return the token ids of `text`; the tokenizer's own start tokens are added once, at a row's start."""
    bos = getattr(tokenizer, "bos_token", None)
    doubled = start and bos is not None and text.startswith(bos)
    return list(tokenizer(text, add_special_tokens=start and not doubled, verbose=False)["input_ids"])


def _with_eos(ids: list[int], tokenizer: Any, where: str) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise DataError(
            Problem("tokenizer.eos_token", None, f"an EOS token to end {where} with", "Set tokenizer.eos_token.")
        )
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def _need_text(where: str, text: Any) -> None:
    if not isinstance(text, str):
        raise DataError(Problem(where, text, "a text (str)"))
    if not text.strip():
        raise DataError(Problem(where, text, "a text that is not empty", "Remove the row or give it text."))


def _need_messages(where: str, messages: Any) -> None:
    """Raise `DataError` with every mistake of a list of messages."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(Problem(where, messages, "a list of {'role', 'content'}"))
    problems = [] if messages else [Problem(where, messages, "at least one message", "Remove the row.")]
    for number, message in enumerate(messages):
        place = f"{where}[{number}]"
        if not isinstance(message, Mapping):
            problems.append(Problem(place, message, "a dict with 'role' and 'content'"))
            continue
        if not isinstance(message.get("role"), str):
            problems.append(Problem(f"{place}.role", message.get("role"), "a text such as 'user' or 'assistant'"))
        calls = message.get("tool_calls")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and calls) and not isinstance(content, list):
            problems.append(Problem(f"{place}.content", content, "a text (str)"))
        elif message.get("role") == "assistant" and content == "" and not calls:
            problems.append(Problem(f"{place}.content", content, "an answer that is not empty", "Remove the turn."))
    if problems:
        raise DataError(*problems)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
