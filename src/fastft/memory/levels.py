"""The levels of a layer: what its forward keeps for its backward. Needs no torch."""

from collections.abc import Mapping

from attrs import frozen


@frozen
class Level:
    """A level by name. `again`: roles of the costly operations that run again (`fastft.graph.recompute.roles_of`).

    Elementwise results are computed again at every level; a layer's input and what was drawn at random always stay.
    """

    name: str
    again: frozenset[str]
    title: str


def _levels() -> dict[str, Level]:
    return {
        name: Level(name, frozenset(again.split()), title)
        for name, again, title in (
            ("keep", "", "results of all matrix products and of attention"),
            ("attention", "feed_forward", "all but what the feed-forward widens (gate and up)"),
            ("outputs", "feed_forward projection", "outputs of attention and of its last projection"),
            ("context", "feed_forward projection output", "the output of attention"),
            ("min", "feed_forward projection output down attention", "the layer's input alone"),
        )
    }


def keeps_wide(level: str) -> bool:
    """Say whether what the feed-forward widens, gate and up, is kept at `level`."""
    return "feed_forward" not in LEVELS[level].again


# From the fastest to the smallest; each runs again what the one before it does, and more.
LEVELS: Mapping[str, Level] = _levels()
