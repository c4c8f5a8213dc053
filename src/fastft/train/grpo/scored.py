"""Which completions of a run were given a reward, and what is said where none was."""

from collections.abc import Sequence
from typing import Any

from attrs import define
from torch import Tensor

from fastft.rewards.guarding import calls_of


@define
class Scored:
    """The completions that a run has sampled to learn from, and how many of them had a reward.

    `begun` is the step that the run goes on from.
    """

    begun: int = 0
    completions: int = 0
    rewarded: int = 0

    def add(self, rewards: Tensor) -> None:
        """Count the completions of a generation, of whose rewards `[completions, functions]` NaN are missing."""
        self.completions += len(rewards)
        self.rewarded += int((~rewards.isnan()).any(dim=1).sum())

    def notes(self) -> list[str]:
        """Return what is to be known of the run: that nothing was learnt, where no completion had a reward."""
        if self.rewarded or not self.completions:
            return []
        since = f" after step {self.begun}" if self.begun else ""
        return [f"nothing was learnt{since}: none of the {self.completions} completions had a reward"]


def told_already(line: str, functions: Sequence[Any]) -> bool:
    """Say whether TRL's line is on rows without any reward, and for each the guard has told of a failure.

    A row that all functions have left out is news.
    """
    calls = [call for _, call in calls_of(functions)]
    if "All reward functions returned None" not in line or not calls:
        return False
    unscored = set.intersection(*(set(call.unscored) for call in calls))
    return unscored <= {row for call in calls for row in call.failed}
