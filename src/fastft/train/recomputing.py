"""Whether transformers is to recompute layers in the backward: its training arguments have one name for it, or two."""

from typing import Any

# The second is the only one in older versions; newer ones take it with a warning.
NAMES = ("activation_checkpointing", "gradient_checkpointing")


def fields(args: Any, value: bool) -> dict[str, bool]:
    """Return the fields of training arguments, or of their class, that say `value`."""
    return {name: value for name in NAMES if hasattr(args, name)}


def is_asked(args: Any) -> bool:
    """Say whether training arguments ask for it."""
    return any(getattr(args, name, False) for name in NAMES)


def ask(args: Any, value: bool) -> None:
    """Set it on training arguments by every name that they have."""
    for name in fields(args, value):
        setattr(args, name, value)


def settle(args: Any) -> bool:
    """Bring the names of training arguments to one value, and return it: True where either is.

    A stored False cannot be told from one that the user says (`dataclasses.replace` hands it on, and setting one name
    leaves it beside the other), so that names which disagree are no error; a line says what they mean.
    """
    said = {name: getattr(args, name, None) for name in NAMES}
    asked = any(said.values())
    if asked and False in said.values():
        told = " beside ".join(f"{name}={value}" for name, value in said.items())
        print(f"fastft: {type(args).__name__}: {told}, which are one thing: it is on; set both to False for off.")
    ask(args, asked)
    return asked
