"""GGUF's number formats: the same bytes as ggml's quantisers write, in batched torch."""

from fastft.export.gguf.quants.api import dequantize, quantize, supported, takes_importance
from fastft.export.gguf.quants.types import BY_ID, TYPES, GgufType, gguf_type

__all__ = ["BY_ID", "TYPES", "GgufType", "dequantize", "gguf_type", "quantize", "supported", "takes_importance"]
