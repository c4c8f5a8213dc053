"""What an engine of its own is given: adapter, base weights, memory, environment. Needs no such engine."""

import json
import os
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fastft
from fastft.demo import MODEL_FOLDER
from fastft.environment import vllm_environment
from fastft.errors import EngineError, UsageError
from fastft.memory.shape import Shape
from fastft.rollout.adapter_file import adapter_of
from fastft.rollout.base import Sampling
from fastft.rollout.base_weights import bytes_to_write, files_of, write_base
from fastft.rollout.engine_memory import cache_bytes_per_token, engine_memory, held_by_training
from fastft.rollout.requests import check_request
from fastft.state import base_model


def logits_of(model, seed=0):
    with torch.no_grad():
        return model.eval()(input_ids=tiny.batch(seed)["input_ids"], use_cache=False).logits


@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2, "up_proj": 6}, "alpha_pattern": {"v_proj": 3}}]
)
def test_an_adapter_file_is_the_adapter(tmp_path, changes):
    from peft import PeftModel

    model = tiny.make("llama", torch.float32, lora=False)
    adapted = tiny.with_lora(model, torch.float32, **changes)
    adapter = adapter_of(adapted)
    assert adapter.rank == max([4, *changes.get("rank_pattern", {}).values()]) and len(adapter.matrices) == 14
    expected = logits_of(adapted)
    folder = adapter.write(tmp_path / "adapter")
    plain = tiny.make("llama", torch.float32, lora=False)
    assert not torch.allclose(logits_of(plain), expected, atol=1e-3)
    # one rank and a scaling of 1 everywhere, as engines want it
    assert {t.shape[0] for n, t in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in n} == {
        adapter.rank
    }
    again = PeftModel.from_pretrained(plain, folder)
    assert set(next(iter(m.scaling.values())) for m in again.modules() if hasattr(m, "lora_A")) == {1.0}
    torch.testing.assert_close(logits_of(again), expected, atol=2e-6, rtol=0)


def test_a_model_without_an_adapter_has_none():
    assert adapter_of(tiny.make("llama", torch.float32, lora=False)) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"dora": True}, "use_dora"), ({"bias": "lora_only"}, "bias"),
     ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
     ({"targets": ["q_proj", "embed_tokens"]}, "target_modules"), ({"train_tokens": [3, 4]}, "trainable_token")],
)  # fmt: skip
def test_what_an_adapter_file_cannot_say_is_refused(changes, named):
    model, _ = fastft.load(MODEL_FOLDER)
    with pytest.raises(UsageError, match=f"adapter {named}.*engine='transformers'"):
        adapter_of(fastft.add_lora(model, r=4, **changes))


def test_weights_that_a_checkpoint_holds_are_linked(tmp_path):
    model, _ = fastft.load(MODEL_FOLDER, dtype="float32")
    model = fastft.add_lora(model, r=4, init=False)
    assert bytes_to_write(model) == 0 and [path.name for path in files_of(model)] == ["model.safetensors"]
    folder = write_base(model, tmp_path / "base")
    assert (folder / "model.safetensors").resolve() == (MODEL_FOLDER / "model.safetensors").resolve()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with model.disable_adapter():
        assert torch.equal(logits_of(plain), logits_of(model))


@pytest.mark.parametrize(("quant", "init"), [(None, "pissa"), (None, "olora"), ("nf4", False), ("int8", False)])
def test_weights_that_training_computes_with_are_written(tmp_path, quant, init):
    model, _ = fastft.load(MODEL_FOLDER, dtype="float32", quant=quant)
    model = fastft.add_lora(model, r=4, init=init)
    assert not files_of(model)
    folder = write_base(model, tmp_path / "base")
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert written == pytest.approx(bytes_to_write(model), rel=0.01)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert getattr(plain.config, "quantization_config", None) is None
    source, _ = fastft.load(MODEL_FOLDER, dtype="float32")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(plain.get_parameter(name), source.get_parameter(name))
    with model.disable_adapter():
        expected = logits_of(model)
    # int8 layers round their inputs too
    torch.testing.assert_close(logits_of(plain), expected, atol=0.5 if quant == "int8" else 2e-4, rtol=0)


def test_written_weights_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("fastft.rollout.base_weights.SHARD_BYTES", 1 << 20)
    model, _ = fastft.load(MODEL_FOLDER, full=True)
    with torch.no_grad():
        base_model(model).model.layers[1].mlp.up_proj.weight.mul_(1.5)
    folder = write_base(model, tmp_path / "base")
    assert len(list(folder.glob("*.safetensors"))) > 4
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters()))


def test_a_sharded_checkpoint_is_linked_with_its_index(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(MODEL_FOLDER, source)
    stored = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(stored)
    halves = {"model-1.safetensors": names[:20], "model-2.safetensors": names[20:]}
    for file, part in halves.items():
        save_file({name: stored[name] for name in part}, source / file, metadata={"format": "pt"})
    where = {name: file for file, part in halves.items() for name in part}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    model, _ = fastft.load(source)
    folder = write_base(model, tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(logits_of(plain), logits_of(model))


LLAMA_8B = Shape(32, 4096, 14336, 32, 4096, 1024, 128256, False, (None,) * 32)
GIB = 1 << 30


def test_an_engines_memory_is_what_its_rows_want():
    sizes = {"element": 2, "rank": 16, "sequences": 64, "length": 2000}
    plan = engine_memory(LLAMA_8B, device=140 * GIB, training=20 * GIB, **sizes)
    assert cache_bytes_per_token(LLAMA_8B, 2) == 131_072  # 2 x 32 layers x 8 heads x 128 x 2 bytes
    assert plan.weights == 2 * 8_030_261_248 + 2 * (4 * 32 + 1 - 65) * 4096  # Llama-3.1-8B has 65 norms, not 129
    assert plan.lora == 2 * 41_943_040  # r=16 on all linears
    assert plan.tokens == 64 * 2000 and plan.cache == 128_000 * 131_072
    assert plan.share(140 * GIB) == pytest.approx(plan.total / (140 * GIB))


def test_what_training_holds_leaves_less_cache():
    sizes = {"element": 2, "rank": 64, "sequences": 256, "length": 4096}
    plans = [engine_memory(LLAMA_8B, device=80 * GIB, training=n * GIB, **sizes) for n in (10, 20, 40)]
    assert plans[0].tokens > plans[1].tokens > plans[2].tokens > 4096
    for plan, held in zip(plans, (10, 20, 40)):
        assert plan.total + held * GIB + GIB <= 80 * GIB
        assert plan.total + held * GIB + GIB > 80 * GIB - 16 * 131_072
        assert plan.tokens % 16 == 0
    with pytest.raises(EngineError, match=r"training holds 65\.50 GB.*LoRA.*engine='transformers'"):
        engine_memory(LLAMA_8B, device=80 * GIB, training=61 * GIB, **sizes)


def test_an_engine_that_sleeps_runs_beside_what_stays():
    assert held_by_training(5, 1, 1, 2, peak=60, sleeps=True) == 9
    assert held_by_training(5, 1, 1, 2, peak=60, sleeps=False) == 60
    assert held_by_training(5, 1, 1, 2, peak=0, sleeps=False) == 9


def test_the_environment_of_an_engines_start_is_as_before_afterwards(monkeypatch):
    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    before = dict(os.environ)
    with pytest.raises(RuntimeError), vllm_environment():
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and os.environ["VLLM_NO_USAGE_STATS"] == "1"
        assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"  # the user's choice
        raise RuntimeError
    assert dict(os.environ) == before


def test_requests_that_cannot_be_are_told():
    with pytest.raises(UsageError, match=r"stop_ids: expected token ids.*got 5") as caught:
        check_request([[1]], Sampling(0, stop_ids=5), 1)
    assert len(caught.value.problems) == 2
    with pytest.raises(UsageError, match=r"max_new_tokens: expected below the 512 tokens.*got 100000"):
        check_request([[1]], Sampling(100000), 1, max_length=512)
    with pytest.raises(UsageError, match=r"at most 2 tokens"):
        check_request([[1, 2, 3]], Sampling(510), 1, max_length=512)
