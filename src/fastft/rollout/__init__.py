"""Rollouts: engines that sample completions while a model trains."""

from fastft.rollout.choose import make_engine

__all__ = ["make_engine"]
