"""How much memory a training step takes, and what of it is kept, computed again or moved to the CPU."""
