"""The engine behind a URL: vLLM as a server of its own, on other GPUs or another host, through its OpenAI-style API."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastft.errors import EngineError, UsageError
from fastft.rollout.adapter_file import adapter_of
from fastft.rollout.base import Completion, Engine, Sampling
from fastft.rollout.requests import check_request

CONNECT_TIMEOUT = 10.0  # seconds
_START = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora --max-lora-rank RANK "
    "--logprobs-mode processed_logprobs"
)
_KEPT = "What was trained is untouched"


class ServerEngine(Engine):
    """A vLLM server that was started elsewhere, as docs/how-to/rollouts.md says.

    `hand_over` writes the adapter into `adapter_folder`, which the server must see under the same path (by default a
    temporary folder: server and training on one host), and has the server load it under a new name; the one before is
    unloaded. A request that could not be delivered, or that the server was too busy for (429, 502 to 504), is sent
    again up to `retries` times; one that was being answered is not, as it may still be running. `timeout` is for one
    prompt's completions, in seconds; `parallel` prompts are asked for at once.

    Raises `EngineError` when it is made if the server cannot be reached, or says log-probabilities of another
    distribution than the one it samples from.
    """

    name = "server"

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 600.0,
        retries: int = 4,
        parallel: int = 64,
        adapter_folder: str | Path | None = None,
        api_key: str | None = None,
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._timeout, self._parallel = timeout, parallel
        self._session = _session(retries, parallel, api_key)
        self._own = adapter_folder is None
        self._folder = Path(adapter_folder or tempfile.mkdtemp(prefix="fastft-adapters-")).expanduser().resolve()
        self._run, self._count, self._adapter = uuid4().hex[:8], 0, ""
        self._model, self._length = self._look()
        self._check_logprobs()

    def hand_over(self, model: Any) -> None:
        """Write the adapter that `model` has now and have the server load it.

        Raises `UsageError` for a model without one: the base weights of a server cannot be changed.
        """
        from accelerate.utils import extract_model_from_parallel

        model = extract_model_from_parallel(model)
        adapter = adapter_of(model)
        if adapter is None and any(parameter.requires_grad for parameter in model.parameters()):
            raise UsageError(
                f"engine {self._url}: a model that is trained whole cannot be handed to a server; train an adapter "
                "(fastft.add_lora), or take engine='vllm' or 'transformers'"
            )
        last, self._adapter = self._adapter, ""
        if adapter is not None:
            self._count += 1
            name = f"fastft-{self._run}-{self._count}"
            folder = adapter.write(self._folder / name)
            self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, again=_is_loaded)
            self._adapter = name
        if last:
            self._post("/v1/unload_lora_adapter", {"lora_name": last}, again=_is_gone)
            shutil.rmtree(self._folder / last, ignore_errors=True)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, count: int = 1) -> list[list[Completion]]:
        """Return `count` completions of each prompt; see `Engine.generate`."""
        check_request(prompts, sampling, count, self._length)
        with ThreadPoolExecutor(max_workers=self._parallel) as pool:
            asked = [pool.submit(self._complete, prompt, sampling, count, i) for i, prompt in enumerate(prompts)]
            try:
                return [future.result() for future in asked]
            except BaseException:
                for future in asked:
                    future.cancel()
                raise

    @property
    def shares_memory(self) -> bool:
        """Whether it wants room on the device that trains: it does not."""
        return False

    def sleep(self) -> None:
        """Do nothing: the server has a GPU of its own."""

    def wake(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Have the server forget the last adapter, as far as it still answers, and remove the files."""
        if self._adapter:
            try:
                self._post("/v1/unload_lora_adapter", {"lora_name": self._adapter}, again=_is_gone)
            except EngineError as error:
                print(f"fastft: the adapter {self._adapter!r} could not be unloaded: {error}")
            shutil.rmtree(self._folder / self._adapter, ignore_errors=True)
            self._adapter = ""
        if self._own:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._session.close()

    def _look(self) -> tuple[str, int | None]:
        """Return the name of the served model and its length, after the server said that it is well."""
        self._ask("GET", "/health")
        served = self._ask("GET", "/v1/models").json()["data"]
        base = next((entry for entry in served if not entry.get("parent")), served[0])
        return base["id"], base.get("max_model_len")

    def _check_logprobs(self) -> None:
        """See that log-probabilities are of the distribution after truncation: the only token that is left has 0."""
        (said,) = self._complete([1, 2, 3], Sampling(1, top_k=1), 1, 0)
        if said.logprobs is None or abs(said.logprobs[0]) > 1e-3:
            raise EngineError(
                f"engine {self._url}: the server says log-probabilities of another distribution than the one that it "
                f"samples from; start it with --logprobs-mode processed_logprobs: {_START}"
            )

    def _complete(self, prompt: Sequence[int], sampling: Sampling, count: int, index: int) -> list[Completion]:
        drawn = count if sampling.temperature > 0 else 1  # greedy completions of a prompt are all the same
        body = {
            "model": self._adapter or self._model,
            "prompt": list(prompt),
            "n": drawn,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "stop_token_ids": list(sampling.stop_ids),
            "ignore_eos": True,
            "seed": None if sampling.seed is None else (sampling.seed + index * count) % 2**63,
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
            "add_special_tokens": False,
        }
        choices = sorted(self._post("/v1/completions", body).json()["choices"], key=lambda choice: choice["index"])
        if len(choices) != drawn or any(choice.get("token_ids") is None for choice in choices):
            raise EngineError(
                f"engine {self._url}: it answered {len(choices)} completions for {drawn}, or no token ids; vLLM 0.20 "
                "or newer says them"
            )
        made = [Completion(tuple(choice["token_ids"]), _said(choice)) for choice in choices]
        return made * (count // drawn)

    def _post(self, path: str, body: Mapping[str, Any], again: Any = None) -> Any:
        return self._ask("POST", path, body, again)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None, again: Any = None) -> Any:
        """Return the server's answer; `again` says of an error's text that an earlier try has done the work."""
        import requests

        try:
            answer = self._session.request(
                method, self._url + path, json=body, timeout=(CONNECT_TIMEOUT, self._timeout)
            )
        except requests.exceptions.ReadTimeout as error:
            raise EngineError(
                f"engine {self._url}: no answer to {path} within {self._timeout:g} s. {_KEPT}. Look at the server's "
                "log; pass a longer timeout if it is only slow"
            ) from error
        except requests.exceptions.RequestException as error:
            raise EngineError(
                f"engine {self._url}: the server cannot be reached, or broke off ({path}): {error}. {_KEPT}. Start it "
                f"again with `{_START}` and resume the run"
            ) from error
        if answer.ok or (again is not None and again(answer.text)):
            return answer
        raise EngineError(f"engine {self._url}: {_refusal(path, answer)}. {_KEPT}")


def _is_loaded(text: str) -> bool:
    return "already been loaded" in text


def _is_gone(text: str) -> bool:
    return "cannot be found" in text or "NotFound" in text


def _refusal(path: str, answer: Any) -> str:
    told = f"{path} was refused ({answer.status_code}): {answer.text[:500]}"
    if "lora" in path and answer.status_code in (404, 405):
        return f"{told}. The server takes no adapters while it runs; start it with `{_START}`"
    if "rank" in answer.text.lower():
        return f"{told}. Start the server with a larger --max-lora-rank"
    if "lora" in path:
        return f"{told}. Does the server see the folder under this path? Name a shared one with adapter_folder="
    return told


def _session(retries: int, parallel: int, api_key: str | None) -> Any:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util.retry import Retry

    # Nothing that the server may have begun to work on is sent twice: read errors are not tried again.
    retry = Retry(
        total=retries, connect=retries, read=False, redirect=0, other=0, status=retries, backoff_factor=0.5,
        status_forcelist=(429, 502, 503, 504), allowed_methods=None, raise_on_status=False,
    )  # fmt: skip
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=parallel))
    if api_key:
        session.headers["Authorization"] = f"Bearer {api_key}"
    return session


def _said(choice: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Return the log-probabilities of a completion, None where the server does not say them."""
    said = (choice.get("logprobs") or {}).get("token_logprobs")
    return None if said is None else tuple(said)
