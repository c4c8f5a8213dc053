"""What a GGUF file says of a model's shape and constants, from its config and its family's spec.

The keys are those of llama.cpp's architectures. A config that asks for what llama.cpp would compute otherwise is
refused with the reason; what only matters in some uses becomes a note.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from attrs import frozen

from fastft.errors import Problem, UsageError
from fastft.export.gguf.file import Value, f32, text, u32
from fastft.registry.spec import AttentionPoint, ModelSpec

# What transformers' configs call the activations of the specs.
_ACTIVATIONS = {
    "silu": ("silu", "swish"),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_python_tanh"),
    "gelu": ("gelu", "gelu_python"),
}
# Where llama.cpp reads per-pair divisors of the rotation's frequencies.
_LLAMA3 = ("llama", "granite")
_LONGROPE = ("phi3",)


@frozen
class Architecture:
    """The keys of a file, tensors that no weight of the model holds (name without `.weight`, values), and notes."""

    metadata: dict[str, Value]
    tensors: dict[str, torch.Tensor]
    notes: tuple[str, ...]


@frozen
class Heads:
    """Sizes of attention: heads, heads of keys, features of a head, and how many of them are rotated."""

    queries: int
    keys: int
    size: int
    rotated: int


def heads_of(config: Any) -> Heads:
    """Return the sizes of a model's attention."""
    queries = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // queries
    rope = _main_rope(config)
    part = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return Heads(queries, getattr(config, "num_key_value_heads", None) or queries, size, int(size * part))


def check_supported(spec: ModelSpec) -> None:
    """Raise UsageError for a family that its spec says cannot be written as GGUF, with the spec's reason."""
    capability = spec.capabilities.get("gguf")
    if spec.gguf_architecture is None or (capability is not None and capability.status == "unsupported"):
        why = capability.note if capability is not None and capability.note else "llama.cpp has no such architecture"
        raise UsageError(f"{spec.title or spec.name}: cannot be written as GGUF: {why}")
    if not spec.norms or not spec.attentions:
        raise UsageError(f"{spec.title or spec.name}: its spec names no norms or no attention, which an export needs")


def architecture_of(config: Any, spec: ModelSpec, vocabulary: int) -> Architecture:
    """Return keys, extra tensors and notes for a model; `vocabulary` is the number of its embedding's rows.

    Raises UsageError, with every reason at once, for a config that llama.cpp would compute otherwise than transformers.
    """
    check_supported(spec)
    config = config.get_text_config()
    problems = list(_problems(config, spec))
    if problems:
        raise UsageError(*problems)
    prefix, heads = str(spec.gguf_architecture), heads_of(config)
    layer_norm = spec.norms[0].kind == "layer"
    keys: dict[str, Value] = {
        "vocab_size": u32(vocabulary),
        "context_length": u32(getattr(config, "model_max_length", None) or config.max_position_embeddings),
        "block_count": u32(config.num_hidden_layers),
        "embedding_length": u32(config.hidden_size),
        "feed_forward_length": u32(config.intermediate_size),
        "attention.head_count": u32(heads.queries),
        "attention.head_count_kv": u32(heads.keys),
        "attention.key_length": u32(heads.size),
        "attention.value_length": u32(heads.size),
        "rope.dimension_count": u32(heads.rotated),
    }
    if layer_norm:
        keys["attention.layer_norm_epsilon"] = f32(config.layer_norm_eps)
    else:
        keys["attention.layer_norm_rms_epsilon"] = f32(config.rms_norm_eps)
    constants = _constants(config, spec)
    names = {
        "attention_scale": "attention.scale",
        "embedding_scale": "embedding_scale",
        "residual_scale": "residual_scale",
        "logit_scale": "logit_scale",
        "attention_softcap": "attn_logit_softcapping",
        "final_softcap": "final_logit_softcapping",
    }
    keys |= {names[key]: f32(constants[key]) for key in names if key in spec.gguf.keys and constants[key] is not None}
    window_keys, window_notes = _windows(config, spec)
    rope_keys, tensors, rope_notes = _rope(config, prefix, heads)
    metadata = {f"{prefix}.{key}": value for key, value in (keys | window_keys | rope_keys).items()}
    return Architecture(metadata, tensors, (*window_notes, *rope_notes))


def _value(config: Any, constant: Any) -> float | None:
    held = getattr(config, constant.attribute, None) if constant is not None else None
    return None if held is None else float(held) ** constant.power


def _constants(config: Any, spec: ModelSpec) -> dict[str, float | None]:
    """Return the model's constants by the names that `GgufPoint.keys` uses, None for those it does not have."""
    attention = spec.attentions[0]

    def held(attribute: str | None) -> float | None:
        value = getattr(config, attribute, None) if attribute else None
        return float(value) if value else None

    return {
        "attention_scale": _value(config, attention.scale),
        "embedding_scale": _value(config, spec.embedding_scale),
        "residual_scale": _value(config, spec.residual_scale),
        "logit_scale": held(spec.head.scale),
        "attention_softcap": held(attention.softcap),
        "final_softcap": held(spec.head.softcap),
    }


def _problems(config: Any, spec: ModelSpec) -> Iterator[Problem]:
    """Yield what llama.cpp would compute otherwise than the config says."""
    point, heads = spec.gguf, heads_of(config)
    remedy = f"llama.cpp's architecture {spec.gguf_architecture!r} fixes this; the model cannot be run there."
    for glu in spec.glus:
        named = getattr(config, glu.activation_config, None) or glu.activation
        if named not in _ACTIVATIONS[glu.activation]:
            yield Problem(f"config.{glu.activation_config}", named, " or ".join(_ACTIVATIONS[glu.activation]), remedy)
    constants = _constants(config, spec)
    scale = constants["attention_scale"]
    if scale is not None and "attention_scale" not in point.keys:
        by_width = config.num_hidden_layers == point.hidden_scale_layers
        implied = (config.hidden_size // heads.queries if by_width else heads.size) ** -0.5
        if not math.isclose(scale, implied, rel_tol=1e-6):
            yield Problem("attention scale", scale, f"{implied:g} for this shape", remedy)
    for name in ("residual_scale", "logit_scale", "attention_softcap", "final_softcap"):
        if name not in point.keys and constants[name] not in (None, 1.0):
            yield Problem(name, constants[name], "none", remedy)
    # an architecture that caps attention's scores caps them, and the logits, whatever the file says
    capped = ("attention_softcap", "final_softcap") if "attention_softcap" in point.keys else ()
    for name in (*capped, "logit_scale"):
        if name in point.keys and constants[name] is None:
            yield Problem(name, None, "a number", remedy)
    if point.qk_norm_layers is not None:
        switch = spec.attentions[0].qk_norm_config or ""
        normalised = config.num_hidden_layers >= point.qk_norm_layers
        if bool(getattr(config, switch, True)) != normalised:
            expected = f"{normalised} for {config.num_hidden_layers} layers"
            yield Problem(f"config.{switch}", getattr(config, switch, True), expected, remedy)
    if point.rope_every:
        wanted = [int((layer + 1) % point.rope_every != 0) for layer in range(config.num_hidden_layers)]
        rotated = [int(bool(value)) for value in getattr(config, spec.attentions[0].rope_layers or "", wanted)]
        if rotated != wanted:
            yield Problem(f"config.{spec.attentions[0].rope_layers}", rotated, str(wanted), remedy)


# Windows --------------------------------------------------------------------------------------------------------------


def _windowed_layers(config: Any, attention: AttentionPoint) -> list[bool]:
    """Say of each layer whether it sees only a window."""
    layers = config.num_hidden_layers
    window = getattr(config, attention.sliding_window or "", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return [False] * layers
    kinds = getattr(config, attention.window_layers or "", None)
    return [kind == "sliding_attention" for kind in kinds] if kinds else [True] * layers


def _windows(config: Any, spec: ModelSpec) -> tuple[dict[str, Value], list[str]]:
    attention, every = spec.attentions[0], spec.gguf.window_every
    windowed = _windowed_layers(config, attention)
    window = getattr(config, attention.sliding_window or "", None)
    keys: dict[str, Value] = {}
    if "sliding_window" in spec.gguf.keys:
        keys["attention.sliding_window"] = u32(window if any(windowed) else 0)
    if every is None:
        if any(windowed) and window < config.max_position_embeddings:
            return keys, [
                f"llama.cpp computes {spec.gguf_architecture!r} without a sliding window: beyond {window} tokens its "
                "answers differ from the model's, which looks back no further"
            ]
        return keys, []
    usual = [layer % every < every - 1 for layer in range(len(windowed))]
    if windowed != usual and any(windowed):
        keys["attention.sliding_window_pattern"] = Value("bool", windowed)
    return keys, []


# Rotary positions -----------------------------------------------------------------------------------------------------


def _main_rope(config: Any) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention") or rope if isinstance(rope, dict) else {}


def _rope(
    config: Any, architecture: str, heads: Heads
) -> tuple[dict[str, Value], dict[str, torch.Tensor], tuple[str, ...]]:
    rope = _main_rope(config)
    keys = {"rope.freq_base": f32(rope["rope_theta"])}
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if isinstance(local, dict) and local:
        keys["rope.freq_base_swa"] = f32(local["rope_theta"])
        if local.get("rope_type", "default") != "default":
            raise UsageError(
                Problem("rope of sliding layers", local["rope_type"], "'default'", "llama.cpp has no other.")
            )
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return keys, {}, ()
    if kind == "linear":
        return keys | {"rope.scaling.type": text("linear"), "rope.scaling.factor": f32(rope["factor"])}, {}, ()
    if kind == "yarn":
        return keys | _yarn(rope, config), {}, ()
    if kind == "llama3" and architecture in _LLAMA3:
        return keys, {"rope_freqs": _llama3_factors(rope, heads.rotated)}, ()
    if kind == "longrope" and architecture in _LONGROPE:
        more, tensors = _longrope(rope, config)
        original = more["rope.scaling.original_context_length"].value
        note = (
            f"llama.cpp takes the long rope factors when its context is set beyond {original} tokens, transformers "
            "when the text is that long"
        )
        return keys | more, tensors, (note,)
    if kind == "dynamic":
        limit = config.max_position_embeddings
        return keys, {}, (f"dynamic rope scaling is not in GGUF: beyond {limit} tokens llama.cpp does not stretch",)
    remedy = f"llama.cpp's architecture {architecture!r} has no rope of this kind."
    raise UsageError(Problem("config.rope_parameters.rope_type", kind, "'default', 'linear' or 'yarn'", remedy))


def _yarn(rope: dict[str, Any], config: Any) -> dict[str, Value]:
    fixed = {"truncate": True, "beta_fast": 32, "beta_slow": 1}
    wrong = {name: rope[name] for name, value in fixed.items() if rope.get(name) not in (None, value)}
    if wrong:
        remedy = "llama.cpp's architecture has no other; the model cannot be run there."
        raise UsageError(*(Problem(f"config.rope_parameters.{n}", v, str(fixed[n]), remedy) for n, v in wrong.items()))
    factor = float(rope["factor"])
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    keys = {
        "rope.scaling.type": text("yarn"),
        "rope.scaling.factor": f32(factor),
        "rope.scaling.original_context_length": u32(original),
    }
    # llama.cpp multiplies by YaRN's own 0.1 ln(factor) + 1; what the config says beyond that is stated.
    implied = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    wanted = _yarn_magnitude(rope, factor, implied)
    if not math.isclose(wanted, implied, rel_tol=1e-7):
        keys["rope.scaling.attn_factor"] = f32(wanted / implied)
    return keys


def _yarn_magnitude(rope: dict[str, Any], factor: float, implied: float) -> float:
    """Return what transformers multiplies cosines and sines by (Peng et al. 2023, arXiv 2309.00071, section 3.4)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    if above and below and factor > 1:
        return (0.1 * above * math.log(factor) + 1.0) / (0.1 * below * math.log(factor) + 1.0)
    return implied


def _llama3_factors(rope: dict[str, Any], rotated: int) -> torch.Tensor:
    """Return by what each pair's frequency is divided, fp32 [rotated / 2].

    Wavelengths beyond `original / low_freq_factor` are stretched by the factor, those below
    `original / high_freq_factor` stay, and between them the two frequencies are mixed.
    """
    steps = torch.arange(0, rotated, 2, dtype=torch.float32)
    frequencies = 1.0 / (rope["rope_theta"] ** (steps / rotated))
    waves = 2 * math.pi / frequencies
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    mix = (original / waves - low) / (high - low)
    between = 1 / ((1 - mix) / factor + mix)
    factors = torch.where(waves > original / low, torch.full_like(waves, factor), between)
    return torch.where(waves < original / high, torch.ones_like(waves), factors)


def _longrope(rope: dict[str, Any], config: Any) -> tuple[dict[str, Value], dict[str, torch.Tensor]]:
    """Return the keys and the two tables of LongRoPE (Ding et al. 2024, arXiv 2402.13753)."""
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    original = original or config.max_position_embeddings
    scale = rope.get("factor") or config.max_position_embeddings / original
    magnitude = rope.get("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    tables = {
        f"rope_factors_{length}": torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)
        for length in ("long", "short")
    }
    keys = {
        "rope.scaling.original_context_length": u32(original),
        "rope.scaling.attn_factor": f32(magnitude),
    }
    return keys, tables
