"""LoRA: what is adapted, how it starts, what stays tied, and every mistake named."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastft.errors import UsageError
from fastft.model.adapters import add_lora
from fastft.model.load import load
from fastft.state import get_state, update_state

IDS = torch.tensor([[1, 7, 20, 33, 150, 260, 9, 12, 40, 77]])


def adapted(model):
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(IDS).logits


def steps(model, count=3, lr=0.05):
    """Plain SGD, so that what is trained moves and by how much is plain."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for _ in range(count):
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad


@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3"])
def test_all_linear_is_every_linear_but_the_head(tiny, family, quant):
    model, _ = load(tiny(family), quant=quant, dtype="bfloat16")
    base = logits(model)
    state = get_state(model)
    lora = add_lora(model, r=4, alpha=8)
    per_layer = {"phi3": 4}.get(family, 7)
    names = adapted(lora)
    assert len(names) == 2 * per_layer and not any("lm_head" in n for n in names)
    assert {n for n, p in lora.named_parameters() if p.requires_grad} == {
        n for n, _ in lora.named_parameters() if "lora_" in n
    }
    assert all(p.dtype == torch.float32 for n, p in lora.named_parameters() if "lora_" in n)
    assert torch.equal(logits(lora), base)  # B starts at zero
    assert get_state(lora) is state


def test_scale(tiny, rms):
    folder = tiny()
    for rslora, scale in ((False, 2.0), (True, 4.0)):
        model, _ = load(folder, dtype="float32")
        lora = add_lora(model, r=4, alpha=8, rslora=rslora, init=False, targets=["q_proj"])
        layer = lora.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        x = torch.randn(3, 64)
        expected = x @ (layer.weight + scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight).T
        assert rms(layer(x), expected) < 1e-6


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj", "v_proj"], 4),
        ("down_proj", 2),
        (r"model\.layers\.1\..*_proj", 7),
        ("model.layers.0.self_attn.o_proj", 1),
        (["q_proj", "lm_head"], 3),
        ("spec", 14),
        (None, 14),
    ],
)
def test_targets(tiny, targets, count):
    model, _ = load(tiny(), dtype="float32")
    assert len(adapted(add_lora(model, r=2, targets=targets))) == count


def test_layers(tiny):
    model, _ = load(tiny(), dtype="float32")
    assert all("layers.1." in name for name in adapted(add_lora(model, r=2, layers=[1])))


def test_same_seed_same_adapter_and_the_global_state_is_left(tiny):
    def start(seed):
        lora = add_lora(load(tiny(), dtype="float32")[0], r=4, seed=seed)
        return torch.cat([p.detach().flatten() for n, p in lora.named_parameters() if "lora_A" in n])

    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = start(5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(one, start(5)) and not torch.equal(one, start(6))


@pytest.mark.parametrize("options", [{"dora": True}, {"dropout": 0.5}, {"bias": "all"}, {"bias": "lora_only"}])
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_nothing_asked_for_is_dropped(tiny, options, quant):
    model, _ = load(tiny("qwen2"), quant=quant, dtype="float32")
    lora = add_lora(model, r=4, init=False, **options)
    trained = {n for n, p in lora.named_parameters() if p.requires_grad}
    assert any("magnitude" in n for n in trained) == ("dora" in options)
    assert any(n.endswith("q_proj.base_layer.bias") for n in trained) == ("bias" in options)
    lora.train()
    lora(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in lora.named_parameters() if n in trained)
    first, second = lora(IDS).logits, lora(IDS).logits
    assert torch.equal(first, second) == ("dropout" not in options)


@pytest.mark.parametrize("init", ["gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal", True, False])
def test_inits_start_where_they_should_and_reload(tiny, tmp_path, init, rms):
    folder = tiny()
    model, _ = load(folder, dtype="float32")
    base = logits(model)
    lora = add_lora(model, r=4, init=init)
    start = logits(lora)
    if init is False:
        assert rms(start, base) > 1e-3
    else:
        assert rms(start, base) < 1e-5
    steps(lora)
    trained = logits(lora)
    assert rms(trained, start) > 1e-3
    lora.save_pretrained(tmp_path)
    again, _ = load(tmp_path, dtype="float32")
    assert rms(logits(again), trained) < 1e-5


def test_olora_on_nf4(tiny, rms):
    model, _ = load(tiny(), quant="nf4", dtype="float32")
    base, true = logits(model), logits(load(tiny(), dtype="float32")[0])
    lora = add_lora(model, r=4, init="olora")
    # The residual is quantised anew: as far from the 16-bit model as the first quantisation was, give or take.
    assert 0.3 < rms(logits(lora), true) / rms(base, true) < 1.5
    from bitsandbytes.nn import Linear4bit

    assert not any(m.support_avx512bf16_for_cpu for m in lora.modules() if isinstance(m, Linear4bit))


@pytest.mark.parametrize("named", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_tied_weights_stay_tied(tiny, tmp_path, named, quant, rms):
    """One weight after wrapping, training, saving, reloading and merging."""
    folder = tiny("gemma3")
    model, tokenizer = load(folder, quant=quant, dtype="float32")
    old = model.get_input_embeddings().weight.detach().clone()
    lora = add_lora(model, r=4, modules_to_save=named)

    def tables(m):
        return m.get_input_embeddings().weight, m.get_output_embeddings().weight

    def check(m):
        embeddings, head = tables(m)
        assert embeddings.data_ptr() == head.data_ptr()
        return embeddings.detach().clone()

    assert torch.equal(check(lora), old) and tables(lora)[0].requires_grad
    steps(lora)
    moved, trained = check(lora), logits(lora)
    assert rms(moved, old) > 1e-4
    lora.save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter", quant=quant, dtype="float32")
    assert torch.equal(check(again), moved) and torch.equal(logits(again), trained)
    steps(again, 1)
    assert rms(check(again), moved) > 1e-5
    if quant is None:
        merged = lora.merge_and_unload()
        assert torch.equal(check(merged), moved) and rms(logits(merged), trained) < 1e-5
        merged.save_pretrained(tmp_path / "merged")
        tokenizer.save_pretrained(tmp_path / "merged")
        whole, _ = load(tmp_path / "merged", dtype="float32")
        assert torch.equal(check(whole), moved) and rms(logits(whole), trained) < 1e-5


def test_the_gradient_of_a_tied_weight_is_the_sum_of_both(tiny, rms):
    """Trained whole beside LoRA, the tied weight gets the gradient that full training gives it."""
    folder = tiny("gemma3")
    lora = add_lora(load(folder, dtype="float32")[0], r=4, modules_to_save=["embed_tokens"])
    full, _ = load(folder, dtype="float32", full=True)
    for model in (lora, full):
        model(IDS, labels=IDS).loss.backward()
    assert rms(lora.get_input_embeddings().weight.grad, full.get_input_embeddings().weight.grad) < 1e-6


def test_untied_embeddings_and_head_are_trained_apart(tiny, tmp_path):
    lora = add_lora(load(tiny(), dtype="float32")[0], r=4, modules_to_save=["embed_tokens", "lm_head"])
    embeddings, head = lora.get_input_embeddings().weight, lora.get_output_embeddings().weight
    assert embeddings.data_ptr() != head.data_ptr() and embeddings.requires_grad and head.requires_grad
    steps(lora)
    lora.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, dtype="float32")[0]), logits(lora))


def test_all_mistakes_are_told_at_once(tiny):
    model, _ = load(tiny(), dtype="float32")
    with pytest.raises(UsageError) as caught:
        add_lora(
            model, r=0, alpha=0, dropout=1.0, bias="yes", targets=["q_prj", "v_proj"], init="gausian", layers=[0, 2],
            modules_to_save=["embd_tokens"], lora_alpha=3, random_stat=1, use_qalora=True, train_tokens=[300],
        )  # fmt: skip
    text = str(caught.value)
    for part in (
        "r: expected a whole number of at least 1, got 0",
        "alpha: expected a number above 0",
        "dropout: expected a number from 0",
        "bias: expected 'none'",
        "got 'q_prj'. Did you mean 'q_proj'",
        "There are down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj",
        "did you mean 'gaussian'?",
        "layers: expected indices from 0 to 1, got [2]",
        "got 'embd_tokens'. Did you mean 'embed_tokens'",
        "'lora_alpha'; here it is alpha",
        "'random_stat'; it takes",
        "'use_qalora'; PEFT knows it",
        "train_tokens: expected token ids from 0 to 299, got [300]",
    ):
        assert part in text, part
    assert len(caught.value.problems) == 12
    assert not hasattr(model, "peft_config") and not any("lora" in n for n, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 2.5}, "r: expected a whole number"),
        ({"r": True}, "r: expected a whole number"),
        ({"targets": r".*\.qq_proj"}, "whole path of a module, such as 'model.layers.0"),
        ({"targets": "(q_proj"}, "does not compile"),
        ({"targets": []}, "at least one linear layer"),
        ({"targets": r".*q_proj", "layers": 1}, "Write the layers into the expression"),
        ({"layers_pattern": "layers"}, "None unless layers are given"),
        ({"init": "eva"}, "needs training data"),
        ({"init": "loftq"}, "load with quant='nf4'"),
        ({"init": "orthogonal", "r": 3}, "an even rank"),
        ({"rank": 8}, "unknown argument 'rank'; here it is r"),
        ({"init": "pissa_niter_4", "seed": 1}, "seed: expected 3407"),
        ({"train_tokens": "all"}, "train_tokens: expected 'added'"),
    ],
)
def test_single_mistakes(tiny, options, message):
    model, _ = load(tiny(), dtype="float32")
    with pytest.raises(UsageError) as caught:
        add_lora(model, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank_pattern": {"q_porj": 8}}, "rank_pattern: .* 'q_porj'. did you mean 'q_proj'"),
        ({"alpha_pattern": {"nonesuch": 8}}, "alpha_pattern: .* 'nonesuch'. There are down_proj, gate_proj"),
        ({"rank_pattern": {"q_proj": 100_000}}, r"rank_pattern\['q_proj'\]: expected at most \d+, the largest rank"),
        ({"rank_pattern": {"q_proj": "x"}}, r"rank_pattern\['q_proj'\]: expected a whole number.*, got 'x'"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]: expected a whole number of at least 1, got 0"),
        ({"alpha_pattern": {"q_proj": 0}}, r"alpha_pattern\['q_proj'\]: expected a number above 0, got 0"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern: expected a dict of numbers"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern: .* It does not compile"),
    ],
    ids=["near", "none", "large", "text", "zero", "alpha", "list", "expression"],
)  # fmt: skip
def test_patterns_that_cannot_be_meant(tiny, options, told):
    model, _ = load(tiny(), dtype="float32")
    with pytest.raises(UsageError, match=told):
        add_lora(model, **options)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_patterns_are_those_of_the_layers_that_they_fit(tiny):
    ranks = {"q_proj": 2, r"layers\.0\.mlp\..*": 3}
    model = add_lora(load(tiny(), dtype="float32")[0], r=4, rank_pattern=ranks, alpha_pattern={"v_proj": 7.0})
    found = {name: part.shape[0] for name, part in model.named_parameters() if "lora_A" in name}
    wanted = {name: 2 if "q_proj" in name else 3 if "layers.0.mlp" in name else 4 for name in found}
    assert found == wanted and set(found.values()) == {2, 3, 4}


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_inits_that_need_16_bits_name_the_remedy(tiny, init):
    model, _ = load(tiny(), quant="nf4")
    with pytest.raises(UsageError, match="starts from the 16-bit weights and changes them: load with quant=None"):
        add_lora(model, init=init)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_those_of_a_model_that_others_loaded_in_4_bits_do_too(tiny, init):
    """Such a model has no record of how it was loaded; its weights tell."""
    model = AutoModelForCausalLM.from_pretrained(
        tiny(), quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), device_map="cpu"
    )
    with pytest.raises(UsageError, match=f"on a model in nf4.*got '{init}'"):
        add_lora(model, init=init)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_full_and_second_adapters_are_refused(tiny):
    with pytest.raises(UsageError, match="loaded with full=True"):
        add_lora(load(tiny(), full=True)[0])
    lora = add_lora(load(tiny())[0], r=2)
    with pytest.raises(UsageError, match="already carries an adapter"):
        add_lora(lora)


def test_revision_of_the_base_is_written_down(tiny):
    model, _ = load(tiny())
    update_state(model, revision="v2")
    assert add_lora(model, r=2).peft_config["default"].revision == "v2"


@pytest.mark.parametrize("shard", [None, "100KB"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_loftq_starts_at_what_quantising_took_away(tiny, tmp_path, family, shard, rms):
    """W - Q - scale B A is what a truncated SVD of W - Q leaves (Eckart and Young), and reloading keeps it."""
    from bitsandbytes.functional import dequantize_4bit

    folder = tiny(family, shard=shard)
    true, _ = load(folder, dtype="float32")
    model, _ = load(folder, quant="nf4", dtype="float32")
    plain = rms(logits(model), logits(true))
    lora = add_lora(model, r=8, alpha=12, init="loftq")
    for name in adapted(lora):
        layer = lora.get_submodule(f"base_model.model.{name}")
        weight = layer.get_base_layer().weight
        residual = true.get_submodule(name).weight - dequantize_4bit(weight.data, weight.quant_state)
        update = 12 / 8 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        left = torch.linalg.svdvals(residual.double())[8:].norm()
        assert abs((residual - update).norm() / left - 1) < 1e-4
    start = logits(lora)
    assert rms(start, logits(true)) < plain
    assert "load this adapter with quant='nf4'" in get_state(lora).notes[-1]
    steps(lora)
    lora.save_pretrained(tmp_path)
    again, _ = load(tmp_path, quant="nf4", dtype="float32")
    assert torch.equal(logits(again), logits(lora)) and rms(logits(lora), start) > 1e-3


def test_loftq_needs_the_16bit_weights(tiny, tmp_path):
    model, tokenizer = load(tiny(), quant="nf4", dtype="float32")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    with pytest.raises(UsageError, match=r"holds model\.layers\.0.* quantised, and LoftQ needs the 16-bit weights"):
        add_lora(again, init="loftq")
    assert not any("lora" in name for name, _ in again.named_parameters()) and len(adapted(add_lora(again, r=2))) == 14
    with pytest.raises(UsageError, match="dora: expected False with init='loftq'"):
        add_lora(model, init="loftq", dora=True)


def test_a_rank_that_no_layer_has_room_for(tiny):
    model, _ = load(tiny())
    sizes = {
        name.rpartition(".")[2]: min(module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    most, least = max(sizes.values()), min(sizes.values())
    assert least < most
    with pytest.raises(UsageError) as caught:
        add_lora(model, r=most + 1, alpha=-1)
    assert [problem.where for problem in caught.value.problems] == ["alpha", "r"]
    assert f"r: expected at most {most}, the largest rank that a layer of this model can have" in str(caught.value)
    adapted = add_lora(model, r=most)
    (note,) = [note for note in get_state(adapted).notes if "rank" in note]
    small = [f"{size} in {name}" for name, size in sizes.items() if size < most]
    assert note.startswith("the rank is above the smaller dimension of some layers, where it adds nothing: ")
    assert sorted(note.partition("nothing: ")[2].split(", ")) == sorted(small)
    fits, _ = load(tiny())
    assert not [note for note in get_state(add_lora(fits, r=least)).notes if "rank" in note]
