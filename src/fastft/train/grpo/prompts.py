"""Prompts for reinforcement learning: rows with a `prompt` and the columns that rewards look at."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from glob import glob
from os.path import expanduser
from pathlib import Path
from typing import Any

from fastft.data import check
from fastft.data.bars import bars_if_large
from fastft.data.control import tell_control
from fastft.data.files import told_of
from fastft.data.sources import SUFFIXES, Source, open_named
from fastft.errors import DataError, Problem, short

SHOWN = 4  # of several rows that are wrong in the same way


def prompt_datasets(given: Mapping[str, Any], tokenizer: Any, chat: bool = True) -> tuple[dict[str, Any], bool]:
    """Return the prompts of each name as a `datasets.Dataset` with a column `prompt`, and whether texts became turns.

    Prompts are texts, or rows as `fastft.load_rows` takes them; every other column stays as it is. A `prompt` is a text
    or a list of messages that ends with what is to be answered. With `chat`, and a tokenizer that has a chat template,
    a text is what the user says, and becomes a message; otherwise it is continued as it stands. Raises `DataError` with
    all rows that cannot be used, and where some become turns and others were conversations.
    """
    sources = {name: _opened(prompts, name) for name, prompts in given.items()}
    made = {name: as_dataset(source, name) for name, source in sources.items()}
    if not chat or getattr(tokenizer, "chat_template", None) is None:
        return made, False
    texts = {name: isinstance(next(iter(rows))["prompt"], str) for name, rows in made.items()}
    if len(set(texts.values())) == 2:
        told = ", ".join(f"{name}: {'texts' if are else 'conversations'}" for name, are in texts.items())
        remedy = "Rewards get completions in the form of the prompts. A text is [{'role': 'user', 'content': text}]."
        raise DataError(Problem("prompts and eval", told, "texts in both, or conversations in both", remedy))
    turned = {name: _turned(rows) if texts[name] else rows for name, rows in made.items()}
    for name, rows in turned.items():
        tell_control(rows, ["prompt"], tokenizer, name, sources[name].files)
    return turned, all(texts.values())


def _turned(rows: Any) -> Any:
    with bars_if_large(rows):
        return rows.map(_as_turn)


def each_within_length(held: Any, fit: Callable[[Any, str], tuple[Any, int]]) -> tuple[Any, int]:
    """Return prompts to evaluate, one set or a dict of them, as `fit` leaves each, and the longest; no streams."""
    several = isinstance(held, Mapping)
    sets = held if several else {"eval": held}
    fitted = {name: fit(rows, name) for name, rows in sets.items() if hasattr(rows, "__len__")}
    kept = {**sets, **{name: rows for name, (rows, _) in fitted.items()}}
    return kept if several else kept["eval"], max((longest for _, longest in fitted.values()), default=0)


def within_length(
    rows: Any, name: str, limit: int | None, sizes_of: Callable[[Sequence[Any]], list[int]]
) -> tuple[Any, int]:
    """Return the rows whose prompt has at most `limit` tokens (None: all), and the tokens of the longest of them.

    `sizes_of` returns the tokens of each of some prompts. Says how many are left out; raises `DataError` if all are.
    """
    sizes = []
    for part in rows.select_columns(["prompt"]).iter(batch_size=256):
        sizes += sizes_of(part["prompt"])
    kept = [number for number, size in enumerate(sizes) if limit is None or size <= limit]
    if not kept:
        told, allowed = f"{min(sizes)} to {max(sizes)} tokens", f"one of at most max_prompt_length={limit}"
        raise DataError(Problem(f"{name} prompts", told, allowed, "Raise max_prompt_length, or shorten the prompts."))
    if len(kept) < len(sizes):
        lost = len(sizes) - len(kept)
        print(f"fastft: {name}: {lost} of {len(sizes)} prompts are longer than max_prompt_length={limit}: left out.")
        rows = rows.select(kept)
    return rows, max(sizes[number] for number in kept)


def _opened(prompts: Any, name: str) -> Source:
    _refuse_other_than_prompts(prompts, name)
    texts = not isinstance(prompts, str | Path) and isinstance(prompts, Sequence) and bool(prompts)
    if texts and all(isinstance(prompt, str) for prompt in prompts):
        return Source([{"prompt": prompt} for prompt in prompts])
    if texts and all(isinstance(prompt, Sequence) and not isinstance(prompt, str) for prompt in prompts):
        return Source([{"prompt": list(prompt)} for prompt in prompts])
    return open_named(prompts, name).listed()


def _refuse_other_than_prompts(prompts: Any, name: str) -> None:
    """Raise `DataError` for one text that is no path or name, and for a list of what is neither a text nor a row."""
    spaced = isinstance(prompts, str) and any(map(str.isspace, prompts))
    if spaced and Path(prompts).suffix.lower() not in SUFFIXES and not glob(expanduser(prompts)):
        remedy = f"Put a single prompt into a list: {name}=[{short(prompts)!r}]."
        raise DataError(Problem(name, short(prompts), "a list of texts or rows, or the path of a file", remedy))
    if isinstance(prompts, list | tuple):
        kinds = str | Path | Mapping | Sequence
        wrong = [(number, prompt) for number, prompt in enumerate(prompts) if not isinstance(prompt, kinds)]
        problems = [
            Problem(f"{name}[{number}]", short(prompt), "a text, messages, or a row with a 'prompt'")
            for number, prompt in wrong[:SHOWN]
        ]
        more = [f"and {len(wrong) - SHOWN:,} more of {len(prompts):,} rows"] if len(wrong) > SHOWN else []
        check.refuse([*problems, *more])


def as_dataset(rows: Any, name: str) -> Any:
    """Return rows with a `prompt` as a data set; a stream stays one and is not read. Raises `DataError`."""
    from datasets import Dataset

    source = open_named(rows, name).listed()
    rows = source.rows
    listed = None if hasattr(rows, "column_names") else list(rows)
    if listed is not None:
        check.refuse_empty(listed, name)
    columns = rows.column_names if listed is None else list(dict.fromkeys(key for row in listed for key in row))
    if columns is not None and "prompt" not in columns:
        near = next(iter(get_close_matches("prompt", columns, n=1)), columns[0] if columns else "question")
        remedy = f"dataset.rename_column({near!r}, 'prompt') renames one; the other columns go to the rewards."
        raise DataError(Problem(f"{name} columns", columns, "a column 'prompt'", remedy))
    if listed is None and not hasattr(rows, "__len__"):
        return rows
    check.refuse_empty(rows, name)
    given = rows["prompt"] if listed is None else [row.get("prompt") for row in listed]
    with told_of(name, source.files):
        check.refuse(list(_row_problems(given, name)))
    return rows if listed is None else Dataset.from_list(listed)


def _row_problems(given: Sequence[Any], name: str) -> Iterator[Problem | str]:
    """Yield the mistakes of the first rows that have any, and how many more there are."""
    wrong, kinds = 0, set()
    for number, prompt in enumerate(given):
        where = f"row {number}, prompt"
        kinds.add(isinstance(prompt, str))
        problem = check.text_problem(where, prompt) if isinstance(prompt, str) else _turns_problem(where, prompt)
        if problem is None:
            continue
        wrong += 1
        if wrong <= SHOWN:
            yield problem
    if wrong > SHOWN:
        yield f"and {wrong - SHOWN:,} more of {len(given):,} rows"
    if len(kinds) == 2:
        yield Problem(f"{name} prompt", "texts and conversations", "one of the two in all rows")


def _turns_problem(where: str, messages: Any) -> Problem | None:
    problems = check.message_problems(where, messages)
    if problems:
        return problems[0]
    if messages[-1].get("role") == "assistant":
        return Problem(
            where, "a conversation that ends with the assistant", "one that ends with what is to be answered"
        )
    return None


def _as_turn(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": row["prompt"]}]}
