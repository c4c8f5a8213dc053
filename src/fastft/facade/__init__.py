"""The familiar names for scripts written for Unsloth, each a thin call into fastft's own functions."""

from fastft.facade.models import FastLanguageModel, FastModel, FastVisionModel, is_bfloat16_supported
from fastft.facade.preferences import PatchDPOTrainer, PatchKTOTrainer
from fastft.facade.reinforcement import PatchFastRL, vLLMSamplingParams

__all__ = [
    "FastLanguageModel",
    "FastModel",
    "FastVisionModel",
    "PatchDPOTrainer",
    "PatchFastRL",
    "PatchKTOTrainer",
    "is_bfloat16_supported",
    "vLLMSamplingParams",
]
