"""NF4 dequantisation (4-bit normal float, QLoRA's storage format), single or double quantised."""

from fastft.kernels.nf4 import ref as ref
from fastft.kernels.nf4.op import dequantize_into as dequantize_into
from fastft.kernels.nf4.op import nf4_dequantize as nf4_dequantize
