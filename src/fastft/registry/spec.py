"""The frozen records that describe a model family: where it can be made faster and how it is to be treated.

A spec holds no graph pattern. A patch point names module classes and the constants of the role they play; the graph
passes find those modules in a captured graph by identity and prove each replacement before making it.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

from attrs import field, frozen

CastOrder = Literal["before_weight", "after_weight"]
Activation = Literal["silu", "gelu_tanh", "gelu"]
RopeLayout = Literal["half", "interleaved"]
RopeTable = Literal["halves", "pairs"]
RopePrecision = Literal["input", "float32"]
QkNorm = Literal["head", "projection"]
Block = Literal["pre", "post", "sandwich", "parallel"]
Status = Literal["supported", "unsupported", "experimental"]
GgufKey = Literal[
    "attention_scale",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
    "attention_softcap",
    "final_softcap",
    "sliding_window",
]
CapabilityName = Literal["full", "lora", "qlora", "int8", "packing", "gguf"]


@frozen
class ConfigValue:
    """A number that the model's config holds: `getattr(config, attribute) ** power`."""

    attribute: str
    power: float = 1.0


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
    `activation` is what the family's published models use; `activation_config` names the config attribute that
    chooses it, so that a model that differs can be told.
    """

    classes: tuple[str, ...]
    activation: Activation = "silu"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    packed: str | None = None
    activation_config: str = "hidden_act"


@frozen
class AttentionPoint:
    """Attention modules: their projections, and how they rotate queries and keys.

    `rope` says which features form a rotated pair: `half` (i, i + R/2) or `interleaved` (2i, 2i + 1).
    `rope_table` says how the cosine table repeats its R/2 values: `halves` (all, then all again) or
    `pairs` (each twice).
    `rope_function` is the function that applies it, `None` where positions are not rotated.
    `rope_precision` is the dtype in which the products are formed: the input's, or fp32 with one cast at the end.
    `rope_layers` names a config attribute with one entry a layer that is true (or `"sliding_attention"`) where the
    layer rotates; `None`: every layer does.
    `qk_norm` says over what queries and keys are normalised by modules `q_norm` and `k_norm` before the rotation: each
    `head`, or the whole `projection`; `qk_norm_config` names the config attribute that switches it on, if one does.
    `scale` is what scores are multiplied by, `None` for `head_dim ** -0.5`.
    `softcap` and `sliding_window` name attributes of the model's config, and `window_layers` the one that lists, a
    layer each, which have the window (`"sliding_attention"`); `None`: every layer has.
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
    rope_precision: RopePrecision = "input"
    rope_layers: str | None = None
    qk_norm: QkNorm | None = None
    qk_norm_config: str | None = None
    scale: ConfigValue | None = None
    window_layers: str | None = None


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
class GgufPoint:
    """What llama.cpp makes of a GGUF file of the architecture, where that has to be told or allowed for.

    `rope` says which features llama.cpp rotates as a pair; projections of models that pair others are reordered.
    `keys` names the model's constants that the file states; llama.cpp knows the others by the architecture alone.
    `window_every` n: every n-th layer sees all, the others a sliding window, unless the file lists them; `None`:
    llama.cpp computes this architecture without windows. `rope_every` n: every n-th layer is not rotated, whatever the
    config says. `biases` are the projections whose bias is read. A model of `hidden_scale_layers` layers has its scores
    multiplied by `(hidden_size / heads) ** -0.5` where others have `head_dim ** -0.5`. Queries and keys are normalised
    in models of `qk_norm_layers` layers and more, and in no others; `None`: where the file has the norms.
    """

    rope: RopeLayout = "half"
    keys: tuple[GgufKey, ...] = ()
    window_every: int | None = None
    rope_every: int | None = None
    biases: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    hidden_scale_layers: int | None = None
    qk_norm_layers: int | None = None


@frozen
class Capability:
    """Whether something can be done with a family, and why not, or with what care."""

    status: Status = "supported"
    note: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.note}" if self.note else self.status


@frozen
class Variant:
    """Models of the family that differ in nothing but their name and the way they chat."""

    title: str
    patterns: tuple[str, ...]
    chat_format: str | None = None


@frozen(eq=False, repr=False)
class Capabilities(Mapping[str, Capability]):
    """A mapping that cannot change and can be hashed, copied and pickled with the record that holds it."""

    entries: tuple[tuple[str, Capability], ...] = ()

    @classmethod
    def of(cls, given: "Mapping[str, Capability]") -> "Capabilities":
        """Copy any mapping."""
        return given if isinstance(given, cls) else cls(tuple(sorted(given.items())))

    def __getitem__(self, name: str) -> Capability:
        return dict(self.entries)[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __hash__(self) -> int:
        return hash(self.entries)

    def __repr__(self) -> str:
        return repr(dict(self.entries))


@frozen
class ModelSpec:
    """All that fastft knows of one model family.

    `patterns` are globs over model ids, case ignored: one with a slash is matched with the whole id, one without with
    its last part. `not_patterns` name models that a pattern would catch but that have another architecture.
    `embedding_scale` multiplies the embedded tokens, `residual_scale` what each block adds to the residual stream.
    `block` says where a layer's norms stand: before attention and feed-forward (`pre`), behind them (`post`), both
    (`sandwich`), or once before both, which run side by side (`parallel`).
    `source` says where the record came from: a file, an entry point, or `register`; it is no part of its identity.
    """

    name: str
    model_types: tuple[str, ...]
    layer_classes: tuple[str, ...]
    title: str = ""
    patterns: tuple[str, ...] = ()
    not_patterns: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    norms: tuple[NormPoint, ...] = ()
    glus: tuple[GluPoint, ...] = ()
    attentions: tuple[AttentionPoint, ...] = ()
    head: HeadPoint = HeadPoint()
    embedding_scale: ConfigValue | None = None
    residual_scale: ConfigValue | None = None
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    keep_16bit: tuple[str, ...] = ("lm_head",)
    chat_format: str | None = None
    gguf_architecture: str | None = None
    gguf: GgufPoint = GgufPoint()
    trainer: str = "sft"
    exporter: str = "standard"
    block: Block = "pre"
    capabilities: Mapping[str, Capability] = field(factory=Capabilities, converter=Capabilities.of)
    source: str = field(default="", eq=False)
