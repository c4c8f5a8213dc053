"""What the backward pass keeps, recomputes or moves, and what that costs."""
