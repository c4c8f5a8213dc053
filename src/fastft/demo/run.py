"""The demonstration: the shipped model in 4 bits learns from a small instruction set, before the reader's eyes."""

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from attrs import asdict, frozen

from fastft.demo import MODEL_FOLDER, evaluate, lesson, tasks

Say = Callable[[str], None]
BATCH = 16
LENGTH = 96  # tokens; every row of the lesson is shorter, and one length means one compilation
BAR = 40


@frozen
class DemoResult:
    """What the demonstration showed. Accuracies are shares of held-out sums; `losses` are (step, loss) pairs."""

    question: str
    answer_before: str
    answer_after: str
    accuracy_before: float
    accuracy_after: float
    sums: int
    losses: tuple[tuple[int, float], ...]
    backend: str
    seconds: float
    folder: str
    loss_curve: str
    record: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self) | {"losses": [list(pair) for pair in self.losses]}


def run_demo(
    output_dir: str | Path = "run/demo",
    *,
    steps: int = 80,
    sums: int = 40,
    backend: str | None = None,
    chat: bool = False,
    seed: int = 0,
    say: Say | None = None,
) -> DemoResult:
    """Fine-tune the shipped model with QLoRA on a small instruction set, and show answers before and after.

    Writes the adapter, the loss curve and the run record into `output_dir`. `sums` held-out sums are asked before and
    after; `backend` is as for `fastft.compile`, by default "inductor" where a C++ compiler or a GPU is found, else
    "aot_eager". With `chat` the reader may talk to the result on the terminal. `say` takes each piece of text to show,
    by default standard output. Takes about half a minute on two cores.
    """
    import fastft

    say = say or _print
    began = time.monotonic()
    say("Loading fastft's demo model: a Llama of 4.5 million parameters, in 4 bits (NF4) ...\n")
    model, tokenizer = fastft.load(MODEL_FOLDER, quant="nf4")
    say(f"\nQuestion: {lesson.QUESTION}\nBefore:   ")
    before = _answer(model, tokenizer, lesson.QUESTION, say)
    accuracy_before = _accuracy(model, tokenizer, sums)
    say(f"{_right(accuracy_before, sums)} right before training.\n")

    model = fastft.add_lora(model, r=16, alpha=32, seed=seed)
    rows = lesson.rows(steps * BATCH, seed)
    example = next(row["messages"] for row in rows if " + " in row["messages"][1]["content"])
    say(f"\nTeaching it {len(rows)} examples like this one:\n  {example[0]['content']}\n  {example[1]['content']}\n")
    train = fastft.chat_dataset(rows, tokenizer)
    backend, why = (backend, "as asked") if backend else choose_backend(model.device.type)
    say(f"Training LoRA adapters for {steps} steps; the layers are compiled first with {backend} ({why}) ...\n")
    fastft.compile(model, backend=backend)
    result = fastft.sft(
        model,
        tokenizer,
        train,
        output_dir=output_dir,
        batch_size=BATCH,
        learning_rate=2e-3,
        schedule="cosine",
        warmup_steps=3,
        pad_to_multiple_of=LENGTH,
        log_every=max(1, min(5, steps // 2)),  # two losses at least, to see one fall
        save_strategy="no",
        seed=seed,
    )
    say("\n" + loss_bars(result.losses) + "\n")

    say(f"\nQuestion: {lesson.QUESTION}\nAfter:    ")
    after = _answer(model, tokenizer, lesson.QUESTION, say)
    accuracy_after = _accuracy(model, tokenizer, sums)
    say(f"{_right(accuracy_after, sums)} right after training (before: {round(accuracy_before * sums)}).\n")
    folder = Path(result.output_dir)
    shown = DemoResult(
        question=lesson.QUESTION,
        answer_before=before,
        answer_after=after,
        accuracy_before=accuracy_before,
        accuracy_after=accuracy_after,
        sums=sums,
        losses=result.losses,
        backend=backend,
        seconds=round(time.monotonic() - began, 1),
        folder=str(folder),
        loss_curve=str(folder / "loss.png"),
        record=str(folder / "run.json"),
    )
    say(f"\nLoss curve: {shown.loss_curve}\nRun record: {shown.record}\n")
    say(f"The adapter is in {folder}; load it with fastft.load({str(folder)!r}). All took {shown.seconds:.0f} s.\n")
    if chat:
        talk(model, tokenizer, say)
    return shown


def choose_backend(device: str) -> tuple[str, str]:
    """Return the backend to compile with, and why: Inductor needs a C++ compiler on a CPU."""
    if device == "cuda":
        return "inductor", "for the GPU"
    compiler = next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)
    return ("inductor", f"with {compiler}") if compiler else ("aot_eager", "no C++ compiler is installed")


def loss_bars(losses: tuple[tuple[int, float], ...]) -> str:
    """Draw the logged losses as lines of text; the bars are logarithmic, from the smallest loss to the largest."""
    logs = [math.log(max(loss, 1e-6)) for _, loss in losses]
    span = max(max(logs) - min(logs), 1e-6)
    bars = ["#" * (1 + round(BAR * (log - min(logs)) / span)) for log in logs]
    return "\n".join(f"  step {step:4d}  loss {loss:7.4f}  {bar}" for (step, loss), bar in zip(losses, bars))


def talk(model: Any, tokenizer: Any, say: Say, lines: Iterator[str] | None = None) -> None:
    """Chat on the terminal until an empty line or the end of the input; old turns go when there is no more room."""
    say(
        "\nNow talk to it (an empty line ends). It is tiny: it adds two-digit numbers told as stories, and makes up\n"
        "most of the rest. Try: Tom has 31 books. Mia gives him 22 more books. How many books does Tom have now?\n"
    )
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
        answer = _streamed(model, tokenizer, history, say)
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


def _print(text: str) -> None:
    print(text, end="", file=sys.stdout, flush=True)


def _answer(model: Any, tokenizer: Any, question: str, say: Say) -> str:
    return _streamed(model, tokenizer, [{"role": "user", "content": question}], say)


def _streamed(model: Any, tokenizer: Any, history: list[tasks.Message], say: Say) -> str:
    from fastft import generate

    pieces = []
    for piece in generate(model, tokenizer, history, max_new_tokens=60, stream=True):
        say(piece)
        pieces.append(piece)
    say("\n")
    return "".join(pieces).strip()


def _accuracy(model: Any, tokenizer: Any, count: int, seed: int = 0) -> float:
    """Share of held-out sums, told as stories, that are answered rightly."""
    from fastft import generate

    random, pairs = Random(seed), tasks.held_out_pairs(count, seed)
    asked = [[{"role": "user", "content": lesson.story(a, b, random)[0]}] for a, b in pairs]
    given = generate(model, tokenizer, asked, max_new_tokens=40)
    return evaluate.share_right(given, [a + b for a, b in pairs])


def _right(accuracy: float, sums: int) -> str:
    return f"Of {sums} sums it has never seen, told as stories, {round(accuracy * sums)} are"
