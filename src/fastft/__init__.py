"""fastft: fine-tune open language models with QLoRA, LoRA or full fine-tuning.

Everything is imported on first use, so `import fastft` loads neither torch nor transformers and changes nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# name -> module that defines it
_EXPORTS = {
    "resolve": "fastft.registry.resolve",
    "register": "fastft.registry.resolve",
    "ModelSpec": "fastft.registry.spec",
    "load": "fastft.model.load",
    "add_lora": "fastft.model.adapters",
    "add_tokens": "fastft.model.tokens",
    "generate": "fastft.model.generate",
    "compile": "fastft.graph.compile",
    "report": "fastft.graph.compile",
    "verify": "fastft.train.verify",
    "chat_dataset": "fastft.data.chat",
    "train_on_responses_only": "fastft.data.responses",
    "truncation_table": "fastft.data.truncation",
    "preview": "fastft.data.preview",
    "load_rows": "fastft.data.sources",
    "text_dataset": "fastft.data.raw_text",
    "standardize_sharegpt": "fastft.data.standardize",
    "standardize_data_formats": "fastft.data.standardize",
    "to_sharegpt": "fastft.data.standardize",
    "sft": "fastft.train.sft.run",
    "grpo": "fastft.train.grpo.run",
    "preference": "fastft.train.preference.run",
    "merge": "fastft.export.merge",
    "save_adapter": "fastft.export.merge",
    "export_gguf": "fastft.export.gguf.export",
    "export_lora_gguf": "fastft.export.gguf.lora",
    "verify_export": "fastft.export.verify",
    "push": "fastft.export.hub",
    "write_modelfile": "fastft.export.modelfile",
    "SFTTrainer": "fastft.train.sft.trainer",
    "SFTConfig": "fastft.train.sft.config",
    "GRPOTrainer": "fastft.train.grpo.trainer",
    "GRPOConfig": "fastft.train.grpo.config",
    "DPOTrainer": "fastft.train.preference.referenced",
    "DPOConfig": "fastft.train.preference.referenced",
    "KTOTrainer": "fastft.train.preference.referenced",
    "KTOConfig": "fastft.train.preference.referenced",
    "ORPOTrainer": "fastft.train.preference.reference_free",
    "ORPOConfig": "fastft.train.preference.reference_free",
    "CPOTrainer": "fastft.train.preference.reference_free",
    "CPOConfig": "fastft.train.preference.reference_free",
    "FastLanguageModel": "fastft.facade",
    "FastModel": "fastft.facade",
    "FastVisionModel": "fastft.facade",
    "is_bfloat16_supported": "fastft.facade",
    "PatchFastRL": "fastft.facade",
    "PatchDPOTrainer": "fastft.facade",
    "PatchKTOTrainer": "fastft.facade",
    "vLLMSamplingParams": "fastft.facade",
}
# modules that are reached as they are: fastft.rewards.number(...)
_MODULES = ("chat_templates", "errors", "rewards")
__all__ = [*_EXPORTS, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"fastft.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastft' has no attribute {name!r}")
    from fastft.noise import quiet

    with quiet():  # some libraries warn while they are imported
        return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
