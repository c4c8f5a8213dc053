"""Log-probabilities of sequences: those of the model's logits, in every layout, forward and backward."""

import itertools

import pytest
import torch

import fastft
from fastft.errors import UsageError
from fastft.graph.head import Head
from fastft.train import layout
from fastft.train.preference import sequence_logprobs
from fastft.train.preference.sequence_logprobs import sequence_logprobs as logprobs


def batch(kind):
    """Rows of unequal length, padded on the right; the last tokens of each bear labels."""
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(7, 96, (size,), generator=generator).tolist() for size in (5, 9, 3)]
    answers = [torch.randint(7, 96, (size,), generator=generator).tolist() for size in (4, 1, 6, 2, 7, 3)]
    rows = [(prompts[number % 3], answer) for number, answer in enumerate(answers)]
    if kind == "whole":
        rows = [(prompt[:1], prompt[1:] + answer) for prompt, answer in rows]
    if kind == "no answer":
        rows[1] = (rows[1][0], [])
    if kind == "no prompt":
        rows[2] = ([], rows[2][1])
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, mask, labels = (torch.full((len(rows), width), value) for value in (0, 0, -100))
    for number, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[number, :end] = torch.tensor(prompt + answer)
        mask[number, :end] = 1
        labels[number, len(prompt) : end] = torch.tensor(answer, dtype=torch.int64)
    if kind == "holes":
        labels[4, -3:-1] = labels[0, 6] = -100
    return ids, mask, labels


def from_logits(model, ids, mask, labels):
    logits = model(ids, attention_mask=mask).logits[:, :-1].float()
    log_p = logits.log_softmax(-1)
    targets, present = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
    values = {
        "log_probs": log_p.gather(2, targets[..., None])[..., 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "mean_logits": logits.mean(-1),
        "is_top1": (logits.argmax(-1) == targets).float(),
        "log_sum_sq_probs": (log_p.exp() ** 2).sum(-1).log(),
    }
    return {name: value * present for name, value in values.items()}


@pytest.mark.parametrize("kind", ["pairs", "whole", "no answer", "no prompt", "holes"])
@pytest.mark.parametrize("way", ["padded", "packed", "shared"])
def test_values_and_gradients(kind, way, build_model, monkeypatch):
    model = build_model()
    ids, mask, labels = batch(kind)
    wanted = from_logits(model, ids, mask, labels)
    weight = torch.randn(wanted["log_probs"].shape, generator=torch.Generator().manual_seed(3))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad((wanted["log_probs"] * weight).sum(), trained)
    if way != "padded":
        fastft.compile(model, backend="eager")
    seen = []
    monkeypatch.setattr(sequence_logprobs, "lay_out", lambda *args: seen.append(layout.lay_out(*args)) or seen[-1])
    found = logprobs(model, ids, mask, labels, statistics=True, share_prompts=way == "shared")
    if kind in ("pairs", "no answer"):
        assert [one.kind for one in seen] == [way]
    assert kind != "holes" or not seen
    for name, value in wanted.items():
        assert torch.allclose(getattr(found, name).float(), value, atol=2e-5), name
    for ours, theirs in zip(torch.autograd.grad((found.log_probs * weight).sum(), trained), gradients, strict=True):
        assert (ours - theirs).norm() <= 2e-5 * theirs.norm() + 1e-7


def test_a_head_that_no_spec_describes(build_model):
    model = build_model("gpt_neox", lora=False)
    ids, mask, labels = batch("pairs")
    with pytest.raises(UsageError, match="no spec describes the head"):
        logprobs(model, ids, mask, labels)


def test_rows_padded_on_the_left_are_refused(build_model):
    ids, mask, labels = (tensor.flip(1) for tensor in batch("pairs"))
    with pytest.raises(UsageError, match=r"attention_mask: .*padding on the right alone"):
        logprobs(build_model(), ids, mask, labels)


def test_statistics_hold_the_logits_of_one_chunk():
    """2,560 rows in chunks of 16 MiB, of which the head itself makes two copies: none is left of the chunk before."""
    generator = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(size, generator=generator) for size in ((2560, 8), (4096, 8)))
    linear = torch.nn.Linear(8, 4096, bias=False)
    linear.weight.data = weight * 3
    targets = torch.randint(0, 4096, (2560,), generator=generator)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        found = sequence_logprobs._statistics(Head(linear, 0.5, 0.0), hidden, targets)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    assert 16 << 20 < max(sizes) < 2.25 * (16 << 20)
    logits = hidden[:64].double() @ weight.double().t() * 1.5
    p = logits.softmax(-1)
    for value, truth in ((found[:64, 0], logits.mean(-1)), (found[:64, 2], p.square().sum(-1).log())):
        assert (value - truth).norm() < 1e-5 * truth.norm()
    assert torch.equal(found[:64, 1] == 1, logits.argmax(-1) == targets[:64])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_and_values_on_a_gpu(build_model):
    """Pairs of long answers under a large vocabulary: a tenth of the logits' size, and padded values."""
    vocabulary, prompt, answer, pairs = 131_072, 512, 1024, 8
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = build_model(vocab_size=vocabulary, max_position_embeddings=2048, **sizes).to("cuda", torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(7, vocabulary, (2 * pairs, prompt + answer), generator=generator)
    ids[pairs:, :prompt] = ids[:pairs, :prompt]
    mask = torch.ones_like(ids)
    for row in range(2 * pairs):
        mask[row, prompt + answer - 50 * row :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    ids, mask, labels = (tensor.cuda() for tensor in (ids * mask, mask, labels))
    padded = logprobs(model, ids, mask, labels).log_probs.detach()
    fastft.compile(model)
    model.train()
    logprobs(model, ids, mask, labels, statistics=True).log_probs.sum().backward()
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = logprobs(model, ids, mask, labels, statistics=True)
    found.log_probs.sum().backward()
    whole = 2 * pairs * (prompt + answer) * vocabulary * 2
    assert torch.cuda.max_memory_allocated() - before < whole / 10
    assert (found.log_probs - padded).abs().max() < 0.15 and (found.log_probs - padded).norm() < 1e-2 * padded.norm()
