"""Generation: batches equal single prompts, everything is left as found, streaming says the same."""

import threading

import pytest
import torch

from fastft.errors import DataError, UsageError
from fastft.model.adapters import add_lora
from fastft.model.generate import generate
from fastft.model.load import load

PROMPTS = ["The quick brown", "A", "What is two and two? Two and", "tokens " * 12]
CHAT = [{"role": "user", "content": "What is two and two?"}]


@pytest.fixture
def loaded(tiny):
    return load(tiny(generation={"eos_token_id": None}), dtype="float32")


def by_hand(model, tokenizer, prompt, count):
    """Greedy decoding without cache, mask or padding: the whole text again for each token."""
    ids = tokenizer(prompt)["input_ids"]
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends
    model.eval()
    for _ in range(count):
        with torch.no_grad():
            token = model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
        ids.append(token)
        if token in ends:
            break
    return tokenizer.decode(ids[len(tokenizer(prompt)["input_ids"]) :], skip_special_tokens=True)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3"])
def test_a_left_padded_batch_equals_single_prompts(tiny, family, quant, adapter):
    model, tokenizer = load(tiny(family), dtype="float32", quant=quant)
    if adapter:
        model = add_lora(model, r=4, init=False, dropout=0.5)
    model.train()
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    assert answers == [by_hand(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert len(set(answers)) > 2
    assert generate(model, tokenizer, PROMPTS[2], max_new_tokens=12) == [answers[2]]


def test_everything_is_left_as_found(tiny):
    model, tokenizer = load(tiny(), dtype="float32", full=True)
    model.train()
    model.model.layers[0].mlp.eval()  # a user's own choice
    modes = {n: m.training for n, m in model.named_modules()}
    model.config.use_cache = False
    tokenizer.padding_side = "right"
    ids = torch.tensor([[1, 7, 20]])
    model(ids, labels=ids).loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    settings = model.generation_config.to_dict()
    random = torch.get_rng_state()
    generate(model, tokenizer, PROMPTS, max_new_tokens=5, temperature=1.0, seed=3)
    for _ in generate(model, tokenizer, PROMPTS[0], max_new_tokens=5, stream=True, temperature=1.0, seed=3):
        pass
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert model.config.use_cache is False and tokenizer.padding_side == "right" and torch.is_grad_enabled()
    assert all(torch.equal(p.grad, grads[n]) and p.requires_grad for n, p in model.named_parameters())
    assert model.generation_config.to_dict() == settings and torch.equal(random, torch.get_rng_state())
    model(ids, labels=ids).loss.backward()  # and it trains on


def test_the_cache_is_used(loaded, monkeypatch):
    model, tokenizer = loaded
    model.config.use_cache = False
    widths = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *a, **k: widths.append(k["input_ids"].shape[1]) or forward(*a, **k)
    )
    generate(model, tokenizer, PROMPTS[3], max_new_tokens=4)
    assert widths[0] > 12 and widths[1:] == [1, 1, 1]


def test_messages(loaded):
    model, tokenizer = loaded
    rendered = "<|im_start|>user\nWhat is two and two?<|im_end|>\n<|im_start|>assistant\n"
    expected = [by_hand(model, tokenizer, rendered, 10)]
    assert generate(model, tokenizer, CHAT, max_new_tokens=10) == expected
    other = [{"role": "user", "content": "Hi"}]
    both = generate(model, tokenizer, [CHAT, other], max_new_tokens=10)
    assert both == expected + generate(model, tokenizer, other, max_new_tokens=10)
    begun = [*CHAT, {"role": "assistant", "content": "Two and"}]
    rendered += "Two and"
    assert generate(model, tokenizer, begun, max_new_tokens=10) == [by_hand(model, tokenizer, rendered, 10)]
    assert generate(model, tokenizer, [], max_new_tokens=1) == []


def test_bos_is_not_doubled(tiny):
    """A template that writes BOS, with a tokenizer that adds one: the conversation has it once."""
    from tokenizers.processors import TemplateProcessing

    from fastft.model.generate import _encode

    model, tokenizer = load(tiny(), dtype="float32")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    ids = _encode(model, tokenizer, [CHAT], {})["input_ids"][0].tolist()
    assert ids.count(1) == 1 and _encode(model, tokenizer, ["A"], {})["input_ids"][0, 0] == 1


def test_sampling_repeats_with_a_seed(loaded):
    model, tokenizer = loaded
    one = generate(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=1.0, seed=1)
    assert one == generate(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=1.0, seed=1)
    assert one != generate(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=1.0, seed=2)
    assert one != generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    greedy = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=1.0, top_k=1) == greedy
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=1.0, top_p=1e-6) == greedy


def test_streaming_gives_the_same_text_in_pieces(loaded):
    model, tokenizer = loaded
    for prompt in PROMPTS:
        whole = generate(model, tokenizer, prompt, max_new_tokens=20)[0]
        pieces = list(generate(model, tokenizer, prompt, max_new_tokens=20, stream=True))
        assert "".join(pieces) == whole and len(pieces) > 1 and all(pieces)


def test_a_character_of_several_tokens_comes_whole(loaded):
    import queue

    from fastft.model.generate import _Pieces

    _, tokenizer = loaded
    ids = tokenizer("a\u20acb", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5
    out = queue.Queue()
    pieces = _Pieces(tokenizer, out, True)
    pieces.put(torch.tensor([[1, 2, 3]]))
    for token in ids:
        pieces.put(torch.tensor([token]))
    pieces.end()
    assert [out.get_nowait() for _ in range(out.qsize())] == ["a", "\u20ac", "b"]


def test_leaving_a_stream_early_stops_it(loaded):
    model, tokenizer = loaded
    model.train()
    stream = generate(model, tokenizer, PROMPTS[0], max_new_tokens=100, stream=True)
    next(stream)
    stream.close()
    assert model.training and not any(t.name == "fastft-generate" for t in threading.enumerate())


def test_an_error_while_streaming_is_raised(loaded, monkeypatch):
    model, tokenizer = loaded

    def broken(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(model.model.layers[1], "forward", broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        list(generate(model, tokenizer, PROMPTS[0], stream=True))


def test_stop_texts_and_lengths(loaded):
    model, tokenizer = loaded
    free = generate(model, tokenizer, PROMPTS[0], max_new_tokens=12)[0]
    letter = free[len(free) // 2]
    stopped = generate(model, tokenizer, PROMPTS[0], max_new_tokens=12, stop=letter)[0]
    assert free.startswith(stopped) and letter in stopped and len(stopped) < len(free)
    ids = tokenizer(PROMPTS[0])["input_ids"]
    room = 128 - len(ids)
    with pytest.raises(
        UsageError, match=f"max_new_tokens: expected at most {room} after a prompt of {len(ids)} tokens"
    ):
        generate(model, tokenizer, PROMPTS[0], max_new_tokens=room + 1)
    with pytest.raises(UsageError, match=r"fewer than the model's 128 tokens.*larger max_length"):
        generate(model, tokenizer, "tokens " * 200)


def test_mistakes(loaded):
    model, tokenizer = loaded
    with pytest.raises(UsageError) as caught:
        generate(model, tokenizer, "a", max_new_tokens=0, temperature=-1, top_p=2, temprature=1, do_sample=True)
    text = str(caught.value)
    for part in (
        "max_new_tokens: expected a whole number of at least 1, or None, got 0",
        "temperature: expected a number of at least 0, got -1",
        "top_p: expected a number above 0",
        "'temprature'; did you mean 'temperature'?",
        "'do_sample'; temperature above 0 samples",
    ):
        assert part in text, part
    for prompts, message in (
        (5, "prompts: expected a text"),
        (["a", 5], r"prompts\[1\]: expected a text or a list of"),
        (["a", []], r"prompts\[1\]"),
        ("", "at least one token"),
    ):
        with pytest.raises(UsageError, match=message):
            generate(model, tokenizer, prompts)
    with pytest.raises(UsageError, match="stream: expected one prompt, not 2"):
        generate(model, tokenizer, ["a", "b"], stream=True)
    without = [{"content": "hi"}, {"role": "user", "content": "a"}]
    said = "The message has the fields ['content'] and no 'role'."
    for prompts, where in ((without, "prompts"), ([CHAT, without], "prompts[1]")):
        with pytest.raises(DataError) as caught:
            generate(model, tokenizer, prompts)
        assert str(caught.value) == f"{where}[0].role: expected a text such as 'user' or 'assistant', got None. {said}"
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        generate(model, tokenizer, CHAT)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template; pass the prompt as one text"):
        generate(model, tokenizer, CHAT)


def test_a_compiled_model_says_the_same(tiny):
    """Generation takes the eager path; training takes the compiled one, before and after."""
    from fastft.graph.compile import compile as compile_model

    model, tokenizer = load(tiny(), dtype="float32")
    model = add_lora(model, r=4, init=False)
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    ids = torch.tensor([[1, 7, 20, 33, 150, 260]])
    model.train()
    loss = model(ids, labels=ids).loss
    compile_model(model, backend="aot_eager")
    for _ in range(2):
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == expected
        assert model.training and (model(ids, labels=ids).loss - loss).abs() < 1e-5


def test_what_says_how_to_sample_wants_a_temperature(loaded):
    model, tokenizer = loaded
    with pytest.raises(UsageError) as caught:
        generate(model, tokenizer, "a", top_p=0.5, top_k=3, min_p=0.1)
    assert [(problem.where, problem.value) for problem in caught.value.problems] == [
        ("top_p", 0.5), ("top_k", 3), ("min_p", 0.1)
    ]  # fmt: skip
    assert "top_p: expected to be left out at temperature 0, got 0.5" in str(caught.value)
    plain = generate(model, tokenizer, "a", max_new_tokens=4)
    assert generate(model, tokenizer, "a", max_new_tokens=4, top_p=1.0, top_k=0, min_p=0.0) == plain
