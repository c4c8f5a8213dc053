"""The familiar names for scripts written for Unsloth, each a thin call into fastft's own functions."""

from fastft.facade.models import FastLanguageModel, FastModel, FastVisionModel, is_bfloat16_supported

__all__ = ["FastLanguageModel", "FastModel", "FastVisionModel", "is_bfloat16_supported"]
