"""Layer normalisation, also per head."""

from fastft.kernels.layer_norm import ref as ref
from fastft.kernels.layer_norm.op import layer_norm as layer_norm
