"""Every claim of the data files, held against transformers' own classes."""

from importlib import import_module

import attrs
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastft.registry.convert import load_spec_file, spec_from_dict, spec_to_dict
from fastft.registry.packaged import packaged_specs

SPECS = {spec.name: spec for spec in packaged_specs()}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD_DIM = {"qwen3", "gemma", "gemma2", "gemma3", "glm4", "smollm3"}

each_spec = pytest.mark.parametrize("name", sorted(SPECS))


def modeling(spec):
    folder = spec.model_types[0].removesuffix("_text")
    return import_module(f"transformers.models.{folder}.modeling_{folder}")


def tiny(spec, **changes):
    sizes = {**TINY, **({"head_dim": 8} if spec.name in HEAD_DIM else {}), **changes}
    return AutoConfig.for_model(spec.model_types[0], **sizes)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {name: AutoModelForCausalLM.from_config(tiny(spec)).eval() for name, spec in SPECS.items()}


def of_class(model, classes):
    return {name: module for name, module in model.named_modules() if type(module).__name__ in classes}


def points(spec):
    return [*spec.norms, *spec.glus, *spec.attentions]


def test_families():
    known = "cohere cohere2 gemma gemma2 gemma3 glm4 granite llama mistral olmo2 phi3 qwen2 qwen3 smollm3"
    assert " ".join(sorted(SPECS)) == known


@each_spec
def test_quick_reader_agrees_with_the_strict_one(name):
    spec = SPECS[name]
    strict = load_spec_file(spec.source)
    assert strict == spec and strict.source == spec.source
    assert spec_from_dict(spec_to_dict(spec)) == spec


@each_spec
def test_classes_exist_and_are_used(name, models):
    spec = SPECS[name]
    module = modeling(spec)
    for class_name in {*spec.layer_classes, *(name for point in points(spec) for name in point.classes)}:
        assert hasattr(module, class_name), class_name
        assert of_class(models[name], {class_name}), f"{class_name} is not in a model of this family"
    assert len(of_class(models[name], spec.layer_classes)) == TINY["num_hidden_layers"]


@each_spec
def test_every_norm_glu_and_attention_is_named(name, models):
    spec = SPECS[name]
    claimed = {class_name for point in points(spec) for class_name in point.classes}
    for path, module in models[name].named_modules():
        kind = type(module).__name__
        if kind.endswith(("Norm", "MLP", "Attention")):
            assert kind in claimed, path


@each_spec
def test_norm_formula_is_bit_exact_in_bf16(name, models):
    spec = SPECS[name]
    for point in spec.norms:
        for path, module in of_class(models[name], point.classes).items():
            module = type(module)(module.weight.shape[-1]).bfloat16()
            torch.nn.init.normal_(module.weight, std=0.5)
            x = torch.randn(7, module.weight.shape[-1]).bfloat16()
            wide = x.float()
            if point.kind == "layer":
                wide = wide - wide.mean(-1, keepdim=True)
            x_hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + getattr(module, point.eps))
            weight = module.weight.float() + point.offset
            expected = {
                "before_weight": (x_hat.bfloat16() * weight.bfloat16()),
                "after_weight": (x_hat * weight).bfloat16(),
            }
            assert torch.equal(module(x), expected[point.cast]), path
            other = {"before_weight": "after_weight", "after_weight": "before_weight"}[point.cast]
            assert not torch.equal(module(x), expected[other]), "the input does not tell the cast orders apart"


@each_spec
def test_glu_formula(name, models):
    spec, config = SPECS[name], models[name].config
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }
    for point in spec.glus:
        assert getattr(config, point.activation_config) == {"gelu_tanh": "gelu_pytorch_tanh"}.get(
            point.activation, point.activation
        )
        for path, module in of_class(models[name], point.classes).items():
            x = torch.randn(5, TINY["hidden_size"])
            if point.packed:
                gate, up = getattr(module, point.packed)(x).chunk(2, -1)
            else:
                gate, up = getattr(module, point.gate)(x), getattr(module, point.up)(x)
            expected = getattr(module, point.down)(functions[point.activation](gate) * up)
            torch.testing.assert_close(module(x), expected, rtol=1e-6, atol=1e-6, msg=path)


@each_spec
def test_projections_and_qk_norms(name, models):
    spec, config = SPECS[name], models[name].config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    for point in spec.attentions:
        for module in of_class(models[name], point.classes).values():
            width = module.head_dim
            if point.packed:
                assert getattr(module, point.packed).out_features == (heads + 2 * groups) * width
            else:
                widths = [getattr(module, part).out_features for part in point.projections]
                assert widths == [heads * width, groups * width, groups * width]
            assert isinstance(getattr(module, point.output), torch.nn.Linear)
            expected = {"head": width, "projection": heads * width}.get(point.qk_norm)
            if point.qk_norm_config:
                assert not getattr(config, point.qk_norm_config) and not hasattr(module, "q_norm")
            else:
                assert hasattr(module, "q_norm") == (point.qk_norm is not None)
                assert point.qk_norm is None or module.q_norm.weight.shape == (expected,)


def test_qk_norm_switched_on_by_the_config():
    spec = SPECS["cohere"]
    model = AutoModelForCausalLM.from_config(tiny(spec, **{spec.attentions[0].qk_norm_config: True}))
    attention = next(iter(of_class(model, spec.attentions[0].classes).values()))
    assert attention.q_norm.weight.shape == (4, 8)


@each_spec
def test_rope_layout_table_and_precision(name, models):
    spec, model = SPECS[name], models[name]
    rotary = next(module for path, module in model.named_modules() if path.endswith("rotary_emb"))
    position = torch.arange(3)[None]
    extra = (model.config.layer_types[0],) if spec.name == "gemma3" else ()
    cos, sin = rotary(torch.zeros(1, 3, 32), position, *extra)
    half = cos.shape[-1] // 2
    point = spec.attentions[0]
    other = cos[..., half:] if point.rope_table == "halves" else cos[..., 1::2]
    assert torch.equal(cos[..., :half] if point.rope_table == "halves" else cos[..., ::2], other)
    table_cos = cos[..., :half] if point.rope_table == "halves" else cos[..., ::2]
    table_sin = sin[..., :half] if point.rope_table == "halves" else sin[..., ::2]
    assert len(table_cos.unique()) > half, "the table does not tell its features apart"

    q = torch.randn(1, 2, 3, 8)
    rotated = q[..., : 2 * half]
    first, second = (
        (rotated[..., :half], rotated[..., half:]) if point.rope == "half" else (rotated[..., ::2], rotated[..., 1::2])
    )
    pair = (first * table_cos - second * table_sin, second * table_cos + first * table_sin)
    turned = torch.cat(pair, -1) if point.rope == "half" else torch.stack(pair, -1).flatten(-2)
    expected = torch.cat((turned, q[..., 2 * half :]), -1)
    apply = getattr(modeling(spec), point.rope_function)
    torch.testing.assert_close(apply(q, q, cos, sin)[0], expected, rtol=1e-6, atol=1e-6)

    low, low_cos, low_sin = q.bfloat16(), cos.bfloat16(), sin.bfloat16()
    if spec.name == "olmo2":
        assert rotary(torch.zeros(1, 3, 32).bfloat16(), position)[0].dtype == torch.float32
        low_cos, low_sin = cos, sin
    in_fp32 = apply(low.float(), low.float(), low_cos.float(), low_sin.float())[0].bfloat16()
    assert torch.equal(apply(low, low, low_cos, low_sin)[0], in_fp32) == (point.rope_precision == "float32")


@each_spec
def test_config_attributes(name, models):
    spec, config = SPECS[name], models[name].config
    values = [spec.embedding_scale, spec.residual_scale, *(point.scale for point in spec.attentions)]
    names = [value.attribute for value in values if value] + [spec.head.scale, spec.head.softcap]
    for point in spec.attentions:
        names += [point.softcap, point.sliding_window, point.window_layers, point.rope_layers, point.qk_norm_config]
    for attribute in filter(None, names):
        assert hasattr(config, attribute), attribute
    for point in spec.attentions:
        for module in of_class(models[name], point.classes).values():
            expected = point.scale and getattr(config, point.scale.attribute) ** point.scale.power
            assert module.scaling == pytest.approx(expected or module.head_dim**-0.5)
        for attribute in filter(None, (point.window_layers, point.rope_layers)):
            assert len(getattr(config, attribute)) == TINY["num_hidden_layers"]


NUMBERS = {
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.3},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 0.01},
    "gemma3": {"final_logit_softcapping": 0.01},
}


@each_spec
def test_head_and_embedding_scale(name):
    spec = SPECS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny(spec, **NUMBERS.get(name, {}))).eval()
    ids = torch.randint(3, 64, (2, 9))
    seen = {}
    layer = next(iter(of_class(model, spec.layer_classes).values()))
    layer.register_forward_pre_hook(lambda _, given: seen.update(entered=given[0]))
    out = model(ids, output_hidden_states=True)
    scaled = out.hidden_states[-1] @ model.get_submodule(spec.head.module).weight.T
    if spec.head.scale:
        factor = getattr(model.config, spec.head.scale)
        scaled = scaled / factor if spec.head.scale_inverse else scaled * factor
    if spec.head.softcap:
        cap = getattr(model.config, spec.head.softcap)
        scaled = cap * torch.tanh(scaled / cap)
    torch.testing.assert_close(out.logits, scaled, rtol=1e-5, atol=1e-6)

    table = model.get_input_embeddings().weight[ids]
    value = spec.embedding_scale
    factor = getattr(model.config, value.attribute) ** value.power if value else 1.0
    torch.testing.assert_close(seen["entered"], table * factor, rtol=1e-6, atol=1e-6)


@each_spec
def test_residual_scale(name):
    """With the residual scale at zero, a layer hands on what it was given."""
    spec = SPECS[name]
    assert hasattr(tiny(spec), "residual_multiplier") == (spec.residual_scale is not None)
    change = {spec.residual_scale.attribute: 0.0} if spec.residual_scale else {}
    model = AutoModelForCausalLM.from_config(tiny(spec, **change)).eval()
    states = model(torch.randint(3, 64, (1, 5)), output_hidden_states=True).hidden_states
    assert torch.equal(states[0], states[1]) == (spec.residual_scale is not None)


@each_spec
def test_lora_targets_are_all_linear_layers(name, models):
    spec, model = SPECS[name], models[name]
    linear = {path.rpartition(".")[2] for path, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    assert linear - set(spec.keep_16bit) == set(spec.lora_targets)
    assert all(model.get_submodule(path) is not None for path in spec.keep_16bit)


# What makes some layers slide and others not, for the families whose defaults do not.
WINDOWS = {
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 2},
    "smollm3": {"use_sliding_window": True, "no_rope_layer_interval": 2},
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"] * 2},
}


@each_spec
def test_window_and_softcap_reach_attention(name, monkeypatch):
    spec = SPECS[name]
    module = modeling(spec)
    given = []

    def spy(attention, *args, eager=module.eager_attention_forward, **kwargs):
        given.append((attention.layer_idx, kwargs.get("sliding_window"), kwargs.get("softcap")))
        return eager(attention, *args, **kwargs)

    monkeypatch.setattr(module, "eager_attention_forward", spy)
    window = {"sliding_window": 4} if hasattr(tiny(spec), "sliding_window") else {}
    config = tiny(spec, **WINDOWS.get(name, {}), **window)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model(torch.randint(3, 64, (1, 5)))
    assert len(given) == TINY["num_hidden_layers"]
    slides = sum(window is not None for _, window, _ in given)
    assert (slides > 0) == bool(spec.attentions[0].sliding_window)
    assert (0 < slides < len(given)) == bool(spec.attentions[0].window_layers)
    point = spec.attentions[0]
    for layer, window, softcap in given:
        expected = getattr(model.config, point.sliding_window) if point.sliding_window else None
        if point.window_layers and getattr(model.config, point.window_layers)[layer] != "sliding_attention":
            expected = None
        assert window == expected, layer
        assert softcap == (getattr(model.config, point.softcap) if point.softcap else None)


@each_spec
def test_layers_that_do_not_rotate(name, monkeypatch):
    spec = SPECS[name]
    module, point = modeling(spec), SPECS[name].attentions[0]
    apply, turned = getattr(module, point.rope_function), []

    def spy(q, k, *args, **kwargs):
        turned.append(1)
        return apply(q, k, *args, **kwargs)

    monkeypatch.setattr(module, point.rope_function, spy)
    model = AutoModelForCausalLM.from_config(tiny(spec)).eval()
    model(torch.randint(3, 64, (1, 5)))
    kinds = getattr(model.config, point.rope_layers) if point.rope_layers else [1] * TINY["num_hidden_layers"]
    assert len(turned) == sum(kind in (1, "sliding_attention") for kind in kinds)
    assert (len(turned) < TINY["num_hidden_layers"]) == bool(point.rope_layers)


@each_spec
def test_gguf_architecture(name):
    gguf = pytest.importorskip("gguf")
    assert SPECS[name].gguf_architecture in gguf.MODEL_ARCH_NAMES.values()


def test_records_are_hashable_and_survive_copying():
    import copy
    import pickle

    for spec in SPECS.values():
        assert hash(spec) == hash(copy.deepcopy(spec)) and pickle.loads(pickle.dumps(spec)) == spec
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            spec.name = "other"
        with pytest.raises(TypeError):
            spec.capabilities["lora"] = None
