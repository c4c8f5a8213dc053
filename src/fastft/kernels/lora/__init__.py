"""LoRA linears: one or several projections of the same input, on dense or NF4 weights."""

from fastft.kernels.lora import ref as ref
from fastft.kernels.lora.linears import linears as linears
from fastft.kernels.lora.op import lora_linears as lora_linears
