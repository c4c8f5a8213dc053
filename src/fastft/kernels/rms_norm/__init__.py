"""Root-mean-square normalisation."""

from fastft.kernels.rms_norm import ref as ref
from fastft.kernels.rms_norm.op import rms_norm as rms_norm
