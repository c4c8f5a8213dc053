"""What both models are asked: prompts rendered and tokenised, and held-out text, in sequences of ids."""

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from fastft.errors import Problem, UsageError
from fastft.export.engines import CONTEXT, token_ids
from fastft.state import base_model, get_state

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]
_CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "Name three rivers of Europe."},),
    (
        {"role": "user", "content": "What is 17 + 25?"},
        {"role": "assistant", "content": "17 + 25 = 42."},
        {"role": "user", "content": "And twice that?"},
    ),
    (
        {"role": "system", "content": "Answer in one short sentence."},
        {"role": "user", "content": "Warum ist der Himmel blau?  (two  spaces,\ta tab, 天空 🙂)"},
    ),
    ({"role": "user", "content": "def f(x):\n    return x ** 2\n\nWhat does f(3) return?"},),
)
_PLAIN = tuple(conversation[-1]["content"] for conversation in _CONVERSATIONS)


@frozen(eq=False)
class Questions:
    """What is asked: rendered prompts with their conversations, sequences of ids, and which of these are the text."""

    conversations: tuple[Prompt, ...]
    prompts: tuple[str, ...]
    ids: tuple[list[int], ...]
    text: int
    passage: str


def room_of(model: Any) -> int:
    """Return how many tokens of one sequence are asked: what the model takes, at most `CONTEXT`."""
    length = getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)
    return min(length or CONTEXT, get_state(model).max_length or CONTEXT, CONTEXT)


def questions_of(
    tokenizer: Any, prompts: Sequence[Prompt] | None, text: str | None, count: int, room: int, notes: list[str]
) -> Questions:
    """Render and tokenise what is asked; a default conversation that the template refuses is left out with a note."""
    templated = bool(getattr(tokenizer, "chat_template", None))
    if prompts is None:
        asked = list(_CONVERSATIONS if templated else _PLAIN)
        if templated:
            asked = [prompt for prompt in asked if _fits_template(tokenizer, prompt, notes)]
    else:
        asked = list(prompts)
    wrong = [prompt for prompt in asked if not isinstance(prompt, str) and not templated]
    if wrong:
        raise UsageError("prompts: these are conversations, and the tokenizer has no chat template; give texts")
    rendered = [prompt if isinstance(prompt, str) else render(tokenizer, prompt) for prompt in asked]
    special = [isinstance(prompt, str) for prompt in asked]
    ids = [token_ids(tokenizer, prompt, plain) for prompt, plain in zip(rendered, special)]
    long = [number for number, sequence in enumerate(ids, 1) if not 0 < len(sequence) <= room]
    if long:
        raise UsageError(f"prompts: number {long[0]} has {len(ids[long[0] - 1])} tokens; from 1 to {room} fit")
    passage = _default_text() if text is None else text
    windows = _windows(tokenizer, passage, count, room)
    return Questions(tuple(asked), tuple(rendered), (*ids, *windows), len(ids), passage[: 40 * count])


def _default_text() -> str:
    from fastft.demo import HELD_OUT_TEXT

    return HELD_OUT_TEXT.read_text("utf-8")[:20000]


def _windows(tokenizer: Any, text: str, count: int, room: int) -> list[list[int]]:
    # about six letters a token; what is cut off need not be tokenised
    ids = token_ids(tokenizer, text[: 12 * count], False)[:count]
    first = [tokenizer.bos_token_id] if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else []
    width = room - len(first)
    windows = [first + ids[start : start + width] for start in range(0, len(ids), width)]
    if not windows or len(windows[0]) < 2:
        raise UsageError(Problem("text", text[:40], "a text of at least two tokens"))
    return [window for window in windows if len(window) > 1]


def render(tokenizer: Any, messages: Sequence[Message]) -> str:
    """Return the prompt of a conversation, with the generation prompt."""
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


def _fits_template(tokenizer: Any, prompt: Sequence[Message], notes: list[str]) -> bool:
    from jinja2 import TemplateError

    try:
        render(tokenizer, prompt)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in prompt)
        notes.append(f"the chat template refuses a conversation of {roles} ({error}); it was not asked")
        return False
    return True
