"""The demonstration of GRPO: the shipped model in 4 bits learns from rewards for its own answers, before the reader."""

import json
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from attrs import asdict, frozen

from fastft.demo import before_after, evaluate, phrasings, terminal
from fastft.demo.before_after import Subject
from fastft.demo.terminal import Say
from fastft.errors import Problem, UsageError

FOLDER = "run/demo-grpo"
QUESTIONS, ANSWERS = 8, 8  # of a step, and of each question
LEAST_STEPS = 8  # of fewer, the first and the last steps are much the same ones
ABOUT = (
    "\nNobody shows it an answer. It gives its own: one that ends with the right number earns 1, another earns 0.\n"
    "What earned more than the other answers to its question becomes likelier; what earned less, less likely.\n"
)
WINDOW = 3  # steps whose mean reward is called the first and the last; of one step it varies by 0.1


@frozen
class GrpoDemoResult:
    """What the demonstration showed.

    Accuracies are shares of held-out sums, greedy. `rewards`, `kl` and `lengths` (tokens) are (step, mean) pairs;
    `reward_first` and `reward_last` are the means of the first and the last `WINDOW` steps.
    """

    question: str
    answer_before: str
    answer_after: str
    accuracy_before: float
    accuracy_after: float
    sums: int
    rewards: tuple[tuple[int, float], ...]
    kl: tuple[tuple[int, float], ...]
    lengths: tuple[tuple[int, float], ...]
    reward_first: float
    reward_last: float
    engine: str
    seconds: float
    folder: str
    curve: str
    completions: str
    record: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        curves = {name: [list(pair) for pair in getattr(self, name)] for name in ("rewards", "kl", "lengths")}
        return asdict(self) | curves

    def complaint(self) -> str | None:
        """Say what did not go as it should, None if all did."""
        if self.reward_last > self.reward_first:
            return None
        return f"the mean reward did not rise: {self.reward_first:.3f} at first, {self.reward_last:.3f} at last"


def run_grpo_demo(
    output_dir: str | Path = FOLDER,
    *,
    steps: int = 32,
    sums: int = 40,
    engine: str = "auto",
    resume: bool = False,
    chat: bool = False,
    seed: int = 0,
    say: Say | None = None,
) -> GrpoDemoResult:
    """Train the shipped model in 4 bits with GRPO on sums in words it has never met, and show answers before and after.

    A step asks 8 questions, 8 times each; an answer whose last number is the sum is rewarded with 1. Writes the
    adapter, the picture of reward, KL and length, sample completions and the run record into `output_dir`. `sums`
    held-out sums are asked before and after. `engine` is as for `fastft.grpo`, `resume`, `chat` and `say` as for
    `run_demo`. The layers run eagerly: of a run this short compiling would be the longer half. Takes a minute or two on
    two cores.
    Raises `UsageError` for fewer than `LEAST_STEPS` steps.
    """
    check_steps(steps)
    say = say or terminal.show
    began = time.monotonic()
    subject = Subject(phrasings.QUESTION, phrasings.ABOUT, "in these words", _accuracy)
    model, tokenizer, before = before_after.begin(subject, sums, seed, say)
    say(ABOUT + f"GRPO for {steps} steps, each of {QUESTIONS} questions with {ANSWERS} answers ...\n")
    result = _train(model, tokenizer, output_dir, steps, engine, resume, seed)
    folder = Path(result.output_dir)
    say(_samples(folder / "completions.jsonl"))

    after = before_after.see(model, tokenizer, subject, sums, say, before)
    earned = [reward for _, reward in result.rewards]
    shown = GrpoDemoResult(
        question=subject.question,
        answer_before=before.answer,
        answer_after=after.answer,
        accuracy_before=before.accuracy,
        accuracy_after=after.accuracy,
        sums=sums,
        rewards=result.rewards,
        kl=result.kl,
        lengths=result.lengths,
        reward_first=fmean(earned[:WINDOW]),
        reward_last=fmean(earned[-WINDOW:]),
        engine=result.record["engine"],
        seconds=round(time.monotonic() - began, 1),
        folder=str(folder),
        curve=str(folder / "reward.png"),
        completions=str(folder / "completions.jsonl"),
        record=str(folder / "run.json"),
    )
    say(
        f"\nMean reward: {shown.reward_first:.2f} in the first {WINDOW} steps, {shown.reward_last:.2f} in the last.\n"
        f"Reward, KL and length: {shown.curve}\nSample completions:    {shown.completions}\n"
        f"Run record:            {shown.record}\n"
    )
    before_after.end(model, tokenizer, subject, folder, shown.seconds, chat, say)
    return shown


def check_steps(steps: int) -> None:
    """Raise `UsageError` for fewer than `LEAST_STEPS` steps."""
    if steps < LEAST_STEPS:
        remedy = f"Its first {WINDOW} steps, in which the rate warms up, are held against its last {WINDOW}."
        raise UsageError(Problem("steps of the demo with rewards", steps, f"at least {LEAST_STEPS}", remedy))


def _train(model: Any, tokenizer: Any, output_dir: str | Path, steps: int, engine: str, resume: bool, seed: int) -> Any:
    import fastft
    from fastft import rewards

    return fastft.grpo(
        model,
        tokenizer,
        phrasings.rows(steps * QUESTIONS, seed),
        [rewards.number("answer")],
        output_dir=output_dir,
        engine=engine,
        resume=resume,
        steps=steps,
        generations=ANSWERS,
        batch_size=QUESTIONS * ANSWERS,
        accumulate=1,
        max_new_tokens=24,
        learning_rate=3e-4,
        schedule="cosine",
        warmup_steps=3,
        kl=0.01,
        log_every=1,
        keep_completions=ANSWERS,
        save_strategy="no",
        compile=False,
        seed=seed,
    )


def _samples(path: Path) -> str:
    """Return a few completions of the first step and of the last, with what they earned."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    out = ""
    for step in (rows[0]["step"], rows[-1]["step"]):
        out += f"\nAnswers in step {step}:\n"
        for row in [row for row in rows if row["step"] == step][:4]:
            said = " ".join(row["completion"][-1]["content"].split())
            out += f"  {row['rewards']['number']:.0f}  {row['prompt'][-1]['content']}  ->  {said}\n"
    return out


def _accuracy(model: Any, tokenizer: Any, count: int) -> float:
    """Share of held-out sums, in the phrasings of the demonstration, that are answered rightly."""
    from fastft import generate

    rows = phrasings.held_out_rows(count)
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    return evaluate.share_right(generate(model, tokenizer, asked, max_new_tokens=24), [row["answer"] for row in rows])
