"""The questions of the GRPO demonstration: sums in words that the shipped model has never met.

It can add, and answers some of these by luck. Nobody shows it how; it is told only which of its answers were right.
"""

from random import Random
from typing import Any

from fastft.demo import tasks

QUESTION = "How much do 27 and 48 make?"
ABOUT = "It is tiny: it adds two-digit numbers, and makes up most of the rest. Try: Give me the total of 31 and 22."
# Of their answers sampled at temperature 1, the shipped model gets a fifth to a third right.
PHRASINGS = (
    "How much do {a} and {b} make?",
    "How much are {a} and {b} together?",
    "How much do {a} and {b} come to?",
)


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Return `count` rows of a `prompt` and its `answer` (a number), never a held-out sum."""
    random = Random(seed)
    return [_row(*tasks.training_pair(random), random) for _ in range(count)]


def held_out_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return `count` rows as `rows` does, of sums that no training contains."""
    random = Random(seed)
    return [_row(a, b, random) for a, b in tasks.held_out_pairs(count, seed)]


def _row(a: int, b: int, random: Random) -> dict[str, Any]:
    return {"prompt": random.choice(PHRASINGS).format(a=a, b=b), "answer": a + b}
