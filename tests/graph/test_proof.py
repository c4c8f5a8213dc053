"""A wrong spec costs a rewrite and nothing else: the proof refuses it and the numbers stay eager's."""

import attrs
import pytest
import torch
from tiny import batch, flat, in_nf4, make, relative, run, with_lora

import fastft
from fastft.graph.head import head_check
from fastft.graph.twin import tiny_model
from fastft.graph.verify import prove, relative_difference
from fastft.registry.resolve import resolve
from fastft.state import update_state


def with_spec(model, spec):
    update_state(model, spec=spec)
    return fastft.compile(model, backend="eager")


def change(spec, field, **changes):
    return attrs.evolve(spec, **{field: tuple(attrs.evolve(point, **changes) for point in getattr(spec, field))})


WRONG = {
    "offset left out": ("gemma2", "norms", {"offset": 0.0}, "norm"),
    "offset made up": ("llama", "norms", {"offset": 1.0}, "norm"),
    "another epsilon's attribute": ("llama", "norms", {"eps": "eps"}, "norm"),
    "LayerNorm for RMSNorm": ("llama", "norms", {"kind": "layer"}, "norm"),
    "wrong cast order": ("llama", "norms", {"cast": "after_weight"}, "norm"),
    "the other wrong cast order": ("olmo2", "norms", {"cast": "before_weight"}, "norm"),
    "wrong activation": ("gemma2", "glus", {"activation": "gelu"}, "glu"),
    "gate and up swapped": ("llama", "glus", {"gate": "up_proj", "up": "gate_proj"}, "glu"),
    "no such projection": ("llama", "glus", {"gate": "gate"}, "glu"),
    "wrong pairs rotated": ("llama", "attentions", {"rope": "interleaved"}, "rope"),
    "wrong table": ("llama", "attentions", {"rope_table": "pairs"}, "rope"),
    "both wrong at once": ("llama", "attentions", {"rope": "interleaved", "rope_table": "pairs"}, "rope"),
    "precision of the rotation": ("cohere", "attentions", {"rope_precision": "input"}, "rope"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_spec_is_refused_and_the_model_stays_right(name):
    family, field, changes, rule = WRONG[name]
    reference = make(family, torch.bfloat16, lora=False)
    model = with_spec(make(family, torch.bfloat16, lora=False), change(resolve(reference.config), field, **changes))
    inputs = batch(0)
    expected, got = run(reference, inputs), run(model, inputs)
    report = fastft.report(model)
    assert {r.rule for r in report.refused()} == {rule}
    assert rule not in report.applied()
    assert all(r.reason for r in report.refused())
    # What is left is attention, whose rounding differs from eager's by a few units of bf16.
    assert relative(expected[0], got[0]) < 1e-2
    assert relative(flat(expected[2]), flat(got[2])) < 3e-2


@pytest.mark.parametrize(
    "family, changes", [("gemma2", {"softcap": None}), ("granite", {"scale": None}), ("cohere", {"scale": None})]
)
def test_forgotten_scale_or_soft_cap_of_the_head_is_refused(family, changes):
    model = make(family, torch.float32, lora=False)
    spec = resolve(model.config)
    update_state(model, spec=spec)
    assert head_check(model).fused
    update_state(model, spec=attrs.evolve(spec, head=attrs.evolve(spec.head, **changes)))
    assert "other logits" in head_check(model).reason
    assert "other logits" in fastft.report(fastft.compile(model, backend="eager")).head
    assert model.training


def test_nan_is_never_a_pass():
    a = torch.ones(3)
    assert relative_difference(a, torch.tensor([1.0, float("nan"), 1.0])) == float("inf")
    assert relative_difference(torch.tensor([1.0, float("nan"), 1.0]), a) == float("inf")


def test_a_gradient_that_is_wrong_is_refused(monkeypatch):
    from fastft.kernels import glu

    right = glu.ref.glu
    monkeypatch.setattr(glu.ref, "glu", lambda gate, up, activation: right(gate.detach(), up, activation))
    model = fastft.compile(make("llama", torch.float32, lora=False), backend="eager")
    run(model, batch(0))
    assert {r.rule for r in fastft.report(model).refused()} == {"glu"}


class GatedNorm(torch.nn.Module):
    """Normalises groups of the last dimension: no norm as the specs know them, under a name that one of them has."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 64).view(4, 16))
        self.variance_epsilon = 1e-6

    def forward(self, x):
        groups = x.view(*x.shape[:-1], 4, 16)
        scale = torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (groups * scale * self.weight).flatten(-2)


class GreedyNorm(GatedNorm):
    """Changes its input in place as well, which what follows sees."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(64))

    def forward(self, x):
        x[..., 0].mul_(2)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def with_norm(kind):
    model = make("llama", torch.float32, lora=True)
    for layer in model.get_base_model().model.layers:
        layer.post_attention_layernorm = kind()
    return model


@pytest.mark.parametrize("implementation", ["op", "torch"])
@pytest.mark.parametrize("kind, told", [(GatedNorm, "cannot be computed so"), (GreedyNorm, "in place")])
def test_a_module_that_is_not_what_its_class_is_said_to_be_is_left_alone(kind, told, implementation):
    eager, model = with_norm(kind), with_norm(kind)
    spec = change(resolve(eager.config), "norms", classes=("LlamaRMSNorm", kind.__name__))
    update_state(model, spec=spec)
    fastft.compile(model, backend="eager", implementations={"norm": implementation})
    expected, got = run(eager, batch(0)), run(model, batch(0))
    assert relative(expected[0], got[0]) < 2e-6
    assert relative(flat(expected[2]), flat(got[2])) < 5e-6
    assert {r.rule for r in fastft.report(model).refused()} == {"norm"}
    assert all(told in r.reason for r in fastft.report(model).refused())


class OddTables(torch.nn.Module):
    """Cosines and sines that differ in every feature, under a rotation that usually gets each twice."""

    def forward(self, x, position_ids):
        angles = position_ids[..., None] * torch.linspace(0.1, 1.0, 16)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def test_rotation_tables_that_do_not_repeat_as_the_spec_says_are_seen():
    models = [make("llama", torch.float32, lora=True) for _ in range(2)]
    for model in models:
        model.get_base_model().model.rotary_emb = OddTables()
    eager, model = models[0], fastft.compile(models[1], backend="eager")
    expected, got = run(eager, batch(0)), run(model, batch(0))
    assert relative(expected[0], got[0]) < 2e-6
    assert relative(flat(expected[2]), flat(got[2])) < 5e-6
    assert {(r.rule, "do not repeat" in r.reason) for r in fastft.report(model).refused()} == {("rope", True)}


def test_an_epsilon_that_is_no_number_is_refused():
    reference = make("llama", torch.float32, lora=False)
    model = with_spec(
        make("llama", torch.float32, lora=False), change(resolve(reference.config), "norms", eps="weight")
    )
    assert relative(run(reference, batch(0))[0], run(model, batch(0))[0]) < 2e-6
    assert {"no number 'weight'" in r.reason for r in fastft.report(model).refused()} == {True}


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"module": "output"}, "no module 'output'"),
        ({"scale": "logit_scaling"}, "'logit_scaling'"),
        ({"softcap": "cap"}, "'cap'"),
    ],
)
def test_names_of_the_head_that_the_model_does_not_have_cost_the_rewrite_only(changes, told):
    model = make("granite", torch.float32, lora=False)
    spec = resolve(model.config)
    with_spec(model, attrs.evolve(spec, head=attrs.evolve(spec.head, **changes)))
    assert told in fastft.report(model).head
    assert run(model, batch(0))[1].isfinite()


def test_what_was_proved_without_autocast_is_proved_again_with_it(monkeypatch):
    from fastft.kernels import rms_norm

    right = rms_norm.ref.rms_norm

    def wrong_under_autocast(*args):
        return right(*args) * (1.5 if torch.is_autocast_enabled("cpu") else 1.0)

    monkeypatch.setattr(rms_norm.ref, "rms_norm", wrong_under_autocast)
    model = fastft.compile(make("llama", torch.float32, lora=True), backend="eager")
    run(model, batch(0))
    assert not fastft.report(model).refused()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(model, batch(0))
    assert {r.rule for r in fastft.report(model).refused()} == {"norm"}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "cohere"])
def test_a_proof_takes_a_part_of_a_long_batch(family, monkeypatch):
    """Every region is replaced as at full length, no proof sees more tokens than allowed, the numbers are eager's."""
    from fastft.graph import verify

    monkeypatch.setattr(verify, "PROOF_TOKENS", 24)
    seen, prove_whole = [], verify._run

    def watched(function, values, seed):
        seen.extend(v.shape for v in values.values() if isinstance(v, torch.Tensor) and v.dim() >= 3)
        return prove_whole(function, values, seed)

    monkeypatch.setattr(verify, "_run", watched)
    reference = make(family, torch.float32, lora=True)
    model = fastft.compile(make(family, torch.float32, lora=True), backend="eager")
    inputs = batch(0, length=50)
    expected, got = run(reference, inputs), run(model, inputs)
    assert relative(flat(expected[2]), flat(got[2])) < 1e-5
    report = fastft.report(model)
    assert report.refused() == () and report.applied()["lora"] >= 8
    assert seen and not [shape for shape in seen if 50 in shape or 12 not in shape]


def test_what_was_proved_of_one_size_is_proved_again_of_another(monkeypatch):
    proved = []

    def noted(owner, region, *rest, **more):
        (x,) = region.inputs
        weight = region.parameters["base_layer.weight"].meta["example_value"]
        proved.append((tuple(weight.shape), x not in more["frozen"]))
        return prove(owner, region, *rest, **more)

    monkeypatch.setattr("fastft.graph.passes.context.prove", noted)
    model = with_lora(tiny_model("llama"), torch.float32, target_modules=["o_proj", "down_proj"]).train()
    others = ("feed_forward", "glu", "norm", "rope")
    run(fastft.compile(model, backend="eager", disable=others), batch(0))
    assert fastft.report(model).refused() == ()
    # Of the first layer's first projection the input needs no gradient; later ones differ in their sizes alone.
    assert len(proved) == len(set(proved)) == 3


def test_what_is_captured_without_gradients_is_proved_without_them(monkeypatch, recwarn):
    """On a CPU bitsandbytes multiplies then by an operation that has none; with gradients it is proved anew."""
    found = []

    def proving(*args, **kwargs):
        verdict = prove(*args, **kwargs)
        found.append((torch.is_grad_enabled(), verdict.ok, verdict.gradient > 0))
        return verdict

    monkeypatch.setattr("fastft.graph.passes.context.prove", proving)
    base = in_nf4(tiny_model("llama", dtype=torch.bfloat16, intermediate_size=128))
    model = fastft.compile(with_lora(base, torch.bfloat16).train(), backend="eager")
    with torch.no_grad():
        plain = model(**batch(0), use_cache=False, lengths_vary=True).logits
    without = len(found)
    assert without and set(found) == {(False, True, False)}
    run(model, batch(0))
    assert len(found) > without and (True, True, True) in found[without:] and all(one[0] for one in found[without:])
    with torch.no_grad():
        assert torch.equal(model(**batch(0), use_cache=False, lengths_vary=True).logits, plain)
    assert not [str(one.message) for one in recwarn if "autograd kernel" in str(one.message)]
