"""Added tokens: mean rows, the adapter's own rows, and the way through save, reload and merge."""

import pytest
import torch

from fastft.errors import UsageError
from fastft.model.adapters import add_lora
from fastft.model.load import load
from fastft.model.tokens import add_tokens
from fastft.state import get_state, update_state

NEW = ["<think>", "</think>", "<|tool|>"]


def tables(model):
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def logits(model, ids):
    model.eval()
    with torch.no_grad():
        return model(ids).logits


def train(model, ids, lr=0.05):
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for _ in range(3):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad


@pytest.mark.parametrize("rows", [290, 291, 300])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("full", [False, True])
def test_new_rows_are_the_mean(tiny, family, rows, full, rms):
    model, tokenizer = load(tiny(family, vocab_size=rows), dtype="float32", full=full)
    old = [t.detach().clone() for t in tables(model)]
    count = len(tokenizer)
    assert add_tokens(model, tokenizer, [*NEW, "<think>", "fox"[:1]], special=True) == 3
    assert add_tokens(model, tokenizer, NEW) == 0
    ids = tokenizer.convert_tokens_to_ids(NEW)
    assert ids == [count, count + 1, count + 2] and tokenizer("a<think>b")["input_ids"][1] == count
    embeddings, head = tables(model)
    assert (head is embeddings) == (family == "gemma3")
    assert len(embeddings) == len(head) == max(rows, count + 3) == model.config.vocab_size
    for table, before in zip(tables(model), old, strict=True):
        assert torch.equal(table[:count], before[:count])
        assert rms(table[ids], before[:count].double().mean(0).expand(3, -1)) < 1e-6
    assert all(p.requires_grad == full for p in model.parameters())
    assert get_state(model).added_tokens == tuple(ids) and "3 tokens were added" in get_state(model).notes[-1]
    assert tokenizer.decode([5, *ids], skip_special_tokens=True) == tokenizer.decode([5])


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("rows", [290, 300])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("how", ["rows", "whole"])
def test_through_adapter_save_reload_and_merge(tiny, tmp_path, family, rows, quant, how, rms):
    model, tokenizer = load(tiny(family, vocab_size=rows), quant=quant, dtype="float32")
    add_tokens(model, tokenizer, NEW)
    new = tokenizer.convert_tokens_to_ids(NEW)
    start = tables(model)[0].detach().clone()
    lora = add_lora(model, r=4, modules_to_save=["embed_tokens", "lm_head"] if how == "whole" else None)
    ids = torch.tensor([[1, new[0], 20, 33, new[1], 150, new[2], 9]])
    train(lora, ids)
    trained = logits(lora, ids)
    moved = tables(lora)[0].detach()
    assert (moved[new] != start[new]).any(dim=1).all()
    assert (how == "whole") == (moved[20] != start[20]).any().item()
    lora.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    again, tokenizer_again = load(tmp_path / "adapter", quant=quant, dtype="float32")
    assert tokenizer_again.convert_tokens_to_ids(NEW) == new and get_state(again).added_tokens == tuple(new)
    assert torch.equal(logits(again, ids), trained)
    train(again, ids)
    assert rms(logits(again, ids), trained) > 1e-3
    if quant is None:
        merged = lora.merge_and_unload()
        assert rms(logits(merged, ids), trained) < 1e-5
        embeddings, head = tables(merged)
        assert (embeddings.data_ptr() == head.data_ptr()) == (family == "gemma3")
        merged.save_pretrained(tmp_path / "merged")
        tokenizer.save_pretrained(tmp_path / "merged")
        whole, _ = load(tmp_path / "merged", dtype="float32")
        assert rms(logits(whole, ids), trained) < 1e-5


@pytest.mark.parametrize("rows", [290, 300])
def test_untrained_new_rows_come_back_too(tiny, tmp_path, rows):
    model, tokenizer = load(tiny(vocab_size=rows), dtype="float32")
    add_tokens(model, tokenizer, NEW)
    lora = add_lora(model, r=4, init=False, train_tokens=None)
    assert not any("token" in n for n, p in lora.named_parameters() if p.requires_grad)
    ids = torch.tensor([[1, *tokenizer.convert_tokens_to_ids(NEW)]])
    lora.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, dtype="float32")[0], ids), logits(lora, ids))


def test_full_model_saves_and_reloads(tiny, tmp_path):
    model, tokenizer = load(tiny("gemma3", vocab_size=290), dtype="float32", full=True)
    add_tokens(model, tokenizer, NEW)
    ids = torch.tensor([[1, *tokenizer.convert_tokens_to_ids(NEW)]])
    train(model, ids)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load(tmp_path, dtype="float32")
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert tables(again)[0] is tables(again)[1]


def test_mistakes(tiny):
    model, tokenizer = load(tiny(), dtype="float32")
    count = len(tokenizer)
    with pytest.raises(UsageError, match=r"tokens: expected a non-empty text, got ''[\s\S]*got 3"):
        add_tokens(model, tokenizer, ["<a>", "", 3])
    lora = add_lora(model, r=2)
    with pytest.raises(UsageError, match="right after load and before add_lora"):
        add_tokens(lora, tokenizer, ["<a>"])
    model, _ = load(tiny(), dtype="float32")
    update_state(model, compiled=object())
    with pytest.raises(UsageError, match=r"before fastft\.compile"):
        add_tokens(model, tokenizer, ["<a>"])
    assert len(tokenizer) == count
