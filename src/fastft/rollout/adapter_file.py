"""An adapter as an engine of its own takes it: a small PEFT checkpoint in a folder that the caller gives."""

import json
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from fastft.errors import Problem, UsageError
from fastft.state import base_model

_REMEDY = "Train plain LoRA for it, or take engine='transformers', which samples from the model as it is."


@frozen
class Adapter:
    """The LoRA matrices of a model: path of the module -> (A [r, in], B [out, r] times the scaling), on any device."""

    matrices: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def rank(self) -> int:
        """Return the largest rank."""
        return max(a.shape[0] for a, _ in self.matrices.values())

    def write(self, folder: Path) -> Path:
        """Write adapter_model.safetensors and adapter_config.json into `folder` (made if need be) and return it.

        The scaling is in B already, so the config says alpha = r, which means a scaling of 1, for every module.
        """
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for path, (a, b) in self.matrices.items():
            padding = self.rank - a.shape[0]  # engines take one rank for all modules; zeros add nothing
            tensors[f"base_model.model.{path}.lora_A.weight"] = _on_cpu(torch.nn.functional.pad(a, (0, 0, 0, padding)))
            tensors[f"base_model.model.{path}.lora_B.weight"] = _on_cpu(torch.nn.functional.pad(b, (0, padding)))
        if tensors and next(iter(self.matrices.values()))[0].is_cuda:
            torch.cuda.synchronize()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": self.rank,
            "target_modules": sorted({path.rsplit(".", 1)[-1] for path in self.matrices}),
            "bias": "none",
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder


def adapter_of(model: Any) -> Adapter | None:
    """Return the active LoRA adapter of `model`, None for a model without one, or that has it off.

    The scaling (alpha / r, or by the root of r, and patterns of both) is multiplied into B, in B's dtype. Raises
    `UsageError` for what such an adapter cannot say: DoRA, biases, modules or token rows that are trained whole.
    """
    from peft.tuners.lora import LoraLayer

    if not getattr(model, "peft_config", None):
        return None
    names = list(model.active_adapters)
    if len(names) != 1:
        remedy = "Choose one with model.set_adapter(name)."
        raise UsageError(Problem("active adapters", names, "one for rollouts", remedy))
    problems = _problems(model.peft_config[names[0]])
    if problems:
        raise UsageError(*problems)
    matrices = {}
    for path, module in base_model(model).named_modules():
        if isinstance(module, LoraLayer) and names[0] in module.lora_A and not module.disable_adapters:
            scaling = module.scaling[names[0]]
            a, b = module.lora_A[names[0]].weight.detach(), module.lora_B[names[0]].weight.detach()
            matrices[path] = a, b * scaling
    return Adapter(matrices) if matrices else None


def _problems(config: Any) -> list[Problem]:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        return [Problem("adapter", kind, "LoRA for an engine of its own", _REMEDY)]
    plain = {
        "use_dora": (False, None),
        "lora_bias": (False, None),
        "bias": ("none", None),
        "modules_to_save": (None, [], ()),
        "trainable_token_indices": (None, {}, []),
        "target_parameters": (None, [], ()),
    }
    wrong = [
        Problem(f"adapter {name}", getattr(config, name), f"{allowed[0]!r} for an engine of its own", _REMEDY)
        for name, allowed in plain.items()
        if getattr(config, name, allowed[0]) not in allowed
    ]
    embeddings = [name for name in config.target_modules or () if "embed" in name]
    if embeddings:
        wrong.append(Problem("adapter target_modules", embeddings, "linear layers for an engine of its own", _REMEDY))
    return wrong


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor.contiguous()
    out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return out.copy_(tensor, non_blocking=True)
