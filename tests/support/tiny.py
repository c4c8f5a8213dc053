"""Tiny models, batches and the judge that compares steps."""

import torch
import transformers

from fastft.graph.twin import tiny_model
from fastft.state import update_state

transformers.logging.set_verbosity_error()
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "cohere",
    "cohere2", "smollm3", "glm4",
)  # fmt: skip


def with_lora(model, dtype, r=4, adapter_dtype=None, **kwargs):
    """Attach LoRA with random A and B, so that no gradient is zero."""
    from peft import LoraConfig, get_peft_model

    kwargs = {"target_modules": "all-linear", **kwargs}
    config = LoraConfig(r=r, lora_alpha=2 * r, task_type="CAUSAL_LM", **kwargs)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.1).to(dtype))
    return model


def in_nf4(model, dense=(), nested=True):
    """Return the model, frozen, with its layers' linears in NF4 but for those whose last name is in `dense`."""
    from bitsandbytes.nn import Linear4bit

    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if not isinstance(module, torch.nn.Linear) or "layers" not in name or last in dense:
            continue
        made = Linear4bit(
            module.in_features, module.out_features, module.bias is not None, compute_dtype=module.weight.dtype,
            compress_statistics=nested, quant_type="nf4",
        )  # fmt: skip
        made.load_state_dict(module.state_dict())
        made.support_avx512bf16_for_cpu = False  # it would repack the weight when it is not in training
        setattr(model.get_submodule(parent), last, made.to("cpu"))
    update_state(model, quant="nf4")
    return model.requires_grad_(False)


def make(model_type, dtype, lora, wide=None, **changes):
    """Return a model with eager attention whose weights are rounded to `dtype`, held in `wide` (default: dtype)."""
    model = tiny_model(model_type, dtype=dtype, **changes).to(wide or dtype)
    model.set_attn_implementation("eager")
    return (with_lora(model, dtype) if lora else model).to(wide or dtype).train()


def batch(seed, rows=2, length=37, vocabulary=250):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, : length // 4] = -100
    return {"input_ids": ids, "labels": labels}


def run(model, inputs):
    """Return logits, loss and all gradients of one step, in fp64."""
    model.zero_grad()
    out = model(**inputs, use_cache=False)
    out.loss.backward()
    gradients = {n: p.grad.detach().double() for n, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach().double(), out.loss.detach().double(), gradients


def relative(truth, value):
    return ((value - truth).norm() / truth.norm()).item()


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients.values()])
