"""`check_spec` on the specs that ship, and on wrong ones."""

import attrs
import pytest
from tiny import FAMILIES

from fastft.graph.check import check_spec
from fastft.registry.resolve import resolve


@pytest.mark.parametrize("family", FAMILIES)
def test_shipped_specs_hold(family):
    check = check_spec(resolve({"model_type": family}))
    assert check.ok, str(check)
    assert len(check.claims) >= 12


WRONG = {
    "cast order": (lambda s: norms(s, cast="after_weight"), ["llama bfloat16: norm regions"]),
    "class name": (lambda s: norms(s, classes=("LlamaNorm",)), [
        "llama: norms[0].classes LlamaNorm", "llama float32: norm regions", "llama bfloat16: norm regions",
    ]),
    "layer class": (lambda s: attrs.evolve(s, layer_classes=("LlamaBlock",)), [
        "llama: layer_classes LlamaBlock", "llama float32: norm regions", "llama float32: glu regions",
        "llama float32: rope regions", "llama float32: head", "llama bfloat16: norm regions",
        "llama bfloat16: glu regions", "llama bfloat16: rope regions", "llama bfloat16: head",
    ]),
    "LoRA target": (lambda s: attrs.evolve(s, lora_targets=("q_proj", "query")), ["llama: lora_targets"]),
    "model type": (lambda s: attrs.evolve(s, model_types=("lama",)), ["lama: transformers knows it"]),
}  # fmt: skip


def norms(spec, **changes):
    return attrs.evolve(spec, norms=tuple(attrs.evolve(point, **changes) for point in spec.norms))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_claims_are_named(name):
    change, failing = WRONG[name]
    check = check_spec(change(resolve({"model_type": "llama"})))
    assert not check.ok
    assert [claim.what for claim in check.claims if not claim.ok] == failing
    assert check.to_dict()["ok"] is False
    assert "FAIL" in str(check)
