"""Rotary position embedding of queries and keys, found by the function that applies it within an attention module."""

import torch
from torch import fx, nn

from fastft.graph.passes.context import Context, Replacement, refused, replace_if_proved, replace_regions
from fastft.graph.regions import Region
from fastft.graph.report import Rewrite
from fastft.graph.verify import present_shape
from fastft.kernels import rope
from fastft.registry.spec import AttentionPoint

RULE = "rope"


def replace_rotations(graph_module: fx.GraphModule, context: Context) -> tuple[Rewrite, ...]:
    """Replace the regions of the rotation function that the spec names for its attention modules."""
    points = [point for point in context.spec.attentions if point.rope_function is not None]
    return replace_regions(graph_module, context, RULE, points, _replace, _of_function)


def _of_function(_module: nn.Module, nodes: list[fx.Node], point: AttentionPoint) -> list[fx.Node]:
    """Return the nodes that the rotation function made: none in a layer without it, as every fourth of SmolLM3."""
    return [node for node in nodes if f", in {point.rope_function}\n" in (node.meta.get("stack_trace") or "")]


def _replace(graph_module: fx.GraphModule, context: Context, region: Region, point: AttentionPoint) -> Rewrite:
    tensors = [n for n in region.inputs if isinstance(n.meta.get("example_value"), torch.Tensor)]
    tables = [node for node in tensors if node.meta["example_value"].dim() == 3]
    states = [node for node in tensors if node.meta["example_value"].dim() == 4]
    if len(tables) != 2 or len(states) != 2 or len(region.outputs) != 2:
        return refused(
            RULE,
            region.name,
            f"has {len(states)} states, {len(tables)} tables, {len(region.outputs)} outputs, not 2, 2, 2",
        )
    width = int(tables[0].meta["example_value"].shape[-1])
    strange = _unlike(tables, context, point.rope_table, width)
    if strange:
        return refused(RULE, region.name, strange)
    implementation = context.implementations[RULE]
    rotate = rope.rope if implementation == "op" else rope.ref.rope
    dtype = region.outputs[0].meta["example_value"].dtype

    def function(q, k, cos, sin, layout, table, precision):
        cos, sin = unique(cos, table, width), unique(sin, table, width)
        if precision == "input":  # where the tables are wider, the result may be as wide
            return rotate(q.to(dtype), k.to(dtype), cos, sin, layout)
        wide_q, wide_k = rotate(q.float(), k.float(), cos.float(), sin.float(), layout)
        return wide_q.to(dtype), wide_k.to(dtype)

    # Random tables need the repetition that real ones have.
    inputs = {node: _table(node.meta["example_value"], point.rope_table, seed) for seed, node in enumerate(tables)}
    arguments = (*states, *tables, point.rope, point.rope_table, point.rope_precision)
    return replace_if_proved(
        graph_module, context, region, Replacement(RULE, function, arguments, implementation, inputs=inputs)
    )


def unique(table: torch.Tensor, kind: str, width: int) -> torch.Tensor:
    """Return the R/2 distinct columns of a cosine or sine table [B, T, R] that repeats them as `kind` says."""
    return table[..., : width // 2] if kind == "halves" else table[..., ::2]


def _repeat(half: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.cat([half, half], dim=-1) if kind == "halves" else half.repeat_interleave(2, dim=-1)


def _unlike(tables: list[fx.Node], context: Context, kind: str, width: int) -> str:
    """Say why the tables of the captured call are not known to repeat as the spec says, which the proof takes as given;
    nothing if they do."""
    for node in tables:
        real = context.binding.activations.get(node.name)
        if real is None:
            return f"its table {node.name} is made within the graph, so that its repetition cannot be seen"
        if width % 2 or not torch.equal(_repeat(unique(real, kind, width), kind), real):
            return f"its tables do not repeat as the spec's {kind!r} says"
    return ""


def _table(example: torch.Tensor, kind: str, seed: int) -> torch.Tensor:
    shape = present_shape(example)
    generator = torch.Generator(example.device).manual_seed(seed)
    half = torch.randn([*shape[:-1], shape[-1] // 2], generator=generator, device=example.device).to(example.dtype)
    return _repeat(half, kind)
