"""What every demonstration opens and closes with: the shipped model, its answers before and after, where all lies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from attrs import frozen

from fastft.demo import MODEL_FOLDER, terminal
from fastft.demo.terminal import Say


@frozen
class Subject:
    """What a demonstration teaches: a `question`, held-out sums, in words that `wording` names, and what to talk about.

    `accuracy` takes model, tokenizer and a number of sums, and returns the share that is answered rightly.
    """

    question: str
    about: str
    wording: str
    accuracy: Callable[[Any, Any, int], float]


@frozen
class Seen:
    """What the model knows at one time: its answer to the question, and the share of `sums` that it gets right."""

    answer: str
    accuracy: float
    sums: int

    @property
    def right(self) -> int:
        """Return how many sums are right."""
        return round(self.accuracy * self.sums)


def begin(subject: Subject, sums: int, seed: int, say: Say) -> tuple[Any, Any, Seen]:
    """Load the shipped model in 4 bits, see what it knows, and return it with a new adapter, the tokenizer and that."""
    import fastft

    say("Loading fastft's demo model: a Llama of 4.5 million parameters, in 4 bits (NF4) ...\n")
    model, tokenizer = fastft.load(MODEL_FOLDER, quant="nf4")
    before = see(model, tokenizer, subject, sums, say)
    return fastft.add_lora(model, r=16, alpha=32, seed=seed), tokenizer, before


def see(model: Any, tokenizer: Any, subject: Subject, sums: int, say: Say, before: Seen | None = None) -> Seen:
    """Say and return what the model knows; `before` is what it knew before training, None if that is now."""
    say(f"\nQuestion: {subject.question}\n{'After:' if before else 'Before:':<10}")
    answer = terminal.answer(model, tokenizer, subject.question, say)
    seen = Seen(answer, subject.accuracy(model, tokenizer, sums), sums)
    when = f"after training (before: {before.right})" if before else "before training"
    say(f"Of {sums} sums it has never seen, {subject.wording}, {seen.right} are right {when}.\n")
    return seen


def end(model: Any, tokenizer: Any, subject: Subject, folder: Path, seconds: float, chat: bool, say: Say) -> None:
    """Say where the adapter is and how long all took; with `chat` let the reader talk to the result."""
    say(f"The adapter is in {folder}; load it with fastft.load({str(folder)!r}). All took {seconds:.0f} s.\n")
    if chat:
        terminal.talk(model, tokenizer, subject.about, say)
