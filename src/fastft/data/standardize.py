"""Other people's conversations to `{"role", "content"}`, and columns merged into conversations."""

import random
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from attrs import frozen

from fastft.data.change import change_rows, turns_feature
from fastft.data.check import message_problems, refuse_empty, text_problem
from fastft.data.convert import CHAT_KEYS, present, standard_messages
from fastft.data.kinds import CONVERSATIONS, ROLE_OF
from fastft.data.recognise import recognise
from fastft.errors import DataError, Problem, UsageError, did_you_mean, short

Row = dict[str, Any]


def standardize_data_formats(
    dataset: Any,
    tokenizer: Any = None,
    aliases_for_system: Sequence[str] = ("system",),
    aliases_for_user: Sequence[str] = ("user", "human", "input"),
    aliases_for_assistant: Sequence[str] = ("gpt", "assistant", "output"),
    batch_size: int = 1000,
    num_proc: int | None = None,
) -> Any:
    """Return the data set with its turns as `{"role", "content"}`, in the column they are in (`conversations`, say).

    Turns may be `from`/`value`, `role`/`content` and the like. The aliases are names of a role in the data, besides the
    usual ones; other fields of a turn are kept. For a processor (a `tokenizer` that also reads images) contents become
    lists of parts. A list gives a list, a `Dataset` a mapped one, an `IterableDataset` one that converts as it is read.

    Raises `DataError` for rows that are no conversations, and for every turn of an unknown role or without text.
    """
    recognised = recognise(dataset)
    if recognised.kind not in ("messages", "sharegpt"):
        remedy = "fastft.to_sharegpt merges columns into conversations."
        raise DataError(Problem("dataset", recognised.statement, f"a column of turns: {CONVERSATIONS}", remedy))
    given = {"system": aliases_for_system, "user": aliases_for_user, "assistant": aliases_for_assistant}
    given = {role: (names,) if isinstance(names, str) else names for role, names in given.items()}
    roles = {**ROLE_OF, **{name.lower(): role for role, names in given.items() for name in names}}
    column, keys = recognised.fields["messages"], recognised.keys or CHAT_KEYS
    features = getattr(dataset, "features", None) or {}
    change = partial(
        _standardised,
        column=column,
        keys=keys,
        roles=roles,
        parts=getattr(tokenizer, "image_processor", None) is not None,
        feature=features.get(column),
    )
    made = {**features, column: turns_feature(features.get(column), keys)}
    return change_rows(dataset, change, made, (), num_proc, batch_size)


standardize_sharegpt = standardize_data_formats


def _standardised(
    where: str,
    row: Mapping[str, Any],
    column: str,
    keys: tuple[str, str],
    roles: Mapping[str, str],
    parts: bool,
    feature: Any,
) -> tuple[Row, list[Problem]]:
    """Return a row whose turns have the usual names."""
    if not isinstance(row, Mapping):
        return {}, [Problem(where, short(row), "a dict")]
    if column not in row:
        return {}, [Problem(f"{where}, fields", short(sorted(map(str, row))), repr(column))]
    place, turns = f"{where}, {column}", present(row[column], feature)
    problems = message_problems(place, turns, keys)
    if problems:
        return {}, problems
    turns, problems = standard_messages(place, turns, keys, roles)
    if parts:
        turns = [
            {**turn, "content": [{"type": "text", "text": turn["content"]}]}
            if isinstance(turn.get("content"), str)
            else turn
            for turn in turns
        ]
    return {**row, column: turns}, problems


def to_sharegpt(
    dataset: Any,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> Any:
    """Merge columns into conversations: `conversations`, turns of `from` ("human", "gpt") and `value`.

    * `merged_prompt`: the user's turn, with `{column}` where a column's value goes. A part in `[[...]]` is left out for
      rows in which a column named in it is empty. `{{` and `}}` are braces. Empty: `merged_column_name` as it is.
    * `merged_column_name`: under which the merged text is kept if `remove_unused_columns` is False.
    * `output_column_name`: the assistant's turn.
    * `conversation_extension`: so many rows are joined to one conversation, each with others drawn by a permutation
      from `random_state`; there are as many conversations as rows, and each row is in that many of them.

    Raises `UsageError` for columns that are not there and a template that is not closed, `DataError` for empty cells
    outside `[[...]]` and for rows that are conversations already.
    """
    columns = list(
        getattr(dataset, "column_names", None) or dict.fromkeys(name for row in _first(dataset) for name in row)
    )
    _refuse_conversations(columns)
    template = _template(merged_prompt or f"{{{merged_column_name}}}")
    _check_columns(template, columns, output_column_name, merged_prompt)
    change = partial(
        _merged,
        template=template,
        merged=merged_column_name,
        output=output_column_name,
        keep=not remove_unused_columns,
    )
    features = _merged_features(dataset, None if remove_unused_columns else merged_column_name)
    made = change_rows(dataset, change, features, columns if remove_unused_columns else ())
    return _extended(made, conversation_extension, random_state)


def _first(dataset: Any) -> list[Mapping[str, Any]]:
    """Return the first rows of a list or a stream without column names."""
    if hasattr(dataset, "take"):
        return [dict(row) for row in dataset.take(100)]
    if not isinstance(dataset, Sequence) or isinstance(dataset, str):
        raise DataError(Problem("dataset", short(dataset), "a list of dicts, or a datasets.Dataset"))
    refuse_empty(dataset)
    return [row for row in dataset[:100] if isinstance(row, Mapping)]


def _refuse_conversations(columns: Sequence[str]) -> None:
    there = [name for name in columns if name in ("conversations", "messages")]
    if there:
        remedy = "They are conversations already: fastft.standardize_sharegpt gives them the usual names."
        raise DataError(Problem("dataset", there, "columns to merge", remedy))


# ---- the template of merged_prompt


@frozen
class _Part:
    """A piece of the template: texts and, between them, columns; optional ones go if a column is empty."""

    texts: tuple[str, ...]
    columns: tuple[str, ...]
    optional: bool


def _template(text: str) -> list[_Part]:
    """Return the pieces of a merged prompt. Raises `UsageError` for brackets that are not closed."""
    parts = []
    for number, piece in enumerate(re.split(r"\[\[(.*?)\]\]", text, flags=re.DOTALL)):
        if number % 2 == 0 and ("[[" in piece or "]]" in piece):
            raise UsageError(Problem("merged_prompt", short(text), "every [[ closed by ]]"))
        # a name in braces; doubled braces are none
        pieces = re.split(r"(?<!\{)\{([^{}]+)\}(?!\})", piece)
        texts = tuple(part.replace("{{", "{").replace("}}", "}") for part in pieces[::2])
        if number % 2 and not pieces[1::2]:
            raise UsageError(Problem("merged_prompt", f"[[{short(piece)}]]", "a {column} in what may be left out"))
        if piece:
            parts.append(_Part(texts, tuple(pieces[1::2]), bool(number % 2)))
    return parts


def _check_columns(template: Sequence[_Part], columns: Sequence[str], output: str, prompt: str) -> None:
    named = [name for part in template for name in part.columns]
    problems = []
    if not named:
        problems.append(Problem("merged_prompt", short(prompt), "at least one {column}"))
    for argument, name in [*(("merged_prompt", name) for name in named), ("output_column_name", output)]:
        if name not in columns:
            expected = f"one of the columns {short(sorted(columns), 200)}"
            where = "merged_column_name" if argument == "merged_prompt" and not prompt else argument
            problems.append(Problem(where, name, expected, did_you_mean(name, columns)))
    if problems:
        raise UsageError(*problems)


def _merged(
    where: str, row: Mapping[str, Any], template: Sequence[_Part], merged: str, output: str, keep: bool
) -> tuple[Row, list[Problem]]:
    """Return a row as one conversation of two turns."""
    if not isinstance(row, Mapping):
        return {}, [Problem(where, short(row), "a dict")]
    problems, asked = [], []
    for part in template:
        if part.optional and any(row.get(name) in (None, "") for name in part.columns):
            continue
        values = []
        for name in part.columns:
            value = row.get(name)
            value = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
            problem = text_problem(f"{where}, {name}", value)
            problems.extend([problem] if problem else [])
            values.append(value)
        if not problems:
            asked.extend(text + value for text, value in zip(part.texts, [*values, ""], strict=True))
    answer = row.get(output)
    problem = text_problem(f"{where}, {output}", answer)
    problems.extend([problem] if problem else [])
    if problems:
        return {}, problems
    turns = [{"from": "human", "value": "".join(asked)}, {"from": "gpt", "value": answer}]
    return {**({**row, merged: "".join(asked)} if keep else {}), "conversations": turns}, []


def _merged_features(dataset: Any, kept: str | None) -> dict[str, Any]:
    """Return the features of conversations, beside those that the data set has and `kept` if they stay."""
    from datasets import List, Value

    text = Value("string")
    there = {} if kept is None else {**(getattr(dataset, "features", None) or {}), kept: text}
    return {**there, "conversations": List({"from": text, "value": text})}


def _extended(dataset: Any, size: int, seed: int) -> Any:
    """Join each conversation with `size` - 1 others, drawn without repetition."""
    if size < 1 or isinstance(size, bool):
        raise UsageError(Problem("conversation_extension", size, "at least 1"))
    if size == 1:
        return dataset
    if not hasattr(dataset, "__len__"):
        remedy = "A stream has no rows to draw from: make it a Dataset, or leave conversation_extension at 1."
        raise UsageError(Problem("conversation_extension", size, "1 for a stream", remedy))
    if size > len(dataset):
        raise UsageError(Problem("conversation_extension", size, f"at most the number of rows, {len(dataset)}"))
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    place = {index: number for number, index in enumerate(order)}
    picks = [[order[(place[index] + step) % len(order)] for index in range(len(order))] for step in range(size)]
    if not isinstance(dataset, list):
        return _joined(dataset, picks)
    turns = [row["conversations"] for row in dataset]
    return [
        {**row, "conversations": [turn for pick in picks for turn in turns[pick[index]]]}
        for index, row in enumerate(dataset)
    ]


def _joined(dataset: Any, picks: Sequence[Sequence[int]]) -> Any:
    """Return the data set with the conversations of the rows that are picked for each row, end to end."""
    from datasets import concatenate_datasets

    names = [f"conversations {number}" for number in range(len(picks))]
    column = dataset.select_columns("conversations")
    parts = [
        column.select(pick).flatten_indices().rename_column("conversations", name)
        for pick, name in zip(picks, names, strict=True)
    ]
    wide = concatenate_datasets([dataset.remove_columns("conversations"), *parts], axis=1)
    return wide.map(_end_to_end, fn_kwargs={"names": names}, remove_columns=names, features=dataset.features)


def _end_to_end(row: Mapping[str, Any], names: Sequence[str]) -> Row:
    return {"conversations": [turn for name in names for turn in row[name]]}
