"""The engine "transformers": its tokens and log-probabilities are the model's own, and the model is left as it was."""

from inspect import signature

import pytest
import tiny
import torch

import fastft
from fastft.errors import EngineError, UsageError
from fastft.rollout.base import Completion, Sampling
from fastft.rollout.hf import TransformersEngine

PROMPTS = [[5, 9, 17, 33], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19], [5, 9, 17, 34]]


def engine_of(model, **bounds):
    engine = TransformersEngine(**bounds)
    engine.hand_over(model)
    return engine


def logits_of(model, ids):
    """Logits [T, V] of one row: no cache, no padding."""
    training = model.training
    with torch.no_grad():
        out = model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    model.train(training)
    return out


def greedy(model, prompt, count, stop=()):
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        ids.append(logits_of(model, ids)[-1].argmax().item())
        if ids[-1] in stop:
            break
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "mistral"])
def test_greedy_is_that_of_the_model_without_cache_or_padding(family):
    model = tiny.make(family, torch.float32, lora=True)
    completions = engine_of(model).generate(PROMPTS, Sampling(9, temperature=0.0), count=2)
    for prompt, pair in zip(PROMPTS, completions):
        assert pair[0] == pair[1] and pair[0].ids == greedy(model, prompt, 9)
        expected = logits_of(model, [*prompt, *pair[0].ids])[len(prompt) - 1 : -1].log_softmax(-1)
        truth = expected.gather(1, torch.tensor(pair[0].ids)[:, None])[:, 0]
        assert torch.tensor(pair[0].logprobs) == pytest.approx(truth, abs=2e-5)


def truncated(logits, sampling):
    """The log-probabilities of the distribution that is sampled from, written out for one place."""
    logits = logits.double() / sampling.temperature
    sizes, order = logits.sort(descending=True)
    if sampling.top_k:
        sizes, order = sizes[: sampling.top_k], order[: sampling.top_k]
    probs = sizes.softmax(-1)
    fewest = probs.cumsum(-1) - probs < sampling.top_p  # the fewest likeliest tokens that reach top_p
    probs = probs[fewest] / probs[fewest].sum()
    order = order[fewest][probs >= sampling.min_p * probs[0]]
    return torch.full_like(logits, -torch.inf).index_put((order,), logits[order].log_softmax(-1))


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2},
     {"temperature": 1.7, "top_k": 12, "top_p": 0.8, "min_p": 0.05}],
)  # fmt: skip
def test_log_probabilities_are_of_what_was_sampled_from(changes):
    model = tiny.make("llama", torch.float32, lora=True)
    sampling = Sampling(6, seed=3, **changes)
    for prompt, row in zip(PROMPTS, engine_of(model).generate(PROMPTS, sampling, count=3)):
        for completion in row:
            logits = logits_of(model, [*prompt, *completion.ids])[len(prompt) - 1 : -1]
            truth = [truncated(place, sampling)[token].item() for place, token in zip(logits, completion.ids)]
            assert completion.logprobs == pytest.approx(truth, abs=5e-5)


def test_tokens_come_as_often_as_the_distribution_says():
    model = tiny.make("llama", torch.float32, lora=True)
    count, sampling = 6000, Sampling(1, top_k=8, seed=0)
    (row,) = engine_of(model).generate([PROMPTS[0]], sampling, count=count)
    expected = truncated(logits_of(model, PROMPTS[0])[-1], sampling).exp() * count
    seen = torch.bincount(torch.tensor([c.ids[0] for c in row]), minlength=len(expected)).double()
    inside = expected > 0
    assert seen[~inside].sum() == 0
    chi_square = ((seen - expected)[inside] ** 2 / expected[inside]).sum().item()
    assert chi_square < 26.0  # 7 degrees of freedom: more in 5 runs of 10 000


def test_a_repetition_penalty_sees_the_prompt_and_no_padding():
    model = tiny.make("llama", torch.float32, lora=True)
    sampling = Sampling(7, temperature=0.0, repetition_penalty=1.5)
    together = engine_of(model).generate(PROMPTS, sampling)
    for prompt, (completion,) in zip(PROMPTS, together):
        ids = list(prompt)
        for token in completion.ids:
            logits = logits_of(model, ids)[-1]
            for seen in set(ids):
                logits[seen] = logits[seen] / 1.5 if logits[seen] > 0 else logits[seen] * 1.5
            assert token == logits.argmax().item()
            ids.append(token)
    assert together != engine_of(model).generate(PROMPTS, Sampling(7, temperature=0.0))


def test_rows_end_at_their_stop_token_and_the_others_go_on():
    model = tiny.make("llama", torch.float32, lora=True)
    prompts = [[n, 2 * n, 3] for n in range(5, 29)]
    free = [greedy(model, prompt, 12) for prompt in prompts]
    stop = (free[0][3], free[1][1], free[2][0])
    completions = [row[0] for row in engine_of(model).generate(prompts, Sampling(12, 0.0, stop_ids=stop))]
    assert [c.ids for c in completions] == [greedy(model, prompt, 12, stop) for prompt in prompts]
    lengths = sorted(len(c.ids) for c in completions)
    assert lengths[0] == 1 and lengths[-1] == 12 and len(set(lengths)) > 3
    assert all(len(c.logprobs) == len(c.ids) for c in completions)


def forwards(model, monkeypatch):
    """Record [rows, length] of every forward pass."""
    base, seen = fastft.state.base_model(model), []
    forward = base.forward

    def watched(*args, **kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    watched.__signature__ = signature(forward)
    monkeypatch.setattr(base, "forward", watched)
    return seen


def test_a_prompt_is_computed_once_and_no_step_is_wasted(monkeypatch):
    model = tiny.make("llama", torch.float32, lora=True)
    seen = forwards(model, monkeypatch)
    engine_of(model).generate(PROMPTS, Sampling(5, temperature=0.0), count=8)
    assert seen == [(4, 9)] + [(32, 1)] * 4
    seen.clear()
    stop = tuple({engine_of(model).generate([p], Sampling(1, 0.0))[0][0].ids[0] for p in PROMPTS})
    seen.clear()
    engine_of(model).generate(PROMPTS, Sampling(5, temperature=0.0, stop_ids=stop), count=8)
    assert seen == [(4, 9)]  # every row ended at its first token


@pytest.mark.parametrize(
    ("bounds", "most"), [({"max_rows": 6}, 6), ({"max_rows": 2}, 2), ({"max_batch_tokens": 70}, 10)]
)
def test_bounded_batches_say_the_same(monkeypatch, bounds, most):
    model = tiny.make("llama", torch.float32, lora=True)
    free = engine_of(model).generate(PROMPTS, Sampling(5, temperature=0.0), count=3)
    seen = forwards(model, monkeypatch)
    bounded = engine_of(model, **bounds).generate(PROMPTS, Sampling(5, temperature=0.0), count=3)
    assert [[c.ids for c in row] for row in bounded] == [[c.ids for c in row] for row in free]
    assert max(rows for rows, _ in seen) <= most and len(seen) > 5


def test_a_seed_repeats_itself_and_leaves_the_random_state_alone():
    engine = engine_of(tiny.make("llama", torch.float32, lora=True))
    state = torch.get_rng_state()
    first, again, other = (engine.generate(PROMPTS, Sampling(8, seed=seed), count=2) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(state, torch.get_rng_state())
    assert engine.generate(PROMPTS, Sampling(8)) != engine.generate(PROMPTS, Sampling(8))  # torch's own generator


def test_a_compiled_model_in_training_is_left_as_found():
    model = fastft.compile(tiny.make("llama", torch.float32, lora=True), backend="aot_eager")
    model.train()
    layers = fastft.state.get_state(model).compiled.layers
    layers[1].mlp.eval()  # a user's own choice
    model.config.use_cache = False
    modes = {n: m.training for n, m in model.named_modules()}
    batch = tiny.batch(0)
    before = tiny.run(model, batch)
    engine_of(model).generate(PROMPTS, Sampling(4), count=2)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert model.config.use_cache is False and torch.is_grad_enabled()
    after = tiny.run(model, batch)
    assert torch.equal(before[1], after[1]) and torch.equal(tiny.flat(before[2]), tiny.flat(after[2]))
    assert fastft.report(model).notes == ()  # no training call ran uncompiled


def test_training_goes_on_under_the_autocast_that_sampling_ran_under():
    model = tiny.make("llama", torch.float32, lora=True)
    batch = tiny.batch(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        cast = engine_of(model).generate(PROMPTS, Sampling(4, temperature=0.0))
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    assert plain and all(torch.equal(p.grad, plain[n]) for n, p in model.named_parameters() if p.grad is not None)
    full = engine_of(model).generate(PROMPTS, Sampling(4, temperature=0.0))
    assert cast[0][0].logprobs != full[0][0].logprobs  # autocast was in force


def test_what_the_model_learns_is_sampled_from():
    model = tiny.make("llama", torch.float32, lora=True)
    engine = engine_of(model)
    before = engine.generate(PROMPTS, Sampling(6, temperature=0.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1)
    engine.hand_over(model)
    after = engine.generate(PROMPTS, Sampling(6, temperature=0.0))
    assert before != after and after[1][0].ids == greedy(model, PROMPTS[1], 6)


def test_an_engine_without_weights_says_so():
    engine = TransformersEngine()
    with pytest.raises(EngineError, match="call hand_over"):
        engine.generate(PROMPTS, Sampling(1))
    engine.hand_over(tiny.make("llama", torch.float32, lora=False))
    engine.sleep(), engine.wake()
    assert len(engine.generate(PROMPTS, Sampling(1))) == 4
    engine.close()
    with pytest.raises(EngineError, match="call hand_over"):
        engine.generate(PROMPTS, Sampling(1))


def test_logits_that_are_not_finite_are_an_error():
    model = tiny.make("llama", torch.float32, lora=True)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(EngineError, match="not finite"):
            engine_of(model).generate(PROMPTS, Sampling(3, temperature))


def test_a_model_spread_over_processes_is_refused():
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model = tiny.make("llama", torch.float32, lora=False)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(EngineError, match="FSDP"):
            engine_of(model)
    finally:
        destroy_process_group()


def test_all_mistakes_of_a_request_are_told_together():
    engine = engine_of(tiny.make("llama", torch.float32, lora=False, max_position_embeddings=128))
    wrong = Sampling(0, temperature=-1, top_p=0, top_k=-2, min_p=1, repetition_penalty=0, seed=-1)
    with pytest.raises(UsageError) as error:
        engine.generate([[], "text", [1.5]], wrong, count=0)
    told = str(error.value)
    for name in ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "count"):
        assert name in told
    assert all(f"prompts[{index}]" in told for index in range(3)) and len(error.value.problems) == 11
    with pytest.raises(UsageError, match=r"prompts\[1\]: expected at most 108 tokens.*got '120 tokens'"):
        engine.generate([[4], [4] * 120], Sampling(20))


def test_nothing_to_do():
    engine = engine_of(tiny.make("llama", torch.float32, lora=False))
    assert engine.generate([], Sampling(3)) == []
    assert Completion((1,)).logprobs is None
