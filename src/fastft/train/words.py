"""Mistakes told in the words of who made them: the user of a function writes `batch_size`, not its config's field.

Whatever finds a mistake names fields, behind the name of the config or trainer (`SFTConfig optim`). Where names were
turned into fields, what is told of these is turned back: in one place for all mistakes, those of remedies among them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from attrs import evolve

from fastft.errors import FastftError, Problem


def in_words_of(
    owner: str,
    trainer: type,
    kind: type,
    config: Any,
    options: Mapping[str, Any],
    plain: Mapping[str, str],
    own: Mapping[str, str] | None = None,
) -> AbstractContextManager[None]:
    """Tell mistakes that leave the block as who calls the function `owner` would.

    The function has a `trainer`, and a config of the class `kind`: made of `options`, which have the names of fields or
    the `plain` ones for them, or given as `config`, whose fields are then the caller's words. `own`: arguments of the
    trainer -> those of the function.
    """
    own = own or {}
    if config is not None:
        return renamed((trainer,), owner, own)
    plainly = {field: name for name, field in plain.items() if field not in options}
    return renamed((trainer, kind), owner, {**plainly, **own})


@contextmanager
def renamed(kinds: Sequence[type], owner: str, names: Mapping[str, str]) -> Iterator[None]:
    """Tell mistakes in `kinds` that leave the block as mistakes in `owner`, what `names` has by the other name."""
    try:
        yield
    except FastftError as error:
        theirs = [kind.__name__ for kind in kinds]
        error.tell(*(_renamed(problem, theirs, owner, names) for problem in error.problems))
        raise


def _renamed(problem: Problem | str, kinds: Sequence[str], owner: str, names: Mapping[str, str]) -> Problem | str:
    if not isinstance(problem, Problem):
        return problem
    kind, _, where = problem.where.partition(" ")
    if kind not in kinds:
        return problem

    def told(text: str) -> str:
        # A whole word: none in a path, and none in quotes, which is a value.
        return re.sub(r"(?<![\w./\\'\"-])\w+(?![\w/\\'\"-]|\.\w)", lambda word: names.get(word[0], word[0]), text)

    told_where = f"{owner} {told(where)}"
    return evolve(problem, where=told_where, expected=told(problem.expected), remedy=told(problem.remedy))
