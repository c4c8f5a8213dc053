"""The levels of a layer: bytes that autograd really keeps against the estimate's, gradients, mixtures, offloading."""

import pytest
import torch
from counting import Counting
from tiny import batch, flat, in_nf4, make, relative, run, with_lora

import fastft
from fastft.errors import UsageError
from fastft.graph.recompute import choose, roles_of, size_of
from fastft.graph.twin import tiny_model
from fastft.memory.estimate import Mode, own_bytes_per_token
from fastft.memory.levels import LEVELS
from fastft.memory.offload import Offloader
from fastft.memory.plan import solve
from fastft.state import get_state

ROWS, LENGTH = 4, 64
# Every kind of layer: packed projections, norms on both sides, behind or side by side, normalised queries.
FAMILIES = ("llama", "phi3", "gemma3_text", "olmo2", "cohere")


def eager(family, layers):
    """Return a model whose layers all attend to everything."""
    changes = {"layer_types": ["full_attention"] * layers} if family in ("gemma3_text", "gemma2", "cohere2") else {}
    return make(family, torch.float32, True, num_hidden_layers=layers, **changes)


def compiled(family, modes):
    """Return a model whose layers have these modes, with fastft's attention."""
    torch._dynamo.reset()
    model = eager(family, len(modes))
    model.set_attn_implementation("sdpa")
    model = fastft.compile(model, backend="aot_eager")
    planned = get_state(model).compiled.planned
    planned.chosen = tuple(modes)
    planned.offloader = Offloader(torch.device("cpu"), least_bytes=1 << 12)
    return model, planned


@pytest.mark.parametrize("family", FAMILIES)
def test_each_level_keeps_what_the_estimate_says_and_gives_the_same_gradients_bit_by_bit(family):
    """A layer of every level in one model, behind one whose input needs no gradient, against "keep" everywhere."""
    modes = [Mode("min"), *(Mode(level, True) for level in LEVELS)]
    model, planned = compiled(family, [Mode("keep")] * len(modes))
    planned.offloader = Counting()
    inputs = batch(0, rows=ROWS, length=LENGTH)
    expected = run(model, inputs)
    planned.chosen = tuple(modes)
    got = run(model, inputs)
    assert torch.equal(flat(expected[2]), flat(got[2]))
    setup = planned.setup
    wanted = [ROWS * LENGTH * (own_bytes_per_token(setup, level) + 4 * setup.shape.hidden) for level in LEVELS]
    assert setup.element == 4 and planned.offloader.by_call == wanted


def test_what_a_layer_holds_anyway_is_not_moved():
    """Packed weights and their scales, which a forward saves as it saves its results."""
    torch._dynamo.reset()
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    model.set_attn_implementation("sdpa")
    model = with_lora(in_nf4(model, nested=False), torch.float32).train()
    model = fastft.compile(model, backend="aot_eager")
    planned = get_state(model).compiled.planned
    planned.chosen, planned.offloader = (Mode("keep", True),) * 2, Counting()
    run(model, batch(0, rows=ROWS, length=LENGTH))
    assert planned.offloader.by_call == [ROWS * LENGTH * (own_bytes_per_token(planned.setup, "keep") + 4 * 64)] * 2


MIXTURES = {
    "two levels": [Mode("attention"), Mode("attention"), Mode("keep")],
    "all moved": [Mode("min", True)] * 3,
    "moved and kept": [Mode("context", True), Mode("keep", True), Mode("outputs")],
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixed_and_moved_layers_give_the_gradients_of_eager_without_compiling_again(name):
    reference = eager("llama", 3)
    model, planned = compiled("llama", MIXTURES[name])
    graphs = []
    for seed in range(3):
        inputs = batch(seed, rows=ROWS, length=LENGTH)
        expected, got = run(reference, inputs), run(model, inputs)
        assert relative(flat(expected[2]), flat(got[2])) < 5e-6
        graphs.append(len(fastft.report(model).graphs))
    assert graphs[0] == graphs[2] <= 2 * len({mode.level for mode in MIXTURES[name]}) + 1  # the last norm's
    moved = any(mode.offload for mode in MIXTURES[name])
    assert (planned.offloader.moved_bytes > 0) == moved
    assert planned.offloader.pool.allocated_bytes * 3 == planned.offloader.moved_bytes  # a pool, used again
    assert get_state(model).compiled.whole and not get_state(model).compiled.eager_calls


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("plan", ["offload", "min"])
def test_layers_in_pieces_are_moved_too(plan, backend):
    """What runs between the pieces runs under Dynamo, the hooks that move what it saves among it."""
    torch._dynamo.reset()
    base = tiny_model("llama", num_hidden_layers=3)
    base.set_attn_implementation("sdpa")
    model = with_lora(base, torch.float32, use_dora=True, target_modules=["q_proj", "down_proj"]).train()
    expected = run(model, batch(0))
    fastft.compile(model, plan, backend=backend)
    planned = get_state(model).compiled.planned
    planned.offloader = Offloader(torch.device("cpu"), least_bytes=1)
    if plan == "min":  # the layer behind those that move lets go of what they parked
        planned.chosen = (Mode("min", True), Mode("min"), Mode("min", True))
    got = run(model, batch(0))
    assert planned.offloader.moved_bytes > 0 and not get_state(model).compiled.whole
    assert abs(expected[1] - got[1]) < 1e-6 and expected[2].keys() == got[2].keys()
    assert max(relative(expected[2][name], got[2][name]) for name in got[2]) < 5e-6
    assert "in pieces, which keep more for the backward than the memory plan says" in fastft.report(model).notes[0]


def test_a_budget_is_solved_for_the_largest_batch_seen():
    model = make("llama", torch.bfloat16, True, num_hidden_layers=4)
    model = fastft.compile(model, plan="100MB", backend="aot_eager", batch=(2, 32))
    planned = get_state(model).compiled.planned
    assert planned.largest == (2, 32) and planned.fits and {mode.level for mode in planned.modes} == {"keep"}
    assert "keep" in str(fastft.report(model)) and fastft.report(model).plan == "100MB"
    setup = planned.setup
    fixed = next(part.bytes for part in planned.predicted().parts if part.name == "workspace")
    planned.budget = int(fixed + (planned.predicted().peak - fixed) * 1.2)
    planned.see(8, 64, torch.device("cpu"))
    assert planned.largest == (8, 64)
    assert planned.modes == solve(planned.setup, planned.budget, None).modes != (Mode(),) * 4
    assert planned.predicted().peak > 0 and setup.tokens == 64
    modes = planned.modes
    planned.see(1, 64, torch.device("cpu"))
    assert planned.modes == modes and planned.largest == (8, 64)


@pytest.mark.parametrize("given", [None, (2, 32)])
def test_every_run_has_its_own_largest_batch(given):
    """Unless the plan was asked for one, which stands."""
    model = make("llama", torch.bfloat16, True, num_hidden_layers=4)
    model = fastft.compile(model, plan="4MB", backend="aot_eager", batch=given)
    planned, where, told = get_state(model).compiled.planned, torch.device("cpu"), []
    with planned.told_to(told.append):
        planned.begin("loss", None, (4, 64), where)
        assert planned.largest == (given or (4, 64))
        planned.see(8, 64, where)
        planned.begin("loss", None, (1, 16), where)
        assert planned.largest == (given or (1, 16))
        rows, length = planned.largest
        assert told[-1] == planned.unmet and f": a step of {rows} x {length} tokens " in planned.unmet
        said = list(told)
        planned.begin("loss", None, (1, 16), where)
        assert told == said  # nothing has come between
        planned.begin("loss", None, None, where)
    assert planned.largest == (given or (0, 0)) and bool(planned.unmet) is bool(given)


def test_a_plan_that_is_none_is_refused_together_with_other_mistakes():
    model = make("llama", torch.float32, True)
    with pytest.raises(UsageError, match=r"plan: .*'24GB'.* got '24GX'") as caught:
        fastft.compile(model, plan="24GX", backend="inducter")
    assert len(caught.value.problems) == 2


def test_roles_follow_from_the_graph():
    """A layer by hand: two matrix products before attention, one behind it, a gated pair and the one that ends it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def layer(x, w, tangents):
        q, k = x @ w, x @ w
        a = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], k[None])[0]
        r = x + a @ w
        y = r + (torch.nn.functional.silu(r @ w) * (r @ w)) @ w
        return y, tangents * 2

    graph = make_fx(layer)(torch.randn(8, 8), torch.randn(8, 8), torch.randn(8, 8)).graph
    roles = list(roles_of(node for node in graph.nodes if node.op != "output").values())
    for role, count in (("projection", 2), ("attention", 1), ("output", 1), ("feed_forward", 2), ("down", 1)):
        assert roles.count(role) == count or (role == "attention" and roles.count(role) >= 1), roles


def test_nothing_drawn_at_random_is_computed_again():
    from torch.fx.experimental.proxy_tensor import make_fx

    def joint(x, w, tangents_1):
        mask = torch.rand_like(x) > 0.5
        y = (x @ w) * mask
        return y, (tangents_1 * mask) @ w, tangents_1 * torch.tanh(y)

    graph = make_fx(joint)(torch.randn(64, 64), torch.randn(64, 64), torch.randn(64, 64)).graph
    next(
        node for node in graph.nodes if node.op == "placeholder" and "tangents" in str(node.target)
    ).name = "tangents_1"
    cut = choose(graph, "min")
    random = [node for node in graph.nodes if "rand" in node.name]
    assert random and not cut.again.intersection(random)
    assert sum(map(size_of, cut.saved)) <= 64 * 64 * 4
