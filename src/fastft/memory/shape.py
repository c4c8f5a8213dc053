"""The sizes of a model that memory and time depend on, read from its config and spec. Needs no torch."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from attrs import frozen

from fastft.errors import Problem, UsageError
from fastft.registry.spec import ModelSpec


@frozen
class Shape:
    """Sizes of a decoder: widths are features a token. `query` and `key` are heads times head size.

    `windows` holds for every layer how many tokens back attention sees (None: all). `parallel`: attention and
    feed-forward read the same norm. `normed_outputs`: what a block adds to the residual stream is normalised first.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    query: int
    key: int
    vocabulary: int
    tied: bool
    windows: tuple[int | None, ...]
    packed_attention: bool = False
    packed_feed_forward: bool = False
    parallel: bool = False
    normed_outputs: bool = False
    normed_inputs: bool = True
    layer_norm: bool = False
    projection_norm: bool = False
    softcap: bool = False

    @cached_property
    def linears(self) -> tuple[tuple[str, int, int], ...]:
        """Return (role, in, out) of the linears of a layer, those of one input after each other."""
        attention = (
            [("projection", self.hidden, self.query + 2 * self.key)]
            if self.packed_attention
            else [("projection", self.hidden, width) for width in (self.query, self.key, self.key)]
        )
        wide = [2 * self.intermediate] if self.packed_feed_forward else [self.intermediate] * 2
        return (
            *attention,
            ("output", self.query, self.hidden),
            *(("feed_forward", self.hidden, width) for width in wide),
            ("down", self.intermediate, self.hidden),
        )

    @cached_property
    def layer_weights(self) -> int:
        """Return the weights of one layer's linears."""
        return sum(given * made for _, given, made in self.linears)

    @property
    def embedding_weights(self) -> int:
        """Return the weights of embedding and head, once where they are tied."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def lora_parameters(self, rank: int) -> int:
        """Return the parameters of LoRA of one rank on all linears of all layers."""
        return self.layers * rank * sum(given + made for _, given, made in self.linears)


def shape_of(config: Mapping[str, Any], spec: ModelSpec) -> Shape:
    """Read a model's config (config.json as a mapping). Raises UsageError that names every size that is missing."""
    config = config.get("text_config") or config
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    problems = [
        Problem(f"config {name}", config.get(name), "a positive number")
        for name in names
        if not isinstance(config.get(name), int) or config[name] < 1
    ]
    if problems:
        raise UsageError(*problems)
    layers, hidden, intermediate, heads, vocabulary = (config[name] for name in names)
    size = config.get("head_dim") or hidden // heads
    groups = config.get("num_key_value_heads") or heads
    attention = spec.attentions[0] if spec.attentions else None
    return Shape(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        query=heads * size,
        key=groups * size,
        vocabulary=vocabulary,
        # transformers leaves out of config.json what equals its base class's default, which is True
        tied=bool(config.get("tie_word_embeddings", True)),
        windows=_windows(config, layers),
        packed_attention=bool(attention and attention.packed),
        packed_feed_forward=any(point.packed for point in spec.glus),
        parallel=spec.block == "parallel",
        normed_outputs=spec.block in ("sandwich", "post"),
        normed_inputs=spec.block != "post",
        layer_norm=any(point.kind == "layer" for point in spec.norms),
        projection_norm=bool(attention and attention.qk_norm == "projection"),
        softcap=bool(attention and attention.softcap and config.get(attention.softcap)),
    )


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Return the longest sequence that a config's rotary positions serve as they are; None where it does not say.

    YaRN's config has the length before it was stretched as `max_position_embeddings`, others that behind it.
    """
    config = config.get("text_config") or config
    length = config.get("max_position_embeddings")
    if not isinstance(length, int) or length < 1:
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    tables = [rope, *(table for table in rope.values() if isinstance(table, Mapping))]  # of kinds of layers
    yarn = [table for table in tables if "yarn" in (table.get("rope_type"), table.get("type"))]
    stretched = (int(t["factor"] * (t.get("original_max_position_embeddings") or length)) for t in yarn)
    return max(length, *stretched, 0)


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    kinds = config.get("layer_types")
    if not kinds:
        return (window,) * layers
    return tuple(window if "sliding" in kind else None for kind in kinds)
