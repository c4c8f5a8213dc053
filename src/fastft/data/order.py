"""Turns in an order that is trained on, and is mostly not what was meant: told, not refused.

Not among them are orders that are used on purpose: two user turns in a row, a system message between turns, and an
answer right behind a system message. Two answers in a row are refused elsewhere (`check.repeated_answers`), and so is a
conversation without any (`Encoder`); templates refuse what they do not take.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def odd_order(messages: Sequence[Mapping[str, Any]], train_on: str, given: int = 0) -> dict[str, str]:
    """Return the kinds of odd order in a conversation, each with the role of the turn that it is about.

    `given`: how many of the messages are a prompt's.
    """
    roles = [message["role"] for message in messages]
    found = {}
    if roles[0] == "assistant" and _learns_first(messages[0], roles, train_on, given):
        found["unasked"] = roles[0]
    if roles[-1] != "assistant" and train_on != "all":
        found["unanswered"] = roles[-1]
    if "tool" in roles:
        before = zip(["", *roles], roles, strict=False)
        if any(role == "tool" and earlier not in ("assistant", "tool") for earlier, role in before):
            found["uncalled"] = "tool"
    return found


def _learns_first(first: Mapping[str, Any], roles: Sequence[str], train_on: str, given: int) -> bool:
    """Say whether an answer that opens a conversation bears loss."""
    if train_on == "all":
        return True
    chosen = train_on == "assistant" or (train_on == "last" and roles.count("assistant") == 1)
    return chosen and not given and first.get("weight") != 0
