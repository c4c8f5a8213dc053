"""Tiny models in NF4 with LoRA, compiled, and the judge of two steps that are to have the same bits."""

import torch
from tiny import in_nf4, with_lora

import fastft
from fastft.graph.twin import tiny_model
from fastft.memory.estimate import Mode
from fastft.memory.offload import Offloader
from fastft.state import get_state

# Whole blocks in a row: bitsandbytes dequantises others otherwise on a CPU, and proofs then refuse, rightly.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
# Modes of five layers: with copies of weights and without, moved to the CPU and not.
MIXED = (Mode("keep"), Mode("keep", False, True), Mode("outputs", True, True), Mode("min", False, True), Mode("min"))


def nf4(family="llama", dtype=torch.float32, dense=(), nested=True, lora=None, **changes):
    """Return a tiny model with LoRA whose layers' linears are in NF4, but for those whose last name is in `dense`.

    `lora`: further arguments of its config.
    """
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3_text" else {}
    model = tiny_model(family, dtype=dtype, **{**SIZES, **kinds, **changes})
    model.set_attn_implementation("eager")
    return with_lora(in_nf4(model, dense, nested), dtype, **(lora or {})).train()


def compiled(modes=None, plan="keep", backend="eager", compute="exact", **changes):
    """Return a compiled model, its layers in `modes` if they are given, and its plan."""
    torch._dynamo.reset()
    model = fastft.compile(nf4(**changes), plan=plan, backend=backend, compute=compute)
    planned = get_state(model).compiled.planned
    if modes is not None:
        planned.chosen = tuple(modes)
        planned.offloader = Offloader(torch.device("cpu"), least_bytes=1 << 12)
    return model, planned


def same(one, other):
    """Say whether logits, loss and every gradient of two steps have the same bits."""
    return (
        torch.equal(one[0], other[0])
        and torch.equal(one[1], other[1])
        and one[2].keys() == other[2].keys()
        and all(torch.equal(gradient, other[2][name]) for name, gradient in one[2].items())
    )
