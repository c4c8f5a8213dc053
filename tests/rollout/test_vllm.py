"""vLLM in this process and as a server, against transformers: a job of its own, `scripts/test --vllm`."""

import copy
import json
import os
import random
import socket
import subprocess
import sys
import time

import numpy
import pytest
import torch

import fastft
from fastft.demo import MODEL_FOLDER
from fastft.environment import installed
from fastft.errors import EngineError, UsageError
from fastft.rollout import make_engine
from fastft.rollout.base import Sampling
from fastft.rollout.hf import TransformersEngine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not installed("vllm"), reason="vLLM is not installed; `scripts/test --vllm` runs these"),
]
# The last has more tokens than a block of the cache, which are 128 on a CPU.
TEXTS = ["What is 12 + 13?", "Hello", "The cat sat on the mat, and then it went to sleep under the table and " * 8]
GREEDY = Sampling(14, temperature=0.0)
# vLLM's LoRA kernels on a GPU compute in 16 bits, in which the model's own forward pass is some way off as well.
GPU = torch.cuda.is_available()
DTYPE = "bfloat16" if GPU else "float32"


def loaded(adapter=True, **changes):
    model, tokenizer = fastft.load(MODEL_FOLDER, dtype=DTYPE, **changes)
    if adapter:
        model = fastft.add_lora(model, r=5, alpha=12, init=False)
    return model, [tokenizer(text)["input_ids"] for text in TEXTS]


def engine_for(model):
    return make_engine("vllm", model, None, sequences=32, max_length=256, eager=True)


def change(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "mlp" in name):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device))


def trainer_says(model, prompt, completion, sampling):
    """Log-probabilities of a completion in one plain forward pass of the training model, fp64 [tokens]."""
    ids = torch.tensor([[*prompt, *completion.ids]], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].double().cpu()
    logits = logits[len(prompt) - 1 : -1] / (sampling.temperature or 1.0)
    if sampling.top_k:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]


def in_fp32(model):
    """Return a copy that computes in fp32 with the numbers that the model's weights stand for."""
    wide = copy.deepcopy(model).float()
    for module in wide.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    return wide


def check_log_probabilities(model, prompts, rows, sampling):
    """In fp32 those of the model; in 16 bits as near to those of the model in fp32 as its own pass in 16 bits."""
    pairs = [(prompt, completion) for prompt, row in zip(prompts, rows, strict=True) for completion in row]
    told = torch.cat([torch.tensor(completion.logprobs, dtype=torch.float64) for _, completion in pairs])
    own = torch.cat([trainer_says(model, *pair, sampling) for pair in pairs])
    if not GPU:
        torch.testing.assert_close(told, own, rtol=0, atol=1e-4)
        return
    wide = in_fp32(model)
    true = torch.cat([trainer_says(wide, *pair, sampling) for pair in pairs])
    kept = true.isfinite() & own.isfinite()  # rounded, another token may be the last of the top_k
    assert kept.double().mean() > 0.9
    errors, allowed = (told - true)[kept].abs(), (own - true)[kept].abs()
    assert errors.mean() <= 1.5 * allowed.mean() + 0.02, (errors, allowed)
    assert errors.max() <= 2 * allowed.max() + 0.1, (errors, allowed)


def check_equal_to_transformers(engine, model, prompts):
    reference = TransformersEngine()
    reference.hand_over(model)
    ours, theirs = (e.generate(prompts, GREEDY, count=2) for e in (engine, reference))
    check_log_probabilities(model, prompts, ours, GREEDY)
    for row, expected in zip(ours, theirs, strict=True):
        assert row[0].ids == row[1].ids
        assert GPU or [c.ids for c in row] == [c.ids for c in expected]  # rounded, the two nearest tokens may tie
    return [row[0].ids for row in ours]


@pytest.fixture(scope="module")
def lora():
    model, prompts = loaded()
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist(), dict(os.environ)
    engine = engine_for(model)
    after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist(), dict(os.environ)
    yield model, prompts, engine, before, after
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.generate(prompts, GREEDY)


def test_starting_it_leaves_random_states_and_our_environment_alone(lora):
    *_, before, after = lora
    assert torch.equal(before[0], after[0]) and before[1:3] == after[1:3]
    ours = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_FLASHINFER_SAMPLER", "VLLM_NO_USAGE_STATS")
    assert [after[3].get(name) for name in ours] == [before[3].get(name) for name in ours]


def test_greedy_and_log_probabilities_through_adapters_that_change(lora):
    model, prompts, engine, *_ = lora
    seen = []
    for seed in range(3):
        change(model, seed)
        engine.hand_over(model)
        seen.append(check_equal_to_transformers(engine, model, prompts))
        assert check_equal_to_transformers(engine, model, prompts) == seen[-1]  # from the prefix cache now
    assert len(set(map(tuple, seen))) == 3


def test_the_prefix_cache_serves_the_same_weights_alone(lora):
    model, prompts, engine, *_ = lora
    change(model, 7)
    engine.hand_over(model)

    def cached():
        (answer,) = engine._llm.generate(
            [{"prompt_token_ids": prompts[2]}], engine_parameters(), use_tqdm=False, lora_request=engine._request
        )
        return answer.num_cached_tokens

    assert 128 < len(prompts[2]) < 230
    assert cached() == 0 and cached() >= 128
    engine.hand_over(model)
    assert cached() == 0


def engine_parameters():
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, detokenize=False)


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.6}, {"temperature": 1.4, "top_k": 6}])
def test_sampled_log_probabilities_are_the_trainers(lora, changes):
    model, prompts, engine, *_ = lora
    engine.hand_over(model)
    sampling = Sampling(12, seed=5, **changes)
    rows = engine.generate(prompts, sampling, count=4)
    assert GPU or rows == engine.generate(prompts, sampling, count=4)  # rounded, a draw may fall on the other side
    assert rows != engine.generate(prompts, Sampling(12, seed=6, **changes), count=4)
    assert all(len({c.ids for c in row}) > 1 for row in rows)
    check_log_probabilities(model, prompts, rows, sampling)


def test_completions_end_at_the_stop_token(lora):
    model, prompts, engine, *_ = lora
    engine.hand_over(model)
    free = engine.generate(prompts, GREEDY)[0][0].ids
    (stopped,) = engine.generate(prompts[:1], Sampling(14, temperature=0.0, stop_ids=(free[4],)))[0]
    assert stopped.ids == free[: free.index(free[4]) + 1] and len(stopped.logprobs) == len(stopped.ids)


def test_without_an_adapter_the_base_answers(lora):
    model, prompts, engine, *_ = lora
    with model.disable_adapter():
        plain = fastft.state.base_model(model)
        reference = TransformersEngine()
        reference.hand_over(plain)
        expected = [row[0].ids for row in reference.generate(prompts, GREEDY)]
    fresh, _ = loaded(adapter=False)
    engine.hand_over(fresh)
    assert GPU or [row[0].ids for row in engine.generate(prompts, GREEDY)] == expected
    check_equal_to_transformers(engine, fresh, prompts)


def test_what_it_cannot_serve_is_refused_before_anything_changes(lora):
    model, prompts, engine, *_ = lora
    engine.hand_over(model)
    before = [row[0].ids for row in engine.generate(prompts, GREEDY)]
    wide = fastft.add_lora(loaded(adapter=False)[0], r=16, init=False)
    with pytest.raises(UsageError, match="adapter r: expected at most 8, got 16"):
        engine.hand_over(wide)
    dora = fastft.add_lora(loaded(adapter=False)[0], r=4, dora=True)
    with pytest.raises(UsageError, match="use_dora"):
        engine.hand_over(dora)
    with pytest.raises(UsageError, match="at most 236"):
        engine.generate([[5] * 250], Sampling(20))
    after = engine.generate(prompts, GREEDY)
    assert GPU or [row[0].ids for row in after] == before
    check_log_probabilities(model, prompts, after, GREEDY)


@pytest.mark.skipif(not GPU, reason="on a CPU vLLM serves fp32 as well")
def test_what_its_kernels_on_a_gpu_cannot_is_refused_before_it_starts():
    model = fastft.add_lora(fastft.load(MODEL_FOLDER, dtype="float32")[0], r=4)
    with pytest.raises(UsageError, match="16 bits, and the model in float32; load it with dtype='bfloat16'"):
        make_engine("vllm", model, None)


def test_sleep_and_wake(lora):
    model, prompts, engine, *_ = lora
    change(model, 11)
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    engine.sleep()
    if torch.cuda.is_available():  # weights of 17 MB and a cache of 32 rows
        assert torch.cuda.mem_get_info()[0] - free > 32 * 256 * 2 * 5 * 128 * 2
    engine.hand_over(model)
    engine.wake()
    check_equal_to_transformers(engine, model, prompts)


@pytest.mark.parametrize(
    "changes", [{"quant": "nf4"}, {"full": True, "adapter": False}], ids=["nf4", "full fine-tuning"]
)
def test_other_bases_are_those_that_training_computes_with(lora, changes):
    lora[2].close()  # one engine a process at a time
    model, prompts = loaded(**changes)
    engine = engine_for(model)
    try:
        first = check_equal_to_transformers(engine, model, prompts)
        change(model, 3)
        engine.hand_over(model)
        assert check_equal_to_transformers(engine, model, prompts) != first
    finally:
        engine.close()


def test_fast_generate_samples_with_vllm(lora, tmp_path):
    lora[2].close()
    model, tokenizer = fastft.FastLanguageModel.from_pretrained(
        str(MODEL_FOLDER), 256, getattr(torch, DTYPE), load_in_4bit=False, fast_inference=True, max_lora_rank=8
    )
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=8, skip_special_tokens=True)
    ask = lambda lora=None: model.fast_generate(TEXTS[:2], sampling_params=greedy, lora_request=lora)  # noqa: E731
    before = ask()
    attached = fastft.state.get_state(model).rollouts
    try:
        assert attached.engine.name == "vllm"
        expected = fastft.generate(model, tokenizer, TEXTS[:2], max_new_tokens=8)
        assert GPU or [a.outputs[0].text for a in before] == expected
        model = fastft.FastLanguageModel.get_peft_model(model, r=8)
        change(model, 5)
        model.save_lora(tmp_path / "lora")
        adapted = ask(model.load_lora(tmp_path / "lora"))
        expected = fastft.generate(model, tokenizer, TEXTS[:2], max_new_tokens=8)
        assert GPU or [a.outputs[0].text for a in adapted] == expected
        assert ask() == before != adapted
        assert make_engine("vllm", model, tokenizer) is attached.engine  # a trainer takes the same one
    finally:
        attached.engine.close()


@pytest.fixture
def server(tmp_path):
    """A vLLM server of its own on a free port, as docs/how-to/rollouts.md starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL_FOLDER)]
    command += ["--dtype", DTYPE, "--enable-lora", "--max-lora-rank", "8", "--logprobs-mode", "processed_logprobs"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "256"]
    command += ["--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "32"]
    more = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command, env={**os.environ, **more}, stdout=log, stderr=log)
    until = time.monotonic() + 600
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(1)
    else:
        process.kill()
        pytest.fail((tmp_path / "log").read_text()[-3000:])
    yield f"http://127.0.0.1:{port}", process
    process.terminate()
    process.wait(timeout=60)
    log.close()


def test_a_server_of_its_own(server):
    url, process = server
    model, prompts = loaded()
    engine = make_engine(url, model, None, retries=1)
    seen = []
    for seed in range(2):
        change(model, seed)
        engine.hand_over(model)
        seen.append(check_equal_to_transformers(engine, model, prompts))
    assert seen[0] != seen[1]
    sampling = Sampling(6, temperature=0.7, top_k=9, seed=3)
    rows = engine.generate(prompts, sampling, count=3)
    assert GPU or rows == engine.generate(prompts, sampling, count=3)
    check_log_probabilities(model, prompts, rows, sampling)
    process.terminate()
    process.wait(timeout=60)
    with pytest.raises(EngineError, match=r"cannot be reached.*untouched"):
        engine.generate(prompts, GREEDY)


def test_grpo_samples_with_it(lora, tmp_path):
    lora[2].close()
    model, tokenizer = fastft.load(MODEL_FOLDER, dtype=DTYPE, quant="nf4")
    model = fastft.add_lora(model, r=8)
    lengths = []

    def short(prompts, completions, completion_ids, **columns):
        lengths.append([len(ids) for ids in completion_ids])
        return [-float(len(ids)) for ids in completion_ids]

    fastft.grpo(
        model, tokenizer, ["What is 12 + 13?", "Tell me about the sea."], [short], tmp_path / "run",
        engine="vllm", compile=False, steps=3, generations=4, batch_size=8, max_new_tokens=12, learning_rate=2e-2,
        temperature=1.0, schedule="constant", save_strategy="no", use_cpu=not GPU, bf16=GPU,
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = [value for row in rows for name, value in row.items() if "logprob" in name and "mean" in name]
    assert len(lengths) == 3 and len(gaps) >= 3 and max(gaps) < (0.1 if GPU else 1e-4)
