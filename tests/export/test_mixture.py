"""Which tensor gets which type, against tables of what llama.cpp's quantiser chose for the same names and shapes.

`mixtures.json` was made with `llama_model_quantize` (llama-cpp-python 0.3.36) from files of these shapes: for each role
one letter, or one a layer. Importance "+importance" stands there where the choice differs.
"""

import json
from pathlib import Path

import pytest

from fastft.errors import UsageError
from fastft.export.gguf.mixture import MIXTURES, ModelFacts, is_quantized, mixture, tensor_types
from fastft.export.gguf.quants import TYPES

TABLES = json.loads(Path(__file__).with_name("mixtures.json").read_text("utf-8"))
MODELS = TABLES["models"]


def shapes_of(architecture, layers, heads, kv, experts, width, hidden, tied, fused=False):
    size = 32
    shapes = {"token_embd.weight": (64, width), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (64, width)
    for layer in range(layers):
        block = {"attn_norm": (width,), "ffn_norm": (width,), "attn_output": (width, heads * size)}
        if fused:
            block["attn_qkv"] = ((heads + 2 * kv) * size, width)
        else:
            block |= {"attn_q": (heads * size, width), "attn_k": (kv * size, width), "attn_v": (kv * size, width)}
        if experts:
            block |= {"ffn_gate_inp": (experts, width), "ffn_down_exps": (experts, width, hidden)}
            block |= {"ffn_gate_exps": (experts, hidden, width), "ffn_up_exps": (experts, hidden, width)}
        else:
            block |= {"ffn_up": (hidden, width), "ffn_down": (width, hidden)}
            block |= {} if fused else {"ffn_gate": (hidden, width)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def expected(table, shapes, layers):
    types = {}
    for role, letters in table.items():
        whole = f"{role}.weight"
        names = [whole] if whole in shapes else [f"blk.{layer}.{role}.weight" for layer in range(layers)]
        letters = letters * len(names) if len(letters) == 1 else letters
        types |= {name: TABLES["letters"][letter] for name, letter in zip(names, letters, strict=True)}
    return types


@pytest.mark.parametrize("name", MODELS)
def test_types_are_those_that_llama_cpp_chooses(name):
    model, tables = MODELS[name]["model"], MODELS[name]["types"]
    shapes = shapes_of(*model)
    facts = ModelFacts(*model[:5])
    tried = 0
    for quant in MIXTURES:
        if quant == "f32":
            continue
        for importance in (False, True):
            table = tables.get(quant + "+importance" * importance) or tables.get(quant)
            if table is None or (quant == "q2_k_s" and not importance):
                continue
            types = tensor_types(shapes, quant, facts, importance=importance)
            types = {key: kind for key, kind in types.items() if kind}
            assert types == expected(table, shapes, model[1]), (quant, importance)
            tried += 1
    assert tried >= 36


def test_the_order_of_the_names_does_not_matter():
    model = MODELS["llama16"]["model"]
    shapes = shapes_of(*model)
    backwards = dict(reversed(shapes.items()))
    facts = ModelFacts(*model[:5])
    assert tensor_types(shapes, "q4_k_m", facts) == tensor_types(backwards, "q4_k_m", facts)


def test_every_mixture_gives_types_that_exist_and_fit():
    shapes = shapes_of("llama", 3, 4, 2, 0, 288, 96, False)
    for quant in MIXTURES:
        types = tensor_types(shapes, quant, ModelFacts("llama", 3, 4, 2), importance=True)
        assert types["output_norm.weight"] is None
        for name, kind in types.items():
            assert kind is None or shapes[name][-1] % TYPES[kind].block_size == 0, (quant, name, kind)


def test_a_type_forced_on_the_embedding_falls_back_too():
    types = tensor_types({"token_embd.weight": (64, 48)}, "q2_k_l", ModelFacts("llama", 1, 1, 1))
    assert types == {"token_embd.weight": "f16"}


def test_what_stays_as_it_is():
    assert is_quantized("blk.0.ffn_down.weight", (8, 8))
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_gate_inp.weight", "position_embd.weight", "blk.0.attn_q.bias"):
        assert not is_quantized(name, (8, 8))
    assert not is_quantized("blk.0.ffn_down.weight", (1, 8))  # a single row counts as a vector
    assert is_quantized("blk.0.ffn_down_exps.weight", (2, 1, 8))


def test_names():
    assert mixture("Q4_K_M").file_type == 15
    assert mixture("q4_k") is MIXTURES["q4_k_m"]
    with pytest.raises(UsageError, match=r"q4_k_x.*did you mean 'q4_k_"):
        mixture("q4_k_x")
    with pytest.raises(UsageError, match="importance matrix"):
        tensor_types({}, "q2_k_s", ModelFacts("llama", 1, 1, 1))
