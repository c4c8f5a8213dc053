"""The engine behind a URL, against a small server that speaks vLLM's API and samples with a tiny model."""

import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny
import torch
from peft import PeftModel

from fastft.errors import EngineError, UsageError
from fastft.rollout import make_engine
from fastft.rollout.base import Sampling
from fastft.rollout.hf import TransformersEngine

PROMPTS = [[5, 9, 17, 33], [7, 8], [11, 12, 13]]
GREEDY = Sampling(6, temperature=0.0)


class Fake:
    """The state of the server: its adapters by name, what was asked, and how it misbehaves."""

    def __init__(self):
        self.adapters, self.asked, self.errors = {}, [], []
        self.raw, self.silent, self.no_lora, self.delay, self.drop = False, False, False, 0.0, 0
        self.lock = threading.Lock()

    def answer(self, path, body):
        self.asked.append((path, body))
        if self.errors:
            return self.errors.pop(0), {"error": "busy"}
        time.sleep(self.delay)
        if path == "/health":
            return 200, {}
        if path == "/v1/models":
            adapters = [{"id": name, "parent": "base"} for name in self.adapters]
            return 200, {"data": [*adapters, {"id": "base", "max_model_len": 40}]}
        if path == "/v1/completions":
            return 200, self.complete(body)
        return (404, {"error": "Not Found"}) if self.no_lora else self.change(path, body)

    def change(self, path, body):
        name = body["lora_name"]
        if path == "/v1/unload_lora_adapter":
            return (200, {}) if self.adapters.pop(name, None) else (404, {"error": "adapter cannot be found"})
        if name in self.adapters:
            return 400, {"error": f"The lora adapter '{name}' has already been loaded."}
        base = tiny.make("llama", torch.float32, lora=False)
        self.adapters[name] = PeftModel.from_pretrained(base, body["lora_path"])
        return 200, {}

    def complete(self, body):
        name = body["model"]
        engine = TransformersEngine()
        with self.lock:
            engine.hand_over(self.adapters[name] if name != "base" else tiny.make("llama", torch.float32, lora=False))
            names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
            sampling = Sampling(
                body["max_tokens"], stop_ids=tuple(body["stop_token_ids"]), **{n: body[n] for n in names}
            )
            (row,) = engine.generate([body["prompt"]], sampling, body["n"])
        shift = -1.0 if self.raw else 0.0
        choices = [
            {"index": i, "token_ids": c.ids, "logprobs": {"token_logprobs": [p + shift for p in c.logprobs]}}
            for i, c in enumerate(row)
        ]
        if self.silent:
            choices = [{**choice, "logprobs": None} for choice in choices]
        return {"choices": choices[::-1]}


@pytest.fixture
def fake():
    state = Fake()

    class Handler(BaseHTTPRequestHandler):
        def respond(self):
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            if state.drop and self.path == "/v1/completions":
                state.drop -= 1
                state.asked.append((self.path, body))
                return  # closes the connection in the middle of the work
            status, answer = state.answer(self.path, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with suppress(BrokenPipeError):  # the caller has given up
                self.wfile.write(data)

        do_GET = do_POST = respond  # noqa: N815

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url, state.server = f"http://127.0.0.1:{server.server_port}", server
    yield state
    server.shutdown()
    server.server_close()


def reference(model, sampling=GREEDY, count=1):
    engine = TransformersEngine()
    engine.hand_over(model)
    return [[c.ids for c in row] for row in engine.generate(PROMPTS, sampling, count)]


def ids(rows):
    return [[c.ids for c in row] for row in rows]


def test_adapters_are_loaded_used_and_unloaded(fake, tmp_path):
    model = tiny.make("llama", torch.float32, lora=True)
    engine = make_engine(fake.url, model, None, adapter_folder=tmp_path, retries=0)
    assert not engine.shares_memory
    assert ids(engine.generate(PROMPTS, GREEDY, count=2)) == [row * 2 for row in reference(model)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1)
    first = list(fake.adapters)
    engine.hand_over(model)
    assert len(fake.adapters) == 1 and list(fake.adapters) != first
    assert [path.name for path in tmp_path.iterdir()] == list(fake.adapters)
    answers = engine.generate(PROMPTS, GREEDY)
    assert ids(answers) == reference(model)
    assert all(len(c.logprobs) == len(c.ids) and max(c.logprobs) <= 0 for row in answers for c in row)
    engine.sleep(), engine.wake(), engine.close()
    assert fake.adapters == {} and list(tmp_path.iterdir()) == []


def test_what_is_asked(fake):
    model = tiny.make("llama", torch.float32, lora=True)
    engine = make_engine(f"{fake.url}/v1/", model, None, api_key="secret")
    fake.asked.clear()
    sampling = Sampling(4, temperature=0.7, top_p=0.9, top_k=9, min_p=0.01, stop_ids=(2,), seed=5)
    rows = engine.generate(PROMPTS, sampling, count=3)
    assert [len(row) for row in rows] == [3, 3, 3] and rows == engine.generate(PROMPTS, sampling, count=3)
    bodies = sorted((body for _, body in fake.asked[:3]), key=lambda body: body["seed"])
    assert [body["prompt"] for body in bodies] == PROMPTS and [body["seed"] for body in bodies] == [5, 8, 11]
    expected = {"n": 3, "max_tokens": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 9, "min_p": 0.01, "logprobs": 0}
    assert {name: bodies[0][name] for name in expected} == expected
    assert bodies[0]["stop_token_ids"] == [2] and bodies[0]["ignore_eos"] and bodies[0]["return_token_ids"]
    with pytest.raises(UsageError, match="at most 36"):
        engine.generate([[5] * 37], Sampling(4))


def test_a_busy_server_is_asked_again(fake):
    model = tiny.make("llama", torch.float32, lora=True)
    engine = make_engine(fake.url, model, None)
    fake.errors = [503, 429]
    assert ids(engine.generate(PROMPTS, GREEDY)) == reference(model)
    fake.errors = [503]
    engine.hand_over(model)
    fake.errors, engine._session = [503] * 9, type(engine)(fake.url, retries=1)._session
    with pytest.raises(EngineError, match=r"refused \(503\)"):
        engine.hand_over(model)


def test_an_adapter_that_an_earlier_try_has_loaded_counts(fake):
    model = tiny.make("llama", torch.float32, lora=True)
    engine = make_engine(fake.url, model, None)
    name = f"fastft-{engine._run}-2"
    fake.adapters[name] = next(iter(fake.adapters.values()))
    engine.hand_over(model)
    assert list(fake.adapters) == [name]


def test_work_that_was_begun_is_not_sent_twice(fake):
    engine = make_engine(fake.url, tiny.make("llama", torch.float32, lora=True), None)
    fake.asked.clear()
    fake.drop = 1
    with pytest.raises(EngineError, match=r"broke off.*untouched.*vllm serve"):
        engine.generate(PROMPTS[:1], GREEDY)
    assert len(fake.asked) == 1


def test_a_slow_server_is_an_error_that_says_the_time(fake):
    engine = make_engine(fake.url, tiny.make("llama", torch.float32, lora=True), None)
    engine._timeout = 0.2
    fake.asked.clear()
    fake.delay = 1.0
    with pytest.raises(EngineError, match=r"no answer to /v1/completions within 0\.2 s"):
        engine.generate(PROMPTS[:1], GREEDY)
    began = time.monotonic()
    while not fake.asked and time.monotonic() - began < 60:  # the server's thread may not have read it yet
        time.sleep(0.01)
    assert len(fake.asked) == 1


def test_a_server_that_died_is_an_error_with_the_remedy(fake):
    model = tiny.make("llama", torch.float32, lora=True)
    engine = make_engine(fake.url, model, None, retries=0)
    fake.server.shutdown()
    fake.server.server_close()
    before = [p.clone() for p in model.parameters()]
    for work in (lambda: engine.generate(PROMPTS, GREEDY), lambda: engine.hand_over(model)):
        with pytest.raises(EngineError, match=r"cannot be reached.*untouched.*vllm serve.*resume"):
            work()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))
    engine.close()
    with pytest.raises(EngineError, match="cannot be reached"):
        make_engine(fake.url, model, None, retries=0)


def test_a_server_that_was_started_otherwise_is_refused(fake, capsys):
    model = tiny.make("llama", torch.float32, lora=True)
    fake.raw = True
    with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
        make_engine(fake.url, model, None)
    fake.raw, fake.silent = False, True
    with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
        make_engine(fake.url, model, None)
    fake.silent, fake.no_lora = False, True
    with pytest.raises(EngineError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        make_engine(fake.url, model, None)
    with pytest.raises(UsageError, match="trained whole"):
        make_engine(fake.url, tiny.make("llama", torch.float32, lora=False), None)
    with pytest.raises(UsageError, match="did you mean 'timeout'"):
        make_engine(fake.url, model, None, time_out=3)
