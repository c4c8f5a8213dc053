"""Callbacks that are the user's own: what they do at an event of a run is not known."""

from collections.abc import Iterable
from typing import Any

OWN = ("fastft", "transformers", "trl")
"""Packages whose callbacks are known."""


def unknown_at(callbacks: Iterable[Any], *events: str) -> bool:
    """Say whether any of the callbacks, or of their classes, has a method of the user's own for one of the events."""
    methods = [getattr(one, event, None) for one in callbacks for event in events]
    return any(getattr(method, "__module__", "").partition(".")[0] not in OWN for method in methods if method)
