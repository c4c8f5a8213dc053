"""Rotary position embedding of queries and keys."""

from fastft.kernels.rope import ref as ref
from fastft.kernels.rope.op import rope as rope
