"""Which completions of a run were given a reward, and what is said where none was."""

from collections.abc import Sequence
from typing import Any

from attrs import define
from torch import Tensor

from fastft.rewards.guarding import calls_of


@define
class Scored:
    """The completions that a run has sampled to learn from, and how many of them had a reward.

    `begun` is the step that the run goes on from; `told`: that completions were left out has been said.
    """

    begun: int = 0
    completions: int = 0
    rewarded: int = 0
    told: bool = False

    def add(self, rewards: Tensor) -> None:
        """Count the completions of a generation, of whose rewards `[completions, functions]` NaN are missing."""
        self.completions += len(rewards)
        self.rewarded += int((~rewards.isnan()).any(dim=1).sum())

    def tell(self, left: int, completions: int, aloud: bool) -> None:
        """Say once, where `aloud`, that all functions have left out `left` completions of a generation."""
        if left and not self.told and aloud:
            self.told = True
            print(
                f"fastft: {left} of {completions} completions have a reward from no function (None from all of them) "
                "and are not learnt from. This is said once; the log counts them as rewards/NAME/missing."
            )

    def notes(self) -> list[str]:
        """Return what is to be known of the run: that nothing was learnt, where no completion had a reward."""
        if self.rewarded or not self.completions:
            return []
        since = f" after step {self.begun}" if self.begun else ""
        return [f"nothing was learnt{since}: none of the {self.completions} completions had a reward"]


def is_of_unscored_rows(line: str) -> bool:
    """Say whether a line is TRL's on a row without any reward: at every step, with all columns of the row."""
    return "All reward functions returned None" in line


def left_out(rewards: Tensor, functions: Sequence[Any]) -> int:
    """Return how many rows of `rewards` `[completions, functions]` have none, and failed in no function.

    Of failures the guard has told.
    """
    failed = {row for _, call in calls_of(functions) for row in call.failed}
    return len(set(rewards.isnan().all(dim=1).nonzero().flatten().tolist()) - failed)
