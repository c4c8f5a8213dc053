"""How a trainer reads rows that are not token ids: as `sft` does, with the options that TRL has for it."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from attrs import evolve, frozen

from fastft.data import check, inputs
from fastft.data.bars import bars_if_large
from fastft.data.chat import chat_dataset
from fastft.data.files import told_of
from fastft.data.kinds import PLAIN, Recognised
from fastft.data.sources import Source, open_named, open_source
from fastft.errors import DataError, Problem, UsageError, did_you_mean, short
from fastft.train.arguments import DEFAULT_FIELD, DefaultField

_LEARNT = {
    "conversation": "learnt: the assistant's turns with their stop tokens (assistant_only_loss=False: every token)",
    "completion": "learnt: the completions (completion_only_loss=False: every token)",
    "all": "learnt: every token",
}


@frozen
class Reading:
    """What a config says about rows; None is what the user has not said.

    `text_field`: the column to train on as text, whatever stands beside it; `must` says that it has to be there, also
    where it is called as the default is. `assistant_only` and `completion_only`: the config's `assistant_only_loss` and
    `completion_only_loss`. `processes`: to tokenise with. `skip`: the rows go to the collator as they are.
    `formatting`: the function that makes a row the text to train on.
    """

    text_field: str | None = None
    must: bool = False
    assistant_only: bool | None = None
    completion_only: bool | None = None
    processes: int | None = None
    skip: bool = False
    formatting: Callable[[Any], str] | None = None

    def token_ids(self, rows: Any, tokenizer: Any, name: str) -> Any:
        """Return `rows` as token ids with labels, by `chat_dataset`; one line says what they are and what is learnt.

        Token ids come back as they are. `rows` are whatever `open_source` takes or returns; errors and lines tell their
        `name`.
        Raises `DataError`, and `UsageError` for options that the rows cannot be trained with.
        """
        if self.skip or is_token_ids(rows) or _is_transformed(rows):
            return rows
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        try:
            given = self._recognised(rows)
            inputs.refuse_others(given)
            train_on, learnt = self._train_on(given.recognised.kind, name)
            about = f"{given.recognised.statement}; " if given.recognised.kind in PLAIN else ""  # else it has been said
            print(f"fastft: {name}: {about}{learnt}.")
            return chat_dataset(given, tokenizer, train_on, num_proc=self.processes)
        except DataError as error:
            error.tell(*(self._told(problem, name) for problem in error.problems))
            raise

    def column(self, source: Source, tokenizer: Any, train_on: str, name: str, alternate: bool) -> Any:
        """Return `source` as token ids with labels, made of the column `text_field` alone: a text is learnt whole.

        Turns in that column are learnt as `train_on` says. Raises `DataError`, and `UsageError` for token ids, which
        have no such column to read.
        """
        if hasattr(source.rows, "__len__"):
            check.refuse_empty(source.rows, name)
        listed = isinstance(source.rows, list) and any("input_ids" in row for row in _head(source.rows))
        if listed or is_token_ids(source.rows):
            remedy = "Leave it out, or give the rows that they were made of."
            expected = f"rows to read; {name} has token ids"
            raise UsageError(Problem("SFTConfig dataset_text_field", self.text_field, expected, remedy))
        with told_of(name, source.files):
            given = evolve(self._recognised(source), alternate=alternate)
            inputs.refuse_others(given)
            whole = given.recognised.kind == "text"
            if whole:
                print(f"fastft: {name}: {given.recognised.statement}; {_LEARNT['all']}.")
            return chat_dataset(given, tokenizer, "all" if whole else train_on, num_proc=self.processes)

    def _recognised(self, rows: Any) -> inputs.Input:
        """Return the rows as what they are: the named column as text, or what `recognise` says."""
        source = open_source(rows).listed()
        rows = source.rows
        if self.formatting is not None:
            return evolve(_formatted(rows, self.formatting), files=source.files)
        if self.text_field is None:
            return inputs.read(source)
        field, head = self.text_field, _head(rows)
        columns = list(dict.fromkeys(name for row in head for name in row))
        copied = field == DEFAULT_FIELD and not self.must  # an argument parser's copy of the default says nothing
        if copied and field not in columns:
            return inputs.read(source)
        if field not in columns:
            near = did_you_mean(field, columns) or "Leave it out, and the rows are recognised by their columns."
            raise DataError(Problem("data, dataset_text_field", field, f"one of the columns {columns}", near))
        if any(isinstance(row.get(field), list | tuple) for row in head):
            return inputs.read(source)  # turns: what the column is called is known then
        if hasattr(rows, "select_columns"):
            rows = rows.select_columns([field])
            rows = rows.with_format(None) if hasattr(rows, "__len__") else rows
        return evolve(_texts(rows, field, f"column {field!r}"), files=source.files)

    def _train_on(self, kind: str, name: str) -> tuple[str, str]:
        """Return `chat_dataset`'s `train_on` for rows of a kind, and what to say of it."""
        turns = kind in ("messages", "sharegpt")
        wrong = []
        if self.completion_only and kind not in ("prompt_completion", "instruction"):
            remedy = "Leave it out: of conversations the assistant's turns are learnt." if turns else "Leave it out."
            wrong.append(Problem(f"{name}: completion_only_loss", True, "rows with prompt and completion", remedy))
        if self.assistant_only and kind == "text":
            wrong.append(
                Problem(f"{name}: assistant_only_loss", True, "conversations; these are texts", "Leave it out.")
            )
        if self.assistant_only and kind == "prompt_completion" and self.completion_only is False:
            remedy = "Give prompt and completion as one 'messages', or leave one of the two options out."
            wrong.append(Problem(f"{name}: completion_only_loss", False, "None with assistant_only_loss", remedy))
        if wrong:
            raise UsageError(*wrong)
        if kind == "text":
            return "all", _LEARNT["all"]
        if kind == "prompt_completion":
            whole = self.completion_only is False
            return ("all", _LEARNT["all"]) if whole else ("assistant", _LEARNT["completion"])
        whole = not self.assistant_only and False in (self.assistant_only, self.completion_only)
        return ("all", _LEARNT["all"]) if whole else ("assistant", _LEARNT["conversation"])

    def _told(self, problem: Problem | str, name: str) -> Problem | str:
        """Return a problem with the name of the data, and with the trainer's own options in its remedy."""
        problem = check.named(problem, name)
        if not isinstance(problem, Problem):
            return problem
        more = ""
        if problem.where.startswith("tokenizer.chat_template"):
            more = (
                " In a trainer that is SFTConfig(assistant_only_loss=False); train_on_responses_only(trainer, "
                "instruction_part=..., response_part=...) then masks all but the answers."
            )
        elif problem.where == f"{name} columns" and isinstance(problem.value, list) and "text" in problem.value:
            more = " SFTConfig(dataset_text_field='text') trains on that column, as text."
        return evolve(problem, remedy=problem.remedy + more) if more else problem


def reading_of(args: Any, formatting_func: Any) -> Reading:
    """Return how a trainer with the config `args` reads its rows."""
    field = args.dataset_text_field
    return Reading(
        text_field=None if isinstance(field, DefaultField) or not field else field,
        assistant_only=args.assistant_only_loss,
        completion_only=args.completion_only_loss,
        processes=args.dataset_num_proc,
        skip=bool((args.dataset_kwargs or {}).get("skip_prepare_dataset")),
        formatting=formatting_func,
    )


def datasets_of(kwargs: Mapping[str, Any], reading: Reading, template: Any = None) -> dict[str, Any]:
    """Return a trainer's `train_dataset` and `eval_dataset` as data sets, each or in a dict by name.

    `datasets` are checked and otherwise left to the trainer's preparation; other rows become token ids at once.
    `template` is a chat template that the tokenizer has yet to get. Raises `DataError` and `UsageError`.
    """
    tokenizer = kwargs.get("processing_class")
    made: dict[str, Any] = {}
    if kwargs.get("train_dataset") is None:
        raise DataError(Problem("train_dataset", None, "a datasets.Dataset, a list of rows, or the path of a file"))
    for argument, name in (("train_dataset", "train"), ("eval_dataset", "eval")):
        data = kwargs.get(argument)
        if data is None:
            continue
        if name == "eval" and isinstance(data, Mapping):
            parts = {part: _dataset(rows, tokenizer, reading, template, part) for part, rows in data.items()}
            made[argument] = type(data)(parts)
        else:
            made[argument] = _dataset(data, tokenizer, reading, template, name)
    return made


def _dataset(rows: Any, tokenizer: Any, reading: Reading, template: Any, name: str) -> Any:
    from datasets import Dataset

    as_recognised = reading.text_field is None and reading.formatting is None and not reading.skip
    source = (inputs.open_named_rows if as_recognised else open_named)(rows, name).listed()
    rows = source.rows
    if hasattr(rows, "__len__"):
        check.refuse_empty(rows, name)
    if not hasattr(rows, "column_names"):
        if reading.skip or (isinstance(rows[0], Mapping) and "input_ids" in rows[0]):
            rows = Dataset.from_list(rows)
        elif tokenizer is None or template is not None:
            got = f"rows as a {type(rows).__name__}"
            remedy = (
                "datasets.Dataset.from_list(rows) makes one; or pass the tokenizer, with its template, as tokenizer=."
            )
            raise UsageError(Problem(f"{name} data", got, "a datasets.Dataset where no tokenizer is given", remedy))
        else:
            rows = reading.token_ids(source, tokenizer, name)
    if is_token_ids(rows):
        with told_of(name, source.files):
            check.check_tokenised(rows)
    return rows


def is_token_ids(rows: Any) -> bool:
    """Return whether `rows` are a data set with `input_ids`."""
    return not isinstance(rows, Mapping) and "input_ids" in (getattr(rows, "column_names", None) or ())


def _texts(rows: Any, field: str, where: str) -> inputs.Input:
    """Return rows of which one field is a text to train on."""
    sized = hasattr(rows, "__len__")
    statement = f"plain text ({where})" + (f", {len(rows):,} rows" if sized else ", a stream")
    recognised = Recognised("text", {"text": field}, statement, len(rows) if sized else None)
    return inputs.Input(rows, recognised, getattr(rows, "features", None))


def _formatted(rows: Any, function: Callable[[Any], str]) -> inputs.Input:
    """Return the texts that a `formatting_func` makes of rows, one of each. Raises `DataError` for anything else."""

    def text_of(row: Any) -> dict[str, str]:
        text = function(row)
        if not isinstance(text, str):
            remedy = "One that takes many rows is for dataset.map(function, batched=True); name the column it makes in "
            remedy += "dataset_text_field."
            raise DataError(Problem("formatting_func", short(text), "a text for one row", remedy))
        return {"text": text}

    if hasattr(rows, "map"):
        columns = rows.column_names or list(next(iter(rows), {}))
        with bars_if_large(rows):
            made = rows.map(text_of, remove_columns=columns)
    else:
        made = [text_of(row) for row in rows]
    return _texts(made, "text", "of formatting_func")


def _is_transformed(rows: Any) -> bool:
    """Return whether rows are made as they are read (`Dataset.with_transform`), which TRL refuses with what to do."""
    return hasattr(rows, "with_transform") and rows.format["type"] == "custom"


def _head(rows: Any) -> Sequence[Mapping[str, Any]]:
    """Return the first rows, as far as they are rows."""
    return [row for row in islice(iter(rows), inputs.SAMPLE) if isinstance(row, Mapping)]
