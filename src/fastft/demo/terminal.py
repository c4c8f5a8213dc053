"""The demonstrations on the terminal: what they say, answers as they are made, and talking to the result."""

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

from fastft.demo import tasks

Say = Callable[[str], None]
BAR = 40


def show(text: str) -> None:
    """Write to standard output at once."""
    print(text, end="", file=sys.stdout, flush=True)


def answer(model: Any, tokenizer: Any, question: str, say: Say) -> str:
    """Ask one question, say the answer while it is made, and return it."""
    return streamed(model, tokenizer, [{"role": "user", "content": question}], say)


def streamed(model: Any, tokenizer: Any, history: list[tasks.Message], say: Say) -> str:
    """Say the answer to a conversation while it is made, and return it."""
    from fastft import generate

    pieces = []
    for piece in generate(model, tokenizer, history, max_new_tokens=60, stream=True):
        say(piece)
        pieces.append(piece)
    say("\n")
    return "".join(pieces).strip()


def loss_bars(losses: tuple[tuple[int, float], ...]) -> str:
    """Draw the logged losses as lines of text; the bars are logarithmic, from the smallest loss to the largest."""
    logs = [math.log(max(loss, 1e-6)) for _, loss in losses]
    span = max(max(logs) - min(logs), 1e-6)
    bars = ["#" * (1 + round(BAR * (log - min(logs)) / span)) for log in logs]
    return "\n".join(f"  step {step:4d}  loss {loss:7.4f}  {bar}" for (step, loss), bar in zip(losses, bars))


def talk(model: Any, tokenizer: Any, about: str, say: Say, lines: Iterator[str] | None = None) -> None:
    """Chat on the terminal until an empty line or the end of the input; old turns go when there is no more room.

    `about` says what the model can do, and what to try.
    """
    say(f"\nNow talk to it (an empty line ends). {about}\n")
    history: list[tasks.Message] = []
    for line in lines if lines is not None else _lines():
        if not line.strip():
            break
        history.append({"role": "user", "content": line.strip()})
        while len(history) > 1 and _length(tokenizer, history) > tokenizer.model_max_length - 100:
            history = history[2:]
        if _length(tokenizer, history) > tokenizer.model_max_length - 100:
            say(f"That is too long: the model has room for {tokenizer.model_max_length} tokens.\n")
            history = []
            continue
        answer = streamed(model, tokenizer, history, say)
        history.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _length(tokenizer: Any, history: list[tasks.Message]) -> int:
    return len(tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=True)["input_ids"])
