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
    "sft": "fastft.train.sft",
    "merge": "fastft.export.merge",
    "save_adapter": "fastft.export.merge",
    "export_gguf": "fastft.export.gguf.export",
    "export_lora_gguf": "fastft.export.gguf.lora",
    "verify_export": "fastft.export.verify",
    "push": "fastft.export.hub",
    "write_modelfile": "fastft.export.modelfile",
    "SFTTrainer": "fastft.train.sft",
    "SFTConfig": "fastft.train.config",
    "FastLanguageModel": "fastft.facade",
    "FastModel": "fastft.facade",
    "FastVisionModel": "fastft.facade",
    "is_bfloat16_supported": "fastft.facade",
}
__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastft' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
