"""Supervised fine-tuning: configuration, data, trainer, and the function `sft`."""
