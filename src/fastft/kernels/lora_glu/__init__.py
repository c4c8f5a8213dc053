"""A gated feed-forward of three LoRA linears, with the adapters' products made where the activation is computed."""

from fastft.kernels.lora_glu import ref as ref
from fastft.kernels.lora_glu.op import feed_forward as feed_forward
