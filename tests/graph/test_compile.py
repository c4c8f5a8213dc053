"""When the compiled path is taken, how often it compiles, and that masks, packing and modes stay exact."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny import batch, flat, in_nf4, make, relative, run, with_lora
from transformers import DynamicCache

import fastft
from fastft.errors import UsageError
from fastft.graph import attention
from fastft.graph.compile import uncompile, uncompiled
from fastft.graph.pipeline import PASSES
from fastft.graph.twin import tiny_model
from fastft.state import get_state

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION_FAMILIES = ("llama", "gemma2", "gemma3_text", "mistral", "cohere2", "phi3")


def graphs(model):
    return len(fastft.report(model).graphs)


def pair(family, backend="eager"):
    """Return an eager model and a compiled one, fp32, LoRA, equal weights; it is lowered only with "aot_eager"."""
    return make(family, torch.float32, True), fastft.compile(make(family, torch.float32, True), backend=backend)


def agree(expected, got, logits=2e-6, gradient=5e-6):
    assert relative(expected[0], got[0]) < logits
    assert abs(expected[1] - got[1]).item() < 4e-6
    assert relative(flat(expected[2]), flat(got[2])) < gradient


def test_a_graph_holds_no_bodies_of_functions_that_were_replaced(monkeypatch):
    """bitsandbytes' products are functions of their own, two bodies each, through which every later pass would go."""
    seen = []

    def lowering(graph_module, inputs, settings):
        seen.append([name for name, _ in graph_module.named_modules() if name])
        return graph_module.forward

    monkeypatch.setattr("fastft.graph.backend.lower", lowering)
    for disable in ([], ["lora", "feed_forward"]):
        # 128: bitsandbytes' kernels for a CPU are wrong where a row is no multiple of 64, which is not replaced then.
        base = in_nf4(tiny_model("llama", dtype=torch.bfloat16, intermediate_size=128))
        run(fastft.compile(with_lora(base, torch.bfloat16).train(), disable=disable), batch(0))
    first, whole, norm, *apart = seen
    assert first == whole == norm == [] and len(apart[0]) == 2 * 7


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_bodies_within_bodies_stay(backend):
    """A checkpointed layer is one body, in which those of bitsandbytes' products are."""
    losses = []
    for checkpointed in (False, True):
        base = in_nf4(tiny_model("llama", dtype=torch.bfloat16, intermediate_size=128))
        model = with_lora(base, torch.bfloat16).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        losses.append(run(fastft.compile(model, backend=backend), batch(0))[1].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_one_graph_serves_all_layers():
    model = fastft.compile(make("llama", torch.float32, True, num_hidden_layers=6), backend="eager")
    run(model, batch(0))
    # The first layer's input needs no gradient: one graph for it, one for the other five; one for the norm behind them.
    assert graphs(model) == 3
    run(model, batch(1))
    assert graphs(model) == 3
    assert [graph.unit for graph in fastft.report(model).graphs] == ["LlamaDecoderLayer"] * 2 + ["LlamaRMSNorm"]


def test_lengths_that_change_compile_at_most_once_more():
    eager, model = pair("llama", "aot_eager")
    for index, length in enumerate((37, 24, 51, 18)):
        agree(run(eager, batch(index, length=length)), run(model, batch(index, length=length)))
    assert graphs(model) <= 5
    assert fastft.report(model).refused() == ()


def test_a_second_model_in_the_process_compiles_for_itself():
    for seed in range(3):
        eager, model = pair("llama")
        agree(run(eager, batch(seed)), run(model, batch(seed)))
        assert graphs(model) == 3


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_padding_is_seen(family):
    eager, model = pair(family)
    for side, padded in (("right", slice(-7, None)), ("left", slice(0, 7))):
        inputs = batch(0)
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, padded] = 0
        inputs["labels"] = inputs["labels"].masked_fill(mask == 0, -100)
        inputs["attention_mask"] = mask
        if side == "left":
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        expected, got = run(eager, inputs), run(model, inputs)
        seen = mask.bool()
        assert relative(expected[0][seen], got[0][seen]) < 2e-6
        assert abs(expected[1] - got[1]).item() < 4e-6
        assert relative(flat(expected[2]), flat(got[2])) < 5e-6
    # The mask matters (rotations see differences of positions only), so dropping it must show.
    with torch.no_grad():
        without = model(inputs["input_ids"], use_cache=False).logits
    assert relative(got[0][seen], without[seen].double()) > 1e-4


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
@pytest.mark.parametrize("how", ["offsets", "positions"])
def test_packed_documents_do_not_see_each_other(family, how):
    """One packed row against its documents alone: logits equal, gradients sum."""
    eager, model = pair(family)
    lengths = (19, 26, 5)
    documents = [batch(seed, rows=1, length=length) for seed, length in enumerate(lengths)]
    ids = torch.cat([d["input_ids"] for d in documents], dim=1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    inputs = {"input_ids": ids, "position_ids": positions, "labels": torch.cat([d["labels"] for d in documents], dim=1)}
    for start in (0, 19, 45):
        inputs["labels"][0, start] = -100
    if how == "offsets":
        offsets = torch.tensor([0, 19, 45, 50], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 26, "max_length_k": 26}
    packed = run(model, inputs)
    alone = [run(eager, d)[0] for d in documents]
    assert relative(torch.cat(alone, dim=1), packed[0]) < 2e-6
    agree(run(eager, {k: v for k, v in inputs.items() if "_q" not in k and "_k" not in k}), packed)


def test_generation_and_evaluation_stay_eager_and_training_goes_on():
    eager, model = pair("qwen3")
    assert model.config.use_cache  # what a later save_pretrained writes is as it was
    inputs = batch(0)
    first = run(model, inputs)
    compiled = graphs(model)
    model.eval()
    prompt = inputs["input_ids"][:, :8]
    with torch.no_grad():
        made = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, use_cache=True)
        evaluated = model(**inputs, use_cache=False).logits.double()
    expected = eager.eval().generate(input_ids=prompt, max_new_tokens=6, do_sample=False, use_cache=True)
    assert torch.equal(made, expected)
    assert relative(first[0], evaluated) < 2e-6
    model.train()
    agree(first, run(model, inputs))
    assert graphs(model) == compiled


def test_left_padded_generation_with_window_and_cache_equals_one_by_one():
    eager, model = pair("gemma3_text")
    model.eval()
    ids = batch(0, rows=2, length=24)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    ids[0, :9] = 0
    with torch.no_grad():
        both = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=True)
        single = eager.eval().generate(input_ids=ids[:1, 9:], max_new_tokens=12, do_sample=False, use_cache=True)
        other = eager.generate(input_ids=ids[1:], max_new_tokens=12, do_sample=False, use_cache=True)
    assert torch.equal(both[0, 24:], single[0, 15:])
    assert torch.equal(both[1, 24:], other[0, 24:])


def test_a_cache_while_training_is_told():
    _, model = pair("llama")
    with pytest.warns(UserWarning, match="use_cache=False"):
        model(**batch(0), use_cache=True).loss.backward()
    assert any("cache" in note for note in fastft.report(model).notes)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_seen_by_either_name(name):
    _, model = pair("llama")
    base, calls = model.get_base_model().model, []
    layer = base.layers[0]
    layer.forward = lambda hidden, **given: calls.append(given) or hidden  # whichever name this transformers takes
    hidden, cache = torch.randn(1, 5, 64), DynamicCache(config=base.config)
    with pytest.warns(UserWarning, match="use_cache=False"):
        layer(hidden, **{name: cache})
    assert calls == [{name: cache}] and graphs(model) == 0
    assert any("ran uncompiled: a key-value cache" in note for note in fastft.report(model).notes)


def test_uncompiled_runs_transformers_own_layers():
    eager, model = pair("gemma2")
    inputs = batch(0)
    with uncompiled(model):
        assert model.config._attn_implementation == "eager"
        agree(run(eager, inputs), run(model, inputs), logits=1e-7, gradient=1e-7)
        assert graphs(model) == 0
    assert model.config._attn_implementation == "fastft"
    run(model, inputs)
    assert graphs(model) == 3
    uncompile(model)
    assert all(module._compiled_call_impl is None for module in model.modules())
    with pytest.raises(UsageError, match=r"fastft.compile\(model\)"):
        fastft.report(model)


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_least_memory_plan_gives_the_same(backend):
    eager = make("llama", torch.float32, True)
    model = fastft.compile(make("llama", torch.float32, True), plan="min", backend=backend)
    agree(run(eager, batch(0)), run(model, batch(0)))


def saved_bytes(model, inputs):
    """Return the bytes that autograd keeps for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.get_base_model().model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
    del out
    return sum(kept.values())


def test_least_memory_plan_keeps_layer_inputs_only():
    sizes = {}
    for plan in ("keep", "min"):
        torch._dynamo.reset()
        model = fastft.compile(make("llama", torch.float32, True, num_hidden_layers=6), plan=plan, backend="aot_eager")
        run(model, batch(0, rows=4, length=64))  # compile, and prove the rewrites, before anything is counted
        sizes[plan] = saved_bytes(model, batch(0, rows=4, length=64))
    one_state = 4 * 64 * 64 * 4
    assert sizes["min"] < 12 * one_state  # six layer inputs, the last norm's, cosines and sines, and slack
    assert sizes["keep"] > 4 * sizes["min"]


def test_unknown_architecture_runs_unrewritten_and_says_so():
    model = with_lora(tiny_model("gpt_neox"), torch.float32).train()
    inputs = batch(0)
    expected = run(model, inputs)
    model = fastft.compile(model)
    got = run(model, inputs)
    assert torch.equal(expected[0], got[0])
    report = fastft.report(model)
    assert report.layers == 0 and any("gpt_neox" in note and "unrewritten" in note for note in report.notes)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"plan": "quick"}, ["plan", "'quick'", "auto"]),
        ({"backend": "inducter"}, ["did you mean 'inductor'"]),
        ({"disable": ("norms",), "plan": "x"}, ["'norms'", "did you mean 'norm'", "plan"]),
        ({"implementations": {"norm": "triton"}}, ["implementations['norm']", "'op' or 'torch'"]),
        ({"implementations": {"nrm": "op"}}, ["implementations: expected one of", "'nrm'. did you mean 'norm'?"]),
        ({"implementations": "torch"}, ["implementations: expected a dict", "Such as {"]),
        ({"dynamic": "yes"}, ["dynamic: expected True, False or None, got 'yes'"]),
    ],
)
def test_wrong_arguments_are_named_together(options, told):
    with pytest.raises(UsageError) as caught:
        fastft.compile(make("llama", torch.float32, False), **options)
    assert all(text in str(caught.value) for text in told)


def test_one_rewrite_alone_is_told_once_and_with_a_list():
    def told(disable):
        with pytest.raises(UsageError) as caught:
            fastft.compile(make("llama", torch.float32, False), disable=disable)
        return str(caught.value)

    start = f"disable: expected a list of names of rewrites, of {[step.name for step in PASSES]}, got"
    assert told("rope") == f"{start} 'rope'. Write ['rope']."
    assert told("ropes") == f"{start} 'ropes'. did you mean 'rope'?"
    assert told(5) == f"{start} 5"
    assert told(iter(["rope"])).startswith(f"{start} <list_iterator object")  # which could be gone through once


@pytest.mark.parametrize("batch", [5, (4,), (4, 0), (4, 1.5), "ab", (True, 8)])
def test_a_wrong_largest_batch_leaves_the_model_as_it_was(batch):
    model = fastft.compile(make("llama", torch.float32, True), backend="eager", disable=["rope"])
    before = get_state(model).compiled
    with pytest.raises(UsageError) as caught:
        fastft.compile(model, batch=batch)
    assert str(caught.value) == (
        f"batch: expected (rows, length), two whole numbers of at least 1, or None, got {batch!r}. "
        "Such as (4, 1024): 4 rows of 1024 tokens."
    )
    assert get_state(model).compiled is before and before.settings.backend == "eager"
    assert all(layer._compiled_call_impl is not None for layer in before.layers)


@pytest.mark.parametrize("call", [fastft.compile, fastft.report])
def test_what_is_no_model(call):
    with pytest.raises(UsageError, match=r"^model: expected a model, got 'int'. fastft.load returns the pair"):
        call(5)


def test_disabled_rewrites_are_left_out():
    model = fastft.compile(make("llama", torch.float32, True), backend="eager", disable=("norm", "rope"))
    run(model, batch(0))
    assert set(fastft.report(model).applied()) == {"lora", "glu"}


LEFT_ALONE = {
    "dropout": ({"lora_dropout": 0.3}, "dropout"),
    "dora": ({"use_dora": True}, "in pieces"),  # PEFT's code for it cannot be traced whole
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_cannot_be_fused_still_runs_and_is_named(name):
    options, word = LEFT_ALONE[name]
    base = tiny_model("llama")
    base.set_attn_implementation("eager")
    model = fastft.compile(with_lora(base, torch.float32, **options).train(), backend="eager")
    inputs = batch(0)
    if name == "dropout":  # the two paths draw other random numbers: compare the expectation-free part, eval of dropout
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    with uncompiled(model):
        expected = run(model, inputs)
    agree(expected, run(model, inputs))
    report = fastft.report(model)
    told = [r.reason for r in report.refused() if r.rule == "lora"] or list(report.notes)
    assert told and all(word in reason for reason in told)
    assert "lora" not in report.applied()
    assert set(report.applied()) == ({"glu", "norm", "rope"} if name == "dropout" else {"norm"})


def test_different_ranks_scales_and_untouched_layers():
    options = {
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"v_proj": 3},
        "layers_to_transform": [1],
        "target_modules": PROJECTIONS,
    }
    models = []
    for _ in range(2):
        torch._dynamo.reset()
        base = tiny_model("qwen2", num_hidden_layers=3)
        base.set_attn_implementation("eager")
        models.append(with_lora(base, torch.float32, **options).train())
    model = fastft.compile(models[1], backend="eager")
    agree(run(models[0], batch(0)), run(model, batch(0)))
    assert fastft.report(model).applied()["lora"] == 7


def test_autocast_with_fp32_adapters():
    """bf16 autocast over an fp32 model and over a bf16 model with fp32 adapters, as trainers run it."""
    for dtype in (torch.float32, torch.bfloat16):
        torch._dynamo.reset()
        models = []
        for wide in (torch.float64, dtype, dtype):
            base = tiny_model("llama", dtype=torch.bfloat16).to(wide)
            base.set_attn_implementation("eager")
            adapters = with_lora(base, torch.float32)
            for name, parameter in adapters.named_parameters():
                if "lora_" in name and wide == torch.bfloat16:
                    parameter.data = parameter.data.float()
            models.append(adapters.train())
        truth = run(models[0], batch(0))
        model = fastft.compile(models[2], backend="aot_eager")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected, got = run(models[1], batch(0)), run(model, batch(0))
        assert relative(truth[0], got[0]) <= 1.25 * relative(truth[0], expected[0])
        assert relative(flat(truth[2]), flat(got[2])) <= 1.5 * relative(flat(truth[2]), flat(expected[2]))
        assert fastft.report(model).refused() == ()


@pytest.mark.parametrize("plan", ["keep", "min"])
def test_dropout_draws_once_for_forward_and_backward(plan):
    """The loss along the gradient, at one seed: a mask drawn anew in the backward would give another slope."""
    model = with_lora(tiny_model("llama"), torch.float32, lora_dropout=0.5).train()
    fastft.compile(model, plan=plan, backend="aot_eager")

    def loss():
        torch.manual_seed(5)
        return model(**batch(0), use_cache=False).loss

    loss().backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    slope = sum((p.grad**2).sum() for p in trained).item()
    step = 0.01 / slope**0.5
    ends = []
    for sign in (1, -2):
        for p in trained:
            p.data.add_(p.grad, alpha=sign * step)
        ends.append(loss().item())
    assert abs((ends[0] - ends[1]) / (2 * step) / slope - 1) < 0.02


def test_per_layer_scales_and_epsilons_are_not_shared_between_layers():
    models = []
    for _ in range(2):
        base = tiny_model("llama", num_hidden_layers=3)
        base.set_attn_implementation("eager")
        base.model.layers[1].input_layernorm.variance_epsilon = 0.5
        scales = {"layers.1.self_attn.q_proj": 64, "layers.2.mlp.gate_proj": 3}
        models.append(with_lora(base, torch.float32, alpha_pattern=scales).train())
    eager, model = models[0], fastft.compile(models[1], backend="eager")
    agree(run(eager, batch(0)), run(model, batch(0)))
    for module in [*eager.modules(), *model.modules()]:
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.7)
    agree(run(eager, batch(1)), run(model, batch(1)))
    assert fastft.report(model).refused() == ()


def test_a_model_that_changes_after_compile_is_compiled_as_it_is_then():
    from peft import LoraConfig

    models = [tiny_model("llama").train() for _ in range(2)]
    for model in models:
        model.set_attn_implementation("eager")
    fastft.compile(models[1], backend="eager")
    agree(*(run(model, batch(0)) for model in models))
    models = [with_lora(model, torch.float32).train() for model in models]
    agree(*(run(model, batch(0)) for model in models))
    with models[0].disable_adapter(), models[1].disable_adapter():
        outputs = [model(**batch(0), use_cache=False).logits for model in models]
    assert relative(*outputs) < 2e-6
    for model in models:
        torch.manual_seed(3)
        model.add_adapter("two", LoraConfig(r=2, lora_alpha=7, init_lora_weights=False, target_modules="all-linear"))
        model.set_adapter("two")
    agree(*(run(model, batch(0)) for model in models))
    torch._dynamo.reset()  # what follows is more variants than Dynamo keeps of one function
    models = [model.merge_and_unload().requires_grad_(True).train() for model in models]
    agree(*(run(model, batch(0)) for model in models))


def test_a_copy_of_a_compiled_model_says_that_it_is_not_compiled():
    _, model = pair("llama")
    expected = run(model, batch(0))
    copied = copy.deepcopy(model)
    with pytest.raises(UsageError, match="compiled model"):
        fastft.report(copied)
    agree(expected, run(copied, batch(0)))
    agree(expected, run(fastft.compile(copied, backend="eager"), batch(0)))
    assert graphs(copied) == graphs(model) == 3


def in_a_process_of_its_own(*lines):
    done = subprocess.run([sys.executable, "-c", "\n".join(("import torch", *lines))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_is_pickled_while_compiled_finds_its_attention_where_it_is_loaded(tmp_path):
    _, model = pair("llama")
    torch.save(model.get_base_model(), tmp_path / "model.pt")
    told = in_a_process_of_its_own(
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False).eval()",
        "print(model.config._attn_implementation, *model(input_ids=torch.tensor([[3, 4]])).logits.shape)",
    )
    assert told == "fastft 1 2 259"


@pytest.mark.parametrize("earlier", ["sdpa", "eager"])
def test_uncompile_gives_back_the_attention_that_the_model_had(earlier, tmp_path):
    model = tiny_model("llama")
    model.set_attn_implementation(earlier)
    for _ in range(2):  # compiled again, it was not fastft's either
        fastft.compile(model, backend="eager")
        assert model.config._attn_implementation == "fastft"
    model.save_pretrained(tmp_path / "saved")
    assert "fastft" not in (tmp_path / "saved" / "config.json").read_text()
    uncompile(model)
    assert model.config._attn_implementation == earlier
    model.__dict__.pop("fastft_state")  # nothing else of fastft is left that would register its attention
    torch.save(model, tmp_path / "model.pt")
    told = in_a_process_of_its_own(
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)",
        "print(model.config._attn_implementation, *model(input_ids=torch.tensor([[3, 4]])).logits.shape)",
    )
    assert told == f"{earlier} 1 2 259"


def test_uncompile_leaves_an_attention_that_was_set_since():
    model = fastft.compile(tiny_model("llama"), backend="eager")
    model.set_attn_implementation("eager")
    uncompile(model)
    assert model.config._attn_implementation == "eager"
    copied = copy.deepcopy(fastft.compile(model, backend="eager"))
    assert uncompile(fastft.compile(copied, backend="eager")).config._attn_implementation == "sdpa"


def test_attentions_of_sub_configs_are_given_back_one_by_one():
    given = {"": "sdpa", "text_config": "eager", "vision_config": "sdpa"}
    config = transformers.AutoConfig.for_model("gemma3")
    config._attn_implementation = given
    model = SimpleNamespace(
        config=config, set_attn_implementation=lambda one: setattr(config, "_attn_implementation", one)
    )
    before = attention.implementations(model)
    assert before == given
    config._attn_implementation = {"": "fastft", "text_config": "fastft", "vision_config": "flash_attention_2"}
    attention.put_back(model, before)
    assert attention.implementations(model) == given | {"vision_config": "flash_attention_2"}
