"""What the demo model can do: perplexity on held-out text, sums it has never seen, and samples of its writing."""

import math
from collections.abc import Iterable
from random import Random

import torch
from torch.nn.functional import cross_entropy

from fastft.demo import tasks

SAMPLE_PROMPTS = [
    "Return a string",
    "The module defines the following",
    "If the file",
    "This class",
]
SAMPLE_QUESTIONS = [
    "What is 27 + 48?",
    "What is the capital of Italy?",
    "Anna has 27 apples. Ben gives her 48 more apples. How many apples does Anna have now?",
    "Reverse the order of these words: river garden stone",
    "What does shutil.copytree do?",
    "Who are you?",
]


@torch.no_grad()
def perplexity(model, token_ids: list[int], start: int, window: int = 512, batch: int = 8) -> float:
    """Perplexity per token of a text, in consecutive windows that each begin with the token `start`.

    The loss is computed in fp32 over the whole text; the last, shorter window counts too.
    """
    device, step = model.device, window - 1
    windows = [[start, *token_ids[i : i + step]] for i in range(0, len(token_ids), step)]
    total, count = 0.0, 0
    for i in range(0, len(windows), batch):
        part = windows[i : i + batch]
        length = max(map(len, part))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in part], device=device)
        labels = torch.tensor([row[1:] + [-100] * (length - len(row)) for row in part], device=device)
        logits = model(input_ids=ids).logits[:, :-1].float()
        total += cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += int((labels != -100).sum())
    return math.exp(total / count)


@torch.no_grad()
def answers(model, tokenizer, questions: list[str], max_new_tokens: int = 40, batch: int = 128) -> list[str]:
    """Greedy answers of the chat model to one-turn questions (in batches, padded on the left by the tokenizer)."""
    device, out = model.device, []
    for i in range(0, len(questions), batch):
        chats = [[{"role": "user", "content": question}] for question in questions[i : i + batch]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(device)
        made = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        out += tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in out]


def contains_number(answer: str, number: int) -> bool:
    """Whether the last number in `answer` is `number`."""
    numbers = [int(n) for n in "".join(c if c.isdigit() else " " for c in answer).split() if len(n) < 10]
    return bool(numbers) and numbers[-1] == number


def share_right(answered: Iterable[str], right: Iterable[int]) -> float:
    """Share of answers whose last number is the right one."""
    verdicts = [contains_number(answer, number) for answer, number in zip(answered, right, strict=True)]
    return sum(verdicts) / len(verdicts)


def addition_accuracy(model, tokenizer, ask, count: int = 200, seed: int = 0) -> tuple[float, list[str]]:
    """Share of held-out sums answered rightly, and the answers; `ask(a, b, random)` makes a question and an answer."""
    random, pairs = Random(seed), tasks.held_out_pairs(count, seed)
    given = answers(model, tokenizer, [ask(a, b, random)[0] for a, b in pairs])
    return share_right(given, [a + b for a, b in pairs]), given


@torch.no_grad()
def samples(model, tokenizer, seed: int = 0) -> list[tuple[str, str]]:
    """Sampled continuations (temperature 0.7, top-p 0.9) of a few openings, and greedy answers to a few questions."""
    torch.manual_seed(seed)
    pairs = []
    for opening in SAMPLE_PROMPTS:
        ids = tokenizer(tokenizer.bos_token + opening, return_tensors="pt", add_special_tokens=False).to(model.device)
        ids.pop("token_type_ids", None)
        made = model.generate(**ids, max_new_tokens=60, do_sample=True, temperature=0.7, top_p=0.9)
        pairs.append((opening, tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)))
    return pairs + list(zip(SAMPLE_QUESTIONS, answers(model, tokenizer, SAMPLE_QUESTIONS), strict=True))
