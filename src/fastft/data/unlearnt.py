"""Assistant turns that bear no loss: those that the data say so of, and those that the model would not write there.

A template for models that reason leaves the reasoning out of earlier answers. What stands there then follows on
nothing that the model would have sampled before it: learning it would teach the model to answer without reasoning.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import frozen

from fastft.data.left_out import REASONING, reasoning_problem
from fastft.data.mask import Span, merged
from fastft.data.template import Rendered
from fastft.errors import DataError, Problem, short

_WEIGHT = "A turn with weight 0 bears no loss, all others do; leave the field out elsewhere."


@frozen
class Rules:
    """What a chat template does to earlier answers.

    `drops`: it leaves their reasoning out. `prompt` is the generation prompt of a template that opens the reasoning
    there, and in earlier answers has no such opening; empty for others.
    """

    drops: bool = False
    prompt: str = ""


NO_RULES = Rules()


def find_rules(render: Callable[..., Rendered | None], prompt: str) -> Rules:
    """Return the rules of a template; `render(messages)` returns None where it refuses them.

    `prompt` is its generation prompt.
    """
    asked, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    drops = False
    for thought in (
        {**answer, "reasoning_content": "because"},
        {**answer, "content": "<think>\nbecause\n</think>\n\nanswer"},
    ):
        last, earlier = render([asked, thought]), render([asked, thought, asked, answer])
        drops = drops or bool(last and earlier and "because" in last.text and "because" not in earlier.text)
    whole = render([asked, answer, asked, answer])
    opened = [_opened(whole.text, span, prompt) for span in merged(whole.spans)] if whole else []
    return Rules(drops, prompt if prompt and opened == [False, True] else "")


def _opened(text: str, span: Span, prompt: str) -> bool:
    return text.endswith(prompt, 0, span[0]) or text.startswith(prompt, span[0])


def unlearnt(
    where: str, messages: Sequence[Mapping[str, Any]], text: str, spans: Sequence[Span], rules: Rules
) -> tuple[set[int], set[int]]:
    """Return the numbers of the spans that bear no loss: by their `weight`, and for the reasoning that is left out.

    `spans` are those of the assistant turns among `messages`, in order. Raises `DataError` for a weight that is neither
    0 nor 1, for reasoning that the template does not know of, and where turns and spans are not as many.
    """
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    weights = {number: messages[number]["weight"] for number in answers if messages[number].get("weight") is not None}
    wrong = [
        Problem(f"{where}[{number}].weight", short(weight), "0 or 1", _WEIGHT)
        for number, weight in weights.items()
        if weight not in (0, 1)
    ]
    if wrong:
        raise DataError(*wrong)
    thought = {place for place, span in enumerate(spans[:-1]) if rules.prompt and not _opened(text, span, rules.prompt)}
    light = [number for number, weight in weights.items() if weight == 0]
    reasoned = [number for number in answers[:-1] if rules.drops or any(messages[number].get(n) for n in REASONING)]
    if not light and not reasoned:
        return set(), thought
    if len(spans) != len(answers):
        if not light and not any(messages[number].get(name) for number in reasoned for name in REASONING):
            return set(), thought
        remedy = "The template's {% generation %} blocks do not say which turn they are of; use train_on='last'."
        raise DataError(Problem(where, f"{len(spans)} blocks", f"one for each of {len(answers)} answers", remedy))
    for number in reasoned:
        place = answers.index(number)
        said = text[slice(*spans[place])]
        missing = _missing(messages[number], said, rules.drops)
        if missing and not rules.drops:
            raise DataError(reasoning_problem(f"{where}[{number}]", missing, messages[number][missing]))
        thought |= {place} if missing else set()
    return {answers.index(number) for number in light}, thought


def _missing(message: Mapping[str, Any], said: str, drops: bool) -> str:
    """Return the field of a message that is not wholly in what the template made of it; empty where all of it is."""
    for name in REASONING:
        value = message.get(name)
        if isinstance(value, str) and value.strip() not in said:
            return name
    content = message.get("content")
    texts = [content] if isinstance(content, str) else [part.get("text") for part in content or ()]
    left = drops and any(isinstance(text, str) and text.strip() not in said for text in texts)
    return "content" if left else ""


def refuse_weights(where: str, messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise `DataError` for turns that bear no loss where every token is to bear it."""
    remedy = "train_on='assistant' learns every answer but those."
    wrong = [
        Problem(f"{where}[{number}].weight", 0, "no weight of 0 with train_on='all'", remedy)
        for number, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("weight") in (0, 0.0) and message.get("weight") is not None
    ]
    if wrong:
        raise DataError(*wrong)
