"""Which tensor of a GGUF file gets which type: the mixtures that llama.cpp's quantiser makes, by its rules.

A mixture is called by the type that most tensors get, and s, m or l for how many get a better one. The tensors that
hurt most when rounded (the output, the values and the second feed-forward matrix, in the first and last layers and some
between) get more bits. The rules are a function of names and shapes; nothing is measured.
"""

import re
from collections.abc import Mapping, Sequence

from attrs import field, frozen

from fastft.errors import Problem, UsageError, did_you_mean
from fastft.export.gguf.quants.types import TYPES


@frozen
class Mixture:
    """A mixture: the type of most tensors, the file's number for it, and types that embedding and output always get."""

    name: str
    type: str
    file_type: int  # `general.file_type` (enum llama_ftype)
    output: str | None = None
    needs_importance: bool = False


@frozen
class ModelFacts:
    """What the rules ask about a model: GGUF's name of its architecture, and its sizes."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share a key and value head."""
        return self.heads // self.kv_heads if self.kv_heads else 0


_TABLE = (
    Mixture("f32", "f32", 0),
    Mixture("f16", "f16", 1),
    Mixture("bf16", "bf16", 32),
    Mixture("q4_0", "q4_0", 2),
    Mixture("q4_1", "q4_1", 3),
    Mixture("q5_0", "q5_0", 8),
    Mixture("q5_1", "q5_1", 9),
    Mixture("q8_0", "q8_0", 7),
    Mixture("q2_k", "q2_k", 10),
    Mixture("q2_k_s", "q2_k", 21, needs_importance=True),
    Mixture("q2_k_l", "q2_k", 10, output="q8_0"),
    Mixture("q3_k_s", "q3_k", 11),
    Mixture("q3_k_m", "q3_k", 12),
    Mixture("q3_k_l", "q3_k", 13),
    Mixture("q4_k_s", "q4_k", 14),
    Mixture("q4_k_m", "q4_k", 15),
    Mixture("q5_k_s", "q5_k", 16),
    Mixture("q5_k_m", "q5_k", 17),
    Mixture("q6_k", "q6_k", 18),
    Mixture("iq4_nl", "iq4_nl", 25),
    Mixture("iq4_xs", "iq4_xs", 30),
    Mixture("tq1_0", "tq1_0", 36),
    Mixture("tq2_0", "tq2_0", 37),
    Mixture("mxfp4", "mxfp4", 38),
)
MIXTURES: dict[str, Mixture] = {entry.name: entry for entry in _TABLE}
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m", "mxfp4_moe": "mxfp4"}

# What stands in for a type whose block does not divide a row.
_FALLBACK = {
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "tq1_0": "q4_0",
    "tq2_0": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    "iq4_xs": "iq4_nl",
}
# Parts of a name (before ".weight", where that is said) that keep a tensor as it is: norms, routers, small tensors.
_KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj|ssm_conv1d"
    r"|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight"
    r"|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight"
    r"|attn_rel_b\.weight|\.position_embd|sam\.(pos_embd|neck\.|net_)|\.rel_pos|\.patch_(embd|merger)"
    r"|a\.rvq\.codebook|mm\.a\.code_embd|^(position_embd|token_types)\.weight$"
)
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
# The first of these that occurs in a name is what the tensor is.
_ROLES = (
    ("attn_qkv.weight", "value"),
    ("attn_kv_b.weight", "value"),
    ("attn_v.weight", "value"),
    ("attn_k.weight", "key"),
    ("attn_output.weight", "attention_output"),
    ("ffn_down", "down"),
)
# Architectures whose models of 80 layers (jais2: 68) count as "70B", where the values are shared by many heads.
_70B = {"llama": 80, "qwen2": 80, "olmo": 80, "deci": 80, "jais2": 68}


def mixture(name: str | Mixture) -> Mixture:
    """Return the record of a mixture's name (in any case, or an alias); `UsageError` if there is none."""
    if isinstance(name, Mixture):
        return name
    key = str(name).lower()
    found = MIXTURES.get(ALIASES.get(key, key))
    if found is None:
        raise UsageError(Problem("quant", name, f"one of {', '.join(MIXTURES)}", did_you_mean(key, MIXTURES)))
    return found


def tensor_types(
    shapes: Mapping[str, Sequence[int]], quant: str | Mixture, model: ModelFacts, *, importance: bool = False
) -> dict[str, str | None]:
    """Return the type of every tensor of a file; None for one that keeps the type a 16- or 32-bit file gives it.

    shapes: the GGUF names of ALL the model's tensors and their shapes with the columns last, as torch has them (the
    rules count layers). importance: an importance matrix is at hand, which changes a few types. Raises `UsageError` for
    an unknown name, and for a mixture that must not be made without an importance matrix.
    """
    chosen = mixture(quant)
    if chosen.needs_importance and not importance:
        remedy = "give an importance matrix (fastft.export.gguf.imatrix makes one)"
        raise UsageError(Problem("quant", chosen.name, "a mixture that needs no importance matrix", remedy))
    rules = _Rules(chosen, model, importance, tied="output.weight" not in shapes)
    rules = rules.counted(list(shapes))
    return {name: rules.type_of(name, shape) for name, shape in shapes.items()}


def is_quantized(name: str, shape: Sequence[int]) -> bool:
    """Say whether a mixture may change a tensor's type: matrices that are no norms, routers or the like."""
    dimensions = max((len(shape) - place for place, size in enumerate(shape) if size > 1), default=1)
    return dimensions >= 2 and name.endswith("weight") and not _KEPT.search(name)


def layer_of(name: str) -> int:
    """Return the number in a name "blk.N.…", -1 for any other."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found.group(1)) if found else -1


def _role(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in _EMBEDDINGS:
        return "embedding"
    return next((role for part, role in _ROLES if part in name), "other")


def _more_bits(index: int, count: int) -> bool:
    """Say whether a layer is among those that get more bits: the first and last eighth, and every third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


@frozen
class _Rules:
    """The rules for one model and mixture; `place` numbers the tensors of a role in the file's order."""

    mix: Mixture
    model: ModelFacts
    importance: bool
    tied: bool
    place: Mapping[str, int] = field(factory=dict)
    values: int = 0

    def counted(self, names: list[str]) -> "_Rules":
        """Return the rules with the tensors counted as a file has them: by layer, then by name."""
        place, count = {}, {"value": 0, "down": 0}
        for name in sorted(names, key=lambda name: (layer_of(name), name)):
            role = _role(name)
            if role in count:
                place[name] = count[role]
                count[role] += 1
        return _Rules(self.mix, self.model, self.importance, self.tied, place, count["value"])

    def type_of(self, name: str, shape: Sequence[int]) -> str | None:
        if not is_quantized(name, shape):
            return None
        role, default = _role(name), self.mix.type
        if self.mix.output and role in ("embedding", "output"):
            return _fitting(self.mix.output, shape[-1])
        if default in ("f32", "f16", "bf16"):
            return default
        return _fitting(self._wanted(name, role, shape), shape[-1])

    def _wanted(self, name: str, role: str, shape: Sequence[int]) -> str:
        mix, default = self.mix.name, self.mix.type
        if role == "output" or (self.tied and role == "embedding"):
            plain = mix == "mxfp4" or self.model.architecture == "falcon" or shape[-1] % TYPES[default].block_size
            return "q8_0" if plain or default == "q8_0" else "q6_k"
        if mix == "mxfp4":  # the experts' matrices, which are three-dimensional
            return "mxfp4" if len(shape) > 2 and shape[-3] > 1 else "q8_0"
        if role == "embedding":
            return "q4_k" if mix in ("tq1_0", "tq2_0") else default
        if role == "value":
            return self._value(self.place[name])
        if role == "key":
            return "q8_0" if self.model.experts == 8 else default
        if role == "down":
            return self._down(layer_of(name) if self.model.experts > 1 else self.place[name])
        return self._attention_output() if role == "attention_output" else default

    def _value(self, index: int) -> str:
        mix, shared = self.mix.name, self.model.heads_per_kv >= 4
        wanted = self.mix.type
        if mix in ("q2_k", "q2_k_l"):
            wanted = "q4_k" if shared else "q3_k"
        elif mix == "q2_k_s" and shared:
            wanted = "q4_k"
        elif mix == "q3_k_m":
            wanted = "q5_k" if index < 2 else "q4_k"
        elif mix == "q3_k_l" or (mix in ("iq4_nl", "iq4_xs") and shared) or (mix == "q4_k_s" and index < 4):
            wanted = "q5_k"
        elif mix in ("q4_k_m", "q5_k_m") and _more_bits(index, self.values):
            wanted = "q6_k"
        if self._is_70b() and wanted in ("q3_k", "q4_k"):
            wanted = "q5_k"
        return "q8_0" if self.model.experts == 8 else wanted

    def _is_70b(self) -> bool:
        model = self.model
        if _70B.get(model.architecture) != model.layers:
            return False
        return model.architecture != "llama" or model.heads != model.kv_heads

    def _down(self, index: int) -> str:
        mix, layers, falcon = self.mix.name, self.model.layers, self.model.architecture == "falcon"
        early, more = index < layers // 8, _more_bits(index, layers)
        wanted = self.mix.type
        if mix in ("q2_k", "q2_k_l"):
            wanted = "q3_k"
        elif mix == "q2_k_s" and early:
            wanted = "q4_k"
        elif mix == "q3_k_m":
            wanted = "q5_k" if index < layers // 16 else "q4_k" if not falcon or more else "q3_k"
        elif mix == "q3_k_l":
            wanted = "q4_k" if falcon else "q5_k"
        elif mix == "q4_k_m" and falcon:
            wanted = "q6_k" if index < layers // 16 else "q5_k" if more else "q4_k"
        elif mix in ("q4_k_m", "q5_k_m") and more:
            wanted = "q6_k"
        elif early and ((mix in ("iq4_nl", "iq4_xs") and not self.importance) or (mix == "q4_k_s" and not falcon)):
            wanted = "q5_k"
        elif mix in ("q4_0", "q5_0") and self.importance and early:
            wanted = "q4_1" if mix == "q4_0" else "q5_1"
        return wanted

    def _attention_output(self) -> str:
        mix, default = self.mix.name, self.mix.type
        if self.model.architecture == "falcon":
            return "q4_k" if mix == "q3_k_l" else default
        if self.model.experts == 8:
            better = ("q2_k", "q2_k_l", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq4_xs")
            return "q5_k" if mix in better else default
        return {"q2_k": "q3_k", "q2_k_l": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(mix, default)


def _fitting(wanted: str, columns: int) -> str:
    """Return the type, or what stands in for it where rows of `columns` weights are no whole number of its blocks."""
    if columns % TYPES[wanted].block_size == 0:
        return wanted
    other = _FALLBACK.get(wanted, wanted)
    return other if columns % TYPES[other].block_size == 0 else "f16"
