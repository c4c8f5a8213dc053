"""Specs to and from data: what is written is read back, and a bad file is told all its mistakes at once."""

import json
import tomllib
from typing import get_args

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.errors import SpecError
from fastft.registry.chat import chat_formats
from fastft.registry.convert import checked, load_spec_file, spec_from_dict, spec_to_dict, spec_to_text
from fastft.registry.spec import (
    AttentionPoint,
    Capability,
    CapabilityName,
    ConfigValue,
    GluPoint,
    HeadPoint,
    ModelSpec,
    NormPoint,
    Variant,
)

GOOD = {"name": "mine", "model_types": ["mine"], "layer_classes": ["MineDecoderLayer"]}

identifiers = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
maybe = st.none() | identifiers
formats = st.none() | st.sampled_from([name for form in chat_formats() for name in (form.name, *form.aliases)])
# any character that a file can hold, quotes, escapes, line ends and DEL among them
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
globs = st.from_regex(r"[A-Za-z][A-Za-z0-9*?/.-]{0,8}", fullmatch=True)
numbers = st.floats(allow_nan=False, allow_infinity=False)


def some(items, smallest=0):
    return st.lists(items, min_size=smallest, max_size=3, unique=True).map(tuple)


def literal(kind, name):
    return st.sampled_from(get_args(attrs.fields_dict(kind)[name].type))


values = st.builds(ConfigValue, identifiers, numbers)
rms = st.builds(NormPoint, some(identifiers, 1), st.just("rms"), identifiers, numbers, literal(NormPoint, "cast"))
layer = st.builds(NormPoint, some(identifiers, 1), st.just("layer"), identifiers)
glus = st.builds(
    GluPoint,
    some(identifiers, 1),
    literal(GluPoint, "activation"),
    *[identifiers] * 3,
    packed=maybe,
    activation_config=identifiers,
)
attentions = st.builds(
    AttentionPoint,
    some(identifiers, 1),
    st.tuples(identifiers, identifiers, identifiers),
    output=identifiers,
    rope=literal(AttentionPoint, "rope"),
    rope_table=literal(AttentionPoint, "rope_table"),
    rope_function=maybe,
    softcap=maybe,
    sliding_window=maybe,
    rope_precision=literal(AttentionPoint, "rope_precision"),
    qk_norm=st.sampled_from(["head", "projection", None]),
    scale=st.none() | values,
)
capabilities = st.dictionaries(
    st.sampled_from(get_args(CapabilityName)),
    st.builds(Capability, literal(Capability, "status"), texts.filter(bool)) | st.just(Capability()),
)


def one_role_a_class(spec):
    names = [name for group in (spec.norms, spec.glus, spec.attentions) for point in group for name in point.classes]
    return len(names) == len(set(names))


specs = st.builds(
    ModelSpec,
    st.from_regex(r"[a-z][a-z0-9._-]{0,8}", fullmatch=True),
    some(identifiers.filter(lambda name: name[0] != "_"), 1),
    some(identifiers, 1),
    texts,
    some(globs),
    some(globs),
    some(st.builds(Variant, texts, some(globs, 1), formats)),
    some(rms | layer),
    some(glus),
    some(attentions),
    st.builds(HeadPoint, identifiers, identifiers, st.booleans(), maybe),
    st.none() | values,
    st.none() | values,
    some(identifiers, 1),
    some(identifiers),
    formats,
    maybe,
    capabilities=capabilities,
).filter(one_role_a_class)


@given(specs)
@settings(max_examples=150, deadline=None)
def test_round_trips(spec):
    assert spec_from_dict(spec_to_dict(spec)) == spec
    assert spec_from_dict(tomllib.loads(spec_to_text(spec))) == spec
    assert spec_from_dict(json.loads(spec_to_text(spec, "json"))) == spec
    assert checked(spec) == spec


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_files(tmp_path, kind):
    spec = spec_from_dict({**GOOD, "title": 'quote " and \\ and\nline', "attentions": [{"classes": ["A"]}]})
    path = tmp_path / f"mine.{kind}"
    path.write_text(spec_to_text(spec, kind), encoding="utf-8")
    assert load_spec_file(path) == spec
    assert load_spec_file(path).source == str(path)


def test_an_empty_string_switches_a_default_off():
    spec = spec_from_dict({**GOOD, "attentions": [{"classes": ["A"], "rope_function": ""}]})
    assert spec.attentions[0].rope_function is None
    assert spec_from_dict(spec_to_dict(spec)) == spec


def test_five_mistakes_at_once():
    bad = {
        "name": "llama",
        "model_types": [],
        "layer_classes": ["LlamaDecoderLayer"],
        "lora_target": ["q_proj"],
        "norms": [{"classes": ["LlamaRMSNorm"], "cast": "before_wieght", "offset": "1"}],
        "glus": [{"classes": ["LlamaMLP"], "activation": "swish"}],
        "capabilities": {"qlora": {"status": "suported"}, "gguf": "unsupported"},
    }
    with pytest.raises(SpecError) as caught:
        spec_from_dict(bad)
    told = {problem.where: problem for problem in caught.value.problems}
    assert set(told) == {
        "llama.model_types",
        "llama.lora_target",
        "llama.norms[0].cast",
        "llama.norms[0].offset",
        "llama.glus[0].activation",
        "llama.capabilities.qlora.status",
        "llama.capabilities.gguf.note",
    }
    cast = told["llama.norms[0].cast"]
    assert cast.value == "before_wieght" and "'before_weight', 'after_weight'" in cast.expected
    assert cast.remedy == "did you mean 'before_weight'?"
    assert told["llama.lora_target"].remedy == "did you mean 'lora_targets'?"
    assert "'silu', 'gelu_tanh', 'gelu'" in told["llama.glus[0].activation"].expected
    assert told["llama.norms[0].offset"].value == "1"
    assert str(caught.value).count("\n") == len(told) - 1


def mistakes(**changes):
    with pytest.raises(SpecError) as caught:
        spec_from_dict({**GOOD, **changes})
    return [problem.where for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"model_types": "llama"}, ["mine.model_types"]),
        ({"model_types": ["a", 3]}, ["mine.model_types[1]"]),
        ({"model_types": ["a", "a"]}, ["mine.model_types"]),
        ({"layer_classes": ["not a class"]}, ["mine.layer_classes[0]"]),
        ({"name": "two words"}, ["two words.name"]),
        ({"title": 3}, ["mine.title"]),
        ({"patterns": ["*"]}, ["mine.patterns[0]"]),
        ({"variants": [{"title": "x", "patterns": []}]}, ["mine.variants[0].patterns"]),
        ({"norms": [{}]}, ["mine.norms[0].classes"]),
        ({"norms": {"classes": ["A"]}}, ["mine.norms"]),
        ({"norms": [{"classes": ["A"]}, "B"]}, ["mine.norms[1]"]),
        ({"norms": [{"classes": ["A"], "eps": "1e-6"}]}, ["mine.norms[0].eps"]),
        ({"norms": [{"classes": ["A"], "offset": float("nan")}]}, ["mine.norms[0].offset"]),
        ({"norms": [{"classes": ["A"], "offset": True}]}, ["mine.norms[0].offset"]),
        ({"norms": [{"classes": ["A"], "kind": "layer", "offset": 1.0}]}, ["mine.norms[0].offset"]),
        ({"norms": [{"classes": ["A"]}], "glus": [{"classes": ["A"]}]}, ["mine.glus[0].classes"]),
        ({"attentions": [{"classes": ["A"], "projections": ["q", "k"]}]}, ["mine.attentions[0].projections"]),
        (
            {"attentions": [{"classes": ["A"], "packed": "qkv", "projections": ["q", "k", "v"]}]},
            ["mine.attentions[0].projections"],
        ),
        ({"attentions": [{"classes": ["A"], "window_layers": "x"}]}, ["mine.attentions[0].window_layers"]),
        ({"attentions": [{"classes": ["A"], "scale": "x"}]}, ["mine.attentions[0].scale"]),
        ({"head": {"scale_inverse": True}}, ["mine.head.scale_inverse"]),
        ({"head": {"scale_inverse": "yes"}}, ["mine.head.scale_inverse"]),
        ({"lora_targets": []}, ["mine.lora_targets"]),
        ({"capabilities": ["lora"]}, ["mine.capabilities"]),
        ({"capabilities": {"qlra": "supported"}}, ["mine.capabilities.qlra"]),
        ({"capabilities": {"lora": "maybe"}}, ["mine.capabilities.lora.status"]),
        ({"capabilities": {"lora": {"status": "experimental"}}}, ["mine.capabilities.lora.note"]),
        ({"capabilities": {"lora": 3}}, ["mine.capabilities.lora"]),
        ({"gguf": {"window_every": 0}}, ["mine.gguf.window_every"]),
        ({"gguf": {"rope_every": "4"}}, ["mine.gguf.rope_every"]),
        ({"gguf": {"keys": ["final_softcap"]}}, ["mine.gguf.keys[0]"]),
        ({"gguf": {"keys": ["soft_cap"]}}, ["mine.gguf.keys[0]"]),
    ],
)
def test_one_mistake(change, where):
    assert mistakes(**change) == where


def test_missing_fields_and_wrong_documents():
    with pytest.raises(SpecError) as caught:
        spec_from_dict({"norms": [{"classes": ["A"], "cast": "x"}]}, "mine.toml")
    assert sorted(problem.where for problem in caught.value.problems) == [
        "mine.toml.layer_classes",
        "mine.toml.model_types",
        "mine.toml.name",
        "mine.toml.norms[0].cast",
    ]
    with pytest.raises(SpecError, match="a table of fields"):
        spec_from_dict([1])


def test_a_record_made_in_python_is_checked_too():
    with pytest.raises(SpecError) as caught:
        checked(ModelSpec("mine", "mine", (), head="lm_head", norms=(NormPoint(("A",), cast="none"), "B")))
    told = [problem.where for problem in caught.value.problems]
    assert told == ["mine.model_types", "mine.norms[0].cast", "mine.norms[1]", "mine.head", "mine.layer_classes"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", "name = ", "is not valid TOML"),
        ("a.json", "{", "is not valid JSON"),
        ("a.json", "[]", "a table of fields"),
        ("a.yaml", "name: x", "ends in .toml or .json"),
        ("a.toml", b"\xff", "cannot be read"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SpecError, match=message) as caught:
        load_spec_file(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec_file(tmp_path / "none.toml")
