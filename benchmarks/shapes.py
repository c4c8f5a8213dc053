"""Model shapes, as plain data: which configuration class of transformers, its fields, and the weight of its norms."""

from collections.abc import Mapping
from typing import Any

from attrs import evolve, field, frozen

MODES = ("nf4", "bf16", "full")
"""QLoRA (NF4, double quantisation), LoRA on bf16 weights, every weight trained in bf16."""


@frozen
class Shape:
    """One model shape. `norm` is the weight at which a norm of this family changes nothing (Gemma adds 1 to it)."""

    config_class: str
    fields: Mapping[str, Any] = field(hash=False)
    norm: float = 1.0

    @property
    def vocabulary(self) -> int:
        """The size of the vocabulary."""
        return self.fields["vocab_size"]


def _plain(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def _llama(hidden: int, inner: int, layers: int, heads: int, kv: int, head: int, vocabulary: int, tied: bool) -> Shape:
    return Shape(
        "LlamaConfig",
        dict(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv, head_dim=head, vocab_size=vocabulary, tie_word_embeddings=tied,
            max_position_embeddings=131072, rms_norm_eps=1e-5, rope_parameters=_plain(5e5),
        ),
    )  # fmt: skip


SHAPES: Mapping[str, Shape] = {
    "llama-1b": _llama(2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama-3b": _llama(3072, 8192, 28, 24, 8, 128, 128256, True),
    "llama-8b": _llama(4096, 14336, 32, 32, 8, 128, 128256, False),
    "qwen3-8b": Shape(
        "Qwen3Config",
        dict(
            hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=False,
            max_position_embeddings=40960, rms_norm_eps=1e-6, rope_parameters=_plain(1e6),
        ),
    ),
    "gemma3-4b": Shape(
        "Gemma3TextConfig",
        dict(
            hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, num_attention_heads=8,
            num_key_value_heads=4, head_dim=256, vocab_size=262208, tie_word_embeddings=True, sliding_window=1024,
            query_pre_attn_scalar=256, max_position_embeddings=131072, rms_norm_eps=1e-6,
            rope_parameters={
                "sliding_attention": _plain(1e4),
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        ),
        norm=0.0,
    ),
    "tiny": _llama(128, 256, 2, 4, 2, 32, 2048, False),
    "tiny-gemma3": Shape(
        "Gemma3TextConfig",
        dict(
            hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
            head_dim=32, vocab_size=2048, tie_word_embeddings=True, sliding_window=16, query_pre_attn_scalar=32,
        ),
        norm=0.0,
    ),
}  # fmt: skip


def shape_of(name: str, layers: int = 0) -> Shape:
    """Return the shape called `name`, with `layers` layers instead of its own if that is not 0."""
    shape = SHAPES[name]
    return evolve(shape, fields={**shape.fields, "num_hidden_layers": layers}) if layers else shape
