"""The frozen records that describe a model family: where it can be made faster and how it is to be treated.

A spec holds no graph pattern. A patch point names module classes and the constants of the role they play; the graph
passes find those modules in a captured graph by identity and prove each replacement before making it.
"""

from collections.abc import Mapping
from typing import Literal

from attrs import field, frozen

CastOrder = Literal["before_weight", "after_weight"]
Activation = Literal["silu", "gelu_tanh", "gelu"]
RopeLayout = Literal["half", "interleaved"]
RopeTable = Literal["halves", "pairs"]
Status = Literal["supported", "unsupported", "experimental"]


@frozen
class NormPoint:
    """Normalisation modules over the last dimension.

    `y = x_hat * (offset + weight)`. With `cast="before_weight"` x_hat is rounded to the input's dtype before the
    weight is applied (Llama); with `"after_weight"` all is fp32 until the end (Gemma, OLMo 2).
    `eps` names the module's attribute that holds epsilon.
    """

    classes: tuple[str, ...]
    kind: Literal["rms", "layer"] = "rms"
    eps: str = "variance_epsilon"
    offset: float = 0.0
    cast: CastOrder = "before_weight"


@frozen
class GluPoint:
    """Gated feed-forward modules, `down(activation(gate(x)) * up(x))`.

    `packed` names the one projection that gives gate (first half) and up (second half), where there is one.
    """

    classes: tuple[str, ...]
    activation: Activation = "silu"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    packed: str | None = None


@frozen
class AttentionPoint:
    """Attention modules: their projections, and how they rotate queries and keys.

    `rope` says which features form a rotated pair: `half` (i, i + R/2) or `interleaved` (2i, 2i + 1).
    `rope_table` says how the cosine table repeats its R/2 values: `halves` (all, then all again) or `pairs` (each twice).
    `rope_function` is the function that applies it, `None` where positions are not rotated.
    `softcap` and `sliding_window` name attributes of the model's config.
    """

    classes: tuple[str, ...]
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    packed: str | None = None
    output: str = "o_proj"
    rope: RopeLayout = "half"
    rope_table: RopeTable = "halves"
    rope_function: str | None = "apply_rotary_pos_emb"
    softcap: str | None = None
    sliding_window: str | None = None


@frozen
class HeadPoint:
    """The output head: `logits = softcap(scale * head(hidden))`.

    `scale` and `softcap` name attributes of the model's config; `scale_inverse` says that logits are divided by it.
    """

    module: str = "lm_head"
    scale: str | None = None
    scale_inverse: bool = False
    softcap: str | None = None


@frozen
class Capability:
    """Whether something can be done with a family, and why not, or with what care."""

    status: Status = "supported"
    note: str = ""


@frozen
class ModelSpec:
    """All that fastft knows of one model family."""

    name: str
    model_types: tuple[str, ...]
    layer_classes: tuple[str, ...]
    title: str = ""
    patterns: tuple[str, ...] = ()
    norms: tuple[NormPoint, ...] = ()
    glus: tuple[GluPoint, ...] = ()
    attentions: tuple[AttentionPoint, ...] = ()
    head: HeadPoint = HeadPoint()
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    keep_16bit: tuple[str, ...] = ("lm_head",)
    chat_format: str | None = None
    ollama_template: str | None = None
    gguf_architecture: str | None = None
    trainer: str = "sft"
    exporter: str = "standard"
    capabilities: Mapping[str, Capability] = field(factory=dict)
    source: str = ""
    """Where the record came from: a file, an entry point, or `register`."""
