"""Methods that are the user's own, of callbacks and of trainers: what they do is not known."""

from collections.abc import Iterable
from typing import Any

OWN = ("fastft", "transformers", "trl")
"""Packages whose methods are known."""


def has_own(objects: Iterable[Any], *names: str) -> bool:
    """Say whether any of the objects or classes has a method of the user's own by one of the names."""
    methods = [getattr(one, name, None) for one in objects for name in names]
    return any(getattr(method, "__module__", "").partition(".")[0] not in OWN for method in methods if method)
