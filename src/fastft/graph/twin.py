"""A tiny random model of an architecture: same classes, small sizes."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": 16,
    "query_pre_attn_scalar": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Values that would hide a mistake at their neutral defaults.
TELLING = {
    "logits_scaling": 8.0,
    "logit_scale": 0.5,
    "residual_multiplier": 0.7,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Return a small config of `model_type`; `changes` set further fields. Raises ValueError for an unknown type."""
    default = AutoConfig.for_model(model_type)
    known = {key: value for key, value in (SIZES | TELLING).items() if hasattr(default, key)}
    if not getattr(default, "sliding_window", None) and "layer_types" not in default.to_dict():
        known.pop("sliding_window", None)
    if "sliding_attention" in (getattr(default, "layer_types", None) or ()):
        known["layer_types"] = ["sliding_attention", "full_attention"]
    if getattr(default, "no_rope_layers", None):
        known["no_rope_layers"] = [1, 0]
    return AutoConfig.for_model(model_type, **(known | changes))


def tiny_model(
    model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> torch.nn.Module:
    """Return a tiny random causal language model; norm weights are random too, so that none of them is neutral."""
    config = tiny_config(model_type, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 or "norm" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)
