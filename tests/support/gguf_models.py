"""Tiny models of every family that llama.cpp knows, in the shapes and with the switches that exports must get right."""

import torch
from transformers import AutoTokenizer

from fastft.demo import MODEL_FOLDER
from fastft.graph.twin import tiny_model

VOCABULARY = 2048
ROPE = {"rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, **ROPE,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **ROPE}
LONGROPE = {
    "rope_type": "longrope", "original_max_position_embeddings": 256, "long_factor": [1 + 0.5 * i for i in range(8)],
    "short_factor": [1 + 0.1 * i for i in range(8)], **ROPE,
}  # fmt: skip
LONG = {"max_position_embeddings": 1024, "original_max_position_embeddings": 256, "rope_parameters": LONGROPE}
S, F = "sliding_attention", "full_attention"
# name -> (model type, changes of the tiny config)
MODELS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **ROPE}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-scaled": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"num_hidden_layers": 4, "layer_types": [S, F, S, F]}),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 7, "layer_types": [S, S, S, S, S, F, S]}),
    "gemma3-other-windows": ("gemma3_text", {"num_hidden_layers": 4, "layer_types": [F, S, F, S]}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3-short": ("phi3", {"sliding_window": None, **LONG}),
    "phi3-long": ("phi3", {"sliding_window": None, **LONG}),
    "granite": ("granite", {}),
    "granite-biases": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "olmo2": ("olmo2", {}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {"num_hidden_layers": 4, "layer_types": [S, S, S, F]}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    "smollm3-untied": (
        "smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "tie_word_embeddings": False},
    ),
    "glm4": ("glm4", {}),
}  # fmt: skip


def gguf_model(name, vocabulary=VOCABULARY, dtype=torch.float32):
    """Return a tiny model whose logits are large enough to tell, in eval mode."""
    model_type, changes = MODELS[name]
    model = tiny_model(model_type, vocab_size=vocabulary, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.to(dtype).eval()


def demo_tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_FOLDER)
