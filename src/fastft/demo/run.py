"""The demonstration: the shipped model in 4 bits learns from a small instruction set, before the reader's eyes."""

import shutil
import time
from pathlib import Path
from random import Random
from typing import Any

from attrs import asdict, frozen

from fastft.demo import before_after, evaluate, lesson, tasks, terminal
from fastft.demo.before_after import Subject
from fastft.demo.terminal import Say

BATCH = 16
FOLDER = "run/demo"
LENGTH = 96  # tokens; every row of the lesson is shorter, and one length means one compilation


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

    def complaint(self) -> str | None:
        """Say what did not go as it should, None if all did."""
        first, last = self.losses[0][1], self.losses[-1][1]
        return None if last < first else f"the loss did not fall: {first:.4f} at first, {last:.4f} at last"


def run_demo(
    output_dir: str | Path = FOLDER,
    *,
    steps: int = 80,
    sums: int = 40,
    backend: str | None = None,
    resume: bool = False,
    chat: bool = False,
    seed: int = 0,
    say: Say | None = None,
) -> DemoResult:
    """Fine-tune the shipped model with QLoRA on a small instruction set, and show answers before and after.

    Writes the adapter, the loss curve and the run record into `output_dir`. `sums` held-out sums are asked before and
    after; `backend` is as for `fastft.compile`, by default "inductor" where a C++ compiler or a GPU is found, else
    "aot_eager". `resume` goes on with a demonstration that was interrupted. With `chat` the reader may talk to the
    result on the terminal. `say` takes each piece of text to show, by default standard output. Takes about half a
    minute on two cores.
    """
    import fastft

    say = say or terminal.show
    began = time.monotonic()
    subject = Subject(lesson.QUESTION, lesson.ABOUT, "told as stories", _accuracy)
    model, tokenizer, before = before_after.begin(subject, sums, seed, say)
    rows = lesson.rows(steps * BATCH, seed)
    example = next(row["messages"] for row in rows if " + " in row["messages"][1]["content"])
    say(f"\nTeaching it {len(rows)} examples like this one:\n  {example[0]['content']}\n  {example[1]['content']}\n")
    train = fastft.chat_dataset(rows, tokenizer)
    backend, why = (backend, "as asked") if backend else choose_backend(model.device.type)
    say(f"Training LoRA adapters for {steps} steps; the layers are compiled first with {backend} ({why}) ...\n")
    fastft.compile(model, backend=backend)
    result = _train(model, tokenizer, train, output_dir, steps, resume, seed)
    say("\n" + terminal.loss_bars(result.losses) + "\n")

    after = before_after.see(model, tokenizer, subject, sums, say, before)
    folder = Path(result.output_dir)
    shown = DemoResult(
        question=subject.question,
        answer_before=before.answer,
        answer_after=after.answer,
        accuracy_before=before.accuracy,
        accuracy_after=after.accuracy,
        sums=sums,
        losses=result.losses,
        backend=backend,
        seconds=round(time.monotonic() - began, 1),
        folder=str(folder),
        loss_curve=str(folder / "loss.png"),
        record=str(folder / "run.json"),
    )
    say(f"\nLoss curve: {shown.loss_curve}\nRun record: {shown.record}\n")
    before_after.end(model, tokenizer, subject, folder, shown.seconds, chat, say)
    return shown


def _train(model: Any, tokenizer: Any, train: Any, output_dir: str | Path, steps: int, resume: bool, seed: int) -> Any:
    from fastft import sft

    return sft(
        model,
        tokenizer,
        train,
        output_dir=output_dir,
        resume=resume,
        batch_size=BATCH,
        learning_rate=2e-3,
        schedule="cosine",
        warmup_steps=3,
        pad_to_multiple_of=LENGTH,
        log_every=max(1, min(5, steps // 2)),  # two losses at least, to see one fall
        save_strategy="no",
        seed=seed,
    )


def choose_backend(device: str) -> tuple[str, str]:
    """Return the backend to compile with, and why: Inductor needs a C++ compiler on a CPU."""
    if device == "cuda":
        return "inductor", "for the GPU"
    compiler = next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)
    return ("inductor", f"with {compiler}") if compiler else ("aot_eager", "no C++ compiler is installed")


def _accuracy(model: Any, tokenizer: Any, count: int, seed: int = 0) -> float:
    """Share of held-out sums, told as stories, that are answered rightly."""
    from fastft import generate

    random, pairs = Random(seed), tasks.held_out_pairs(count, seed)
    asked = [[{"role": "user", "content": lesson.story(a, b, random)[0]}] for a, b in pairs]
    given = generate(model, tokenizer, asked, max_new_tokens=40)
    return evaluate.share_right(given, [a + b for a, b in pairs])
