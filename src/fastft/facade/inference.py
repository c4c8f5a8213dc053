"""`model.fast_generate`, `save_lora` and `load_lora`, as scripts that sample with vLLM call them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import field, frozen

from fastft.environment import installed
from fastft.errors import LoadError, Problem, UsageError, did_you_mean
from fastft.noise import between_libraries
from fastft.state import base_model, get_state

ADAPTER = "fast_generate"  # the name of an adapter that is put on for one call
# vLLM's names -> ours, or None for those that are seen to here; and what they are when they are left out.
SERVED = {
    "n": 1, "max_tokens": 16, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None, "stop": None,
    "stop_token_ids": None, "ignore_eos": False, "repetition_penalty": 1.0, "include_stop_str_in_output": False,
    "skip_special_tokens": True, "logprobs": None,
}  # fmt: skip


@frozen
class SampledText:
    """One completion: `text` without stop token and stop text, `token_ids` with the stop token.

    `logprobs` holds the log-probability of each token, `cumulative_logprob` their sum; `finish_reason` is "stop" or
    "length".
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[float] | None
    finish_reason: str


@frozen
class SampledPrompt:
    """A prompt and its completions, under vLLM's names."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[SampledText]


@frozen
class LoadedLora:
    """An adapter's folder, for `fast_generate(lora_request=...)`."""

    lora_path: Path
    lora_name: str = field(default="")


def fast_generate(
    model: Any,
    prompts: Any,
    sampling_params: Any = None,
    lora_request: LoadedLora | None = None,
    use_tqdm: bool = False,
) -> list[SampledPrompt]:
    """Sample completions of texts or conversations with the engine that the model was loaded with.

    * `prompts`: a text, texts, a conversation or conversations, or {"prompt_token_ids": [...]} each.
    * `sampling_params`: vLLM's `SamplingParams`, or a mapping of their names (`fastft.vLLMSamplingParams`); None is
      vLLM's default, 16 tokens at temperature 1.
    * `lora_request`: what `model.load_lora(folder)` returned; None samples from the base, without any adapter.

    Without `fast_inference=True`, or without vLLM, the engine is "transformers". Raises `UsageError` for wrong
    arguments, and for sampling parameters that no engine here knows, and `EngineError`.
    """
    from fastft.rollout.choose import attached_engine

    asked = _sampling_parameters(sampling_params)
    tokenizer = get_state(model).tokenizer
    texts, rows = _rows(tokenizer, prompts)
    if not rows:
        return []
    sampling, stops = _sampling(model, tokenizer, asked, max(map(len, rows)))
    engine = attached_engine(model, tokenizer)
    engine.wake()
    with _weights_of(model, lora_request) as chosen:
        engine.hand_over(chosen)
        answers = engine.generate(rows, sampling, asked["n"])
    return [
        SampledPrompt(
            text, row, [_output(tokenizer, i, one, asked, sampling.stop_ids, stops) for i, one in enumerate(made)]
        )
        for text, row, made in zip(texts, rows, answers)
    ]


def save_lora(model: Any, save_directory: str | Path, tokenizer: Any = None) -> Path:
    """Write the adapter alone, in PEFT's format: `fastft.save_adapter`."""
    from fastft.export.merge import save_adapter

    return save_adapter(model, save_directory, tokenizer)


def load_lora(model: Any, save_directory: str | Path, load_tensors: bool = True) -> LoadedLora:
    """Return the adapter in a folder for `fast_generate(lora_request=...)`; the model itself is not changed.

    `load_tensors` has no effect: the adapter is read when it is used. Raises `LoadError` for a folder without one.
    """
    folder = Path(save_directory).expanduser().resolve()
    if not (folder / "adapter_config.json").is_file():
        raise LoadError(f"load_lora: {folder} holds no adapter_config.json; model.save_lora(folder) writes an adapter")
    return LoadedLora(folder, folder.name)


METHODS: tuple[Callable[..., Any], ...] = (fast_generate, save_lora, load_lora)


def choose_fast_inference(model: Any, options: Mapping[str, Any]) -> None:
    """Remember the engine that `from_pretrained(fast_inference=True)` asks for, and say so where it is not vLLM."""
    from fastft.rollout.choose import attach_engine

    if installed("vllm"):
        attach_engine(model, "vllm", options)
        return
    attach_engine(model, "transformers", {})
    print(
        "fastft: from_pretrained(fast_inference=True): vLLM is not installed (pip install 'fastft[vllm]'), so "
        "fast_generate and rollouts sample with transformers, which is slower."
    )


def _sampling_parameters(given: Any) -> dict[str, Any]:
    """Return the parameters under vLLM's names; raise `UsageError` for those that no engine here serves."""
    if given is None:
        named: dict[str, Any] = {}
    elif isinstance(given, Mapping):
        named = dict(given)
    else:
        plain = type(given)()
        names = [name for name in dir(given) if not name.startswith("_") and not callable(getattr(given, name))]
        named = {n: getattr(given, n) for n in names if n in SERVED or getattr(given, n) != getattr(plain, n, None)}
        for derived in ("all_stop_token_ids", "output_kind", "sampling_type", "eos_token_id", "detokenize"):
            named.pop(derived, None)
    problems = [
        Problem(f"fast_generate sampling_params.{name}", value, "to be left out", did_you_mean(name, SERVED))
        for name, value in named.items()
        if name not in SERVED
    ]
    if problems:
        raise UsageError(*problems)
    return {**SERVED, **named}


def _rows(tokenizer: Any, prompts: Any) -> tuple[list[str | None], list[list[int]]]:
    """Return texts (None for what was given as ids or messages) and token ids of the prompts."""
    from fastft.model.generate import as_batch, token_rows

    single = isinstance(prompts, Mapping) and "prompt_token_ids" in prompts
    batch = [prompts] if single else prompts
    if not isinstance(batch, str) and all(isinstance(p, Mapping) and "prompt_token_ids" in p for p in batch):
        return [None] * len(batch), [list(p["prompt_token_ids"]) for p in batch]
    batch = as_batch(prompts)
    return [text if isinstance(text, str) else None for text in batch], token_rows(tokenizer, batch, {})


def _sampling(model: Any, tokenizer: Any, asked: Mapping[str, Any], longest: int) -> tuple[Any, list[str]]:
    """Return the engines' `Sampling`, and the texts at which a completion is cut afterwards."""
    from fastft.rollout.base import Sampling

    ends = set(asked["stop_token_ids"] or ())
    if not asked["ignore_eos"]:
        own = base_model(model).generation_config.eos_token_id
        ends |= set(own if isinstance(own, list) else [own] if own is not None else [])
        ends |= {tokenizer.eos_token_id} - {None}
    tokens = asked["max_tokens"]
    if tokens is None:
        tokens = (get_state(model).max_length or longest + 256) - longest
    sampling = Sampling(
        max_new_tokens=tokens,
        temperature=asked["temperature"],
        top_p=asked["top_p"],
        top_k=max(asked["top_k"], 0),
        min_p=asked["min_p"],
        repetition_penalty=asked["repetition_penalty"],
        stop_ids=tuple(sorted(ends)),
        seed=asked["seed"],
    )
    stops = asked["stop"] or []
    return sampling, [stops] if isinstance(stops, str) else list(stops)


@contextmanager
def _weights_of(model: Any, lora: LoadedLora | None) -> Iterator[Any]:
    """Give `model` with the adapter in a folder, or without any, and put it back as it was."""
    # PEFT switches both when it puts an adapter on or off.
    modes = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapted = bool(getattr(model, "peft_config", None))
    try:
        if lora is not None:
            with _with_lora(model, lora, adapted) as chosen:
                yield chosen
        elif adapted:
            with model.disable_adapter():
                yield model
        else:
            yield model
    finally:
        for parameter, wanted in trained:
            parameter.requires_grad = wanted
        for module, training in modes:
            module.training = training


@contextmanager
def _with_lora(model: Any, lora: LoadedLora, adapted: bool) -> Iterator[Any]:
    if not adapted:
        from peft import PeftModel

        with between_libraries():
            wrapped = PeftModel.from_pretrained(model, lora.lora_path, adapter_name=ADAPTER)
        try:
            yield wrapped
        finally:
            wrapped.unload()
        return
    active = model.active_adapter
    model.load_adapter(lora.lora_path, adapter_name=ADAPTER)
    try:
        model.set_adapter(ADAPTER)
        yield model
    finally:
        model.set_adapter(active)
        model.delete_adapter(ADAPTER)


def _output(
    tokenizer: Any, index: int, one: Any, asked: Mapping[str, Any], ends: Sequence[int], stops: Sequence[str]
) -> SampledText:
    ids, logprobs = list(one.ids), None if one.logprobs is None else list(one.logprobs)
    stopped = ids[-1] in ends
    text = _text(tokenizer, ids, asked)
    cut = min((text.find(stop) for stop in stops if stop in text), default=-1)
    if cut >= 0:
        stopped, end = True, cut + max(len(stop) for stop in stops if text.startswith(stop, cut))
        count = next(n for n in range(1, len(ids) + 1) if len(_text(tokenizer, ids[:n], asked)) >= end)
        ids, logprobs = ids[:count], None if logprobs is None else logprobs[:count]
        text = text[: end if asked["include_stop_str_in_output"] else cut]
    total = None if logprobs is None else sum(logprobs)
    return SampledText(index, text, ids, total, logprobs, "stop" if stopped else "length")


def _text(tokenizer: Any, ids: Sequence[int], asked: Mapping[str, Any]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=asked["skip_special_tokens"])
