"""Steps of GRPO of several tools on models with random weights: seconds of each phase, and peak memory."""
