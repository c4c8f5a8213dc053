"""What a trainer asks of its data once they are token ids: something to learn in every row, and an end to learn."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np

from fastft.data import check, columns
from fastft.data.rendering import templates_of
from fastft.data.responses import refuse_untrained_stop
from fastft.data.training_collator import PROBED, CountingCollator, longest_document, refuse_other_labels
from fastft.errors import DataError, Problem
from fastft.state import base_model


def without_needless_cut(args: Any, rows: Any) -> Any:
    """Return `args` for TRL's preparation of `rows`, without a length where no row is longer.

    TRL would go over all rows twice, with two bars, to cut none and to drop none: what has nothing to learn is told
    and left out by `without_unlearnable`.
    """
    if args.max_length is None or not hasattr(rows, "__len__") or "input_ids" not in (rows.column_names or ()):
        return args
    if int(columns.lengths(rows).max(initial=0)) > args.max_length:
        return args
    args = copy.copy(args)
    args.max_length = None
    return args


def without_unlearnable(given: Any, made: Any, limit: int | None, allowed: float, name: str) -> Any:
    """Return prepared rows that have something to learn; say in one line each what was cut and what is left out.

    `given` are the rows before they were tokenised and cut to `limit` tokens, `made` those after it. Raises
    `DataError` if more than a share `allowed` of them has nothing to learn.
    """
    total, bearing = len(given), columns.loss_bearing(made)
    lost = total - int((bearing > 0).sum())
    check.refuse_unlearnable(lost, total, limit, allowed, f"{name} ", _unlearnable(given, limit, lost, name))
    if lost:
        print(f"fastft: {lost} of {total} rows have nothing to learn within max_length={limit}: left out.")
        made = made if (bearing > 0).all() else made.select(np.flatnonzero(bearing))
        check.refuse_empty(made, name)
    known = given if "input_ids" in given.column_names else made
    full = limit if limit is None or known is made else limit + 1
    cut = 0 if full is None else int((columns.lengths(known) >= full).sum())
    if cut:
        told = "are longer than" if known is given else "fill"
        print(f"fastft: {cut} of {total} rows {told} max_length={limit}; what is longer is cut off.")
    return made


def _unlearnable(given: Any, limit: int | None, lost: int, name: str) -> Iterator[Problem]:
    """Yield what is wrong with each of the rows that have nothing to learn; nothing where they are not these alone.

    `given` are the rows as they came, of which TRL leaves some out, and masks may say what is learnt of them.
    """
    if limit is None or not lost or "input_ids" not in given.column_names:
        return
    bearing, sizes = columns.loss_bearing(given, limit), columns.lengths(given)
    rows = np.flatnonzero(bearing == 0).tolist()
    if len(rows) == lost:
        yield from (check.nothing_left(f"{name} row {row}", int(sizes[row]), limit) for row in rows)


def check_labels(data: Any, collator: Any, processing_class: Any, refuse_without_stop: bool) -> None:
    """Refuse a collator that makes other labels than the data have, and data that never teach to stop.

    A stream is not read. Raises `DataError`.
    """
    if not hasattr(data, "__len__") or not {"input_ids", "labels"} <= set(data.column_names):
        return
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    stops = templates_of(tokenizer, "all")[1].stops
    if type(collator) is not CountingCollator:
        refuse_other_labels(collator, [data[row] for row in range(min(PROBED, len(data)))], stops)
    if refuse_without_stop:
        refuse_untrained_stop(data, stops, tokenizer, "the training data")


def refuse_beyond_positions(data: Any, model: Any, name: str) -> None:
    """Raise `DataError` if a row, or a document of packed rows, has more tokens than the model has positions.

    A stream is not read.
    """
    positions = getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)
    longest = longest_document(data)
    if positions is None or longest is None or longest <= positions:
        return
    remedy = f"Load it with fastft.load(..., max_length={longest}), which stretches them, or cut rows at {positions}."
    raise DataError(Problem(f"{name} rows", f"up to {longest} tokens", f"at most the model's {positions}", remedy))
