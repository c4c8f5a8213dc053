"""Reinforcement learning with rewards (GRPO): configuration, prompts, trainer, and the function `grpo`."""
