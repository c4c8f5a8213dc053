"""Gated activation: activation(gate) * up."""

from fastft.kernels.glu import ref as ref
from fastft.kernels.glu.op import glu as glu
