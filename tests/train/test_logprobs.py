"""Log-probabilities of completions against logits in memory and against TRL's own head, with every gradient."""

import copy

import grouped
import pytest
import torch

from fastft.errors import UsageError
from fastft.graph.compile import compile as compile_layers
from fastft.graph.compile import report
from fastft.graph.head import find_head
from fastft.state import base_model
from fastft.train import step
from fastft.train.logprobs import completion_logprobs, head_logprobs

FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5, "sliding_window": 64},
    "gemma3_text": {"head_dim": 8, "sliding_window": 64},
}
# (prompt, completion) lengths of the rows below; rows that have the same prompt number have the same prompt.
ROWS = [(0, 5, 7), (1, 9, 3), (0, 5, 1), (0, 5, 0), (1, 9, 8), (2, 2, 4)]
KEEP = 8


def make_batch(rows=ROWS, vocabulary=96):
    return grouped.make_batch(rows, KEEP, 0, vocabulary)


def plain(model, ids, mask, keep, temperature=1.0):
    """Return log-probabilities and entropies of every row alone, without padding, from its logits."""
    values = [torch.zeros(len(ids), keep, dtype=torch.float64) for _ in range(2)]
    for row in range(len(ids)):
        real = mask[row].nonzero().squeeze(1)
        count = int(mask[row, -keep:].sum())
        if not count:
            continue
        logits = model(input_ids=ids[row, real][None], use_cache=False).logits[0, -count - 1 : -1]
        log_p = torch.log_softmax(logits.double() / temperature, -1)
        chosen = log_p.gather(1, ids[row, real[-count:], None]).squeeze(1)
        values[0][row, :count] = chosen
        values[1][row, :count] = -(log_p.exp() * log_p).sum(-1)
    return values


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst(ours, theirs):
    assert ours.keys() == theirs.keys() and ours
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-12)).item() for name in ours)


def weighted(values, seed=5):
    """Return a sum in which every token's log-probability and entropy has a weight of its own."""
    generator = torch.Generator().manual_seed(seed)
    return sum((torch.randn(v.shape, generator=generator) * v).sum() for v in values if v is not None)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_each_row_alone(family, lora, build_model):
    model = build_model(family, lora=lora, **FAMILIES[family]).train()
    ids, mask = make_batch()
    for temperature in (1.0, 0.7):
        got = completion_logprobs(model, ids, mask, KEEP, temperature=temperature, entropy=True)
        truth = plain(model, ids, mask, KEEP, temperature)
        assert got.logprobs.dtype == got.entropies.dtype == torch.float32
        for ours, exact in zip((got.logprobs, got.entropies), truth):
            torch.testing.assert_close(ours.double(), exact, rtol=3e-6, atol=1e-6)
            assert not ours[mask[:, -KEEP:] == 0].any()
        mine = gradients(model, weighted((got.logprobs, got.entropies)))
        assert worst(mine, gradients(model, weighted(truth))) < 3e-5


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere"])
def test_equals_trl(family, build_model):
    """Soft cap first, temperature after: as TRL has it."""
    from trl.trainer.utils import add_fused_lm_head

    ours = build_model(family, lora=False, **FAMILIES[family]).train()
    theirs = copy.deepcopy(ours)
    add_fused_lm_head(theirs, temperature=0.6, outputs=("log_probs", "entropy"))
    ids, mask = make_batch()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-KEEP] = -100
    out = theirs(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    expected = out.log_probs[:, -KEEP:], out.entropy[:, -KEEP:]
    got = completion_logprobs(ours, ids, mask, KEEP, temperature=0.6, entropy=True)
    for value, reference in zip((got.logprobs, got.entropies), expected):
        torch.testing.assert_close(value, reference, rtol=5e-6, atol=2e-6)
    mine = gradients(ours, weighted((got.logprobs, got.entropies)))
    assert worst(mine, gradients(theirs, weighted(expected))) < 5e-5


def test_without_gradients_nothing_is_kept_and_the_values_are_the_same(build_model):
    model = build_model().train()
    ids, mask = make_batch()
    with torch.no_grad():
        alone = completion_logprobs(model, ids, mask, KEEP)
    got = completion_logprobs(model, ids, mask, KEEP, entropy=True)
    assert not alone.logprobs.requires_grad and alone.entropies is None
    torch.testing.assert_close(alone.logprobs, got.logprobs.detach(), rtol=1e-6, atol=1e-7)


def test_compiled_layers_are_used_and_agree(build_model):
    model, eager = (build_model().train() for _ in range(2))
    compile_layers(model, backend="aot_eager")
    ids, mask = make_batch()
    got, expected = (completion_logprobs(m, ids, mask, KEEP, entropy=True) for m in (model, eager))
    torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=3e-6, atol=1e-6)
    values = [(v.logprobs, v.entropies) for v in (got, expected)]
    assert worst(gradients(model, weighted(values[0])), gradients(eager, weighted(values[1]))) < 3e-5
    assert report(model).graphs


def test_a_head_without_a_spec_is_told_and_right(build_model):
    model = build_model("gpt_neox", lora=False, attention_dropout=0.0, hidden_dropout=0.0).train()
    ids, mask = make_batch()
    with pytest.warns(UserWarning, match="from all logits: no spec describes the head of 'gpt_neox'"):
        got = completion_logprobs(model, ids, mask, KEEP, temperature=1.3, entropy=True)
    truth = plain(model, ids, mask, KEEP, 1.3)
    torch.testing.assert_close(got.logprobs.double(), truth[0], rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(got.entropies.double(), truth[1], rtol=3e-6, atol=1e-6)
    assert worst(gradients(model, weighted((got.logprobs, got.entropies))), gradients(model, weighted(truth))) < 3e-5


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], None], ids=["lora on the head", "trained head"])
def test_a_head_that_learns(targets, build_model):
    more = {"targets": targets} if targets else {"modules_to_save": ["lm_head"]}
    model = build_model(**more).train()
    ids, mask = make_batch()
    got = completion_logprobs(model, ids, mask, KEEP, entropy=True)
    mine = gradients(model, weighted((got.logprobs, got.entropies)))
    assert any("lm_head" in name for name in mine)
    assert worst(mine, gradients(model, weighted(plain(model, ids, mask, KEEP)))) < 3e-5


def test_forbidden_tokens_have_no_share_in_the_entropy(build_model):
    model = build_model(lora=False).train()
    head = torch.nn.Linear(32, 96)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[90:] = -float("inf")
    model.lm_head = head
    ids, mask = make_batch(vocabulary=90)
    hidden = step.hidden_states(model, {"input_ids": ids, "attention_mask": mask})[:, -KEEP - 1 : -1]
    targets = ids[:, -KEEP:].masked_fill(mask[:, -KEEP:] == 0, -100)
    values = head_logprobs(find_head(model), hidden, targets, entropy=True)
    log_p = torch.log_softmax(model.lm_head(hidden)[..., :90], -1)
    exact = log_p.gather(2, targets.clamp(min=0)[..., None]).squeeze(2), -(log_p.exp() * log_p).sum(-1)
    for value, reference in zip(values, exact):
        torch.testing.assert_close(value, reference * (targets >= 0), rtol=1e-5, atol=1e-6)
    grad = gradients(model, sum(v.sum() for v in values))
    assert all(g.isfinite().all() for g in grad.values())


def test_a_batch_of_empty_completions_is_zero_and_has_zero_gradients(build_model):
    model = build_model().train()
    ids, mask = make_batch([(0, 5, 0), (1, 4, 0)])
    got = completion_logprobs(model, ids, mask, KEEP, entropy=True)
    assert not got.logprobs.any() and not got.entropies.any()
    assert all(not g.any() for g in gradients(model, got.logprobs.sum() + got.entropies.sum()).values())


def test_every_mistake_is_told_at_once(build_model):
    ids, mask = make_batch()
    with pytest.raises(UsageError, match=r"keep: (.|\n)*attention_mask: (.|\n)*temperature: "):
        completion_logprobs(build_model(), ids, mask[:, 1:], ids.shape[1], temperature=0.0)


def test_autocast_equals_logits_under_autocast(build_model):
    model = build_model().train()
    ids, mask = make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = completion_logprobs(model, ids, mask, KEEP)
        expected = plain(model, ids, mask, KEEP)[0]
    assert got.logprobs.dtype == torch.float32
    torch.testing.assert_close(got.logprobs.double(), expected, rtol=0, atol=3e-2)
    assert base_model(model).lm_head.weight.dtype == torch.float32
