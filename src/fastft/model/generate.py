"""Generate text from a loaded model, for chatting and for evaluation."""

import copy
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from fastft.data.check import message_problems
from fastft.errors import DataError, Problem, UsageError, argument_names, unknown_arguments
from fastft.given import model_problem, refuse, tokenizer_problem
from fastft.noise import quiet
from fastft.state import get_state

Messages = Sequence[Mapping[str, Any]]
Prompts = str | Sequence[str] | Messages | Sequence[Messages]
DEFAULT_NEW_TOKENS = 256


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    stream: bool = False,
    template: Mapping[str, Any] | None = None,
    skip_special_tokens: bool = True,
    **options: Any,
) -> list[str] | Iterator[str]:
    """Continue `prompts` and return the new text of each; with `stream` an iterator over the pieces of one answer.

    A prompt is a text, or a conversation (a list of {"role", "content"} messages) that the tokenizer's chat template
    renders; several make a batch, padded on the left, whose answers are those that each prompt gets alone.
    `temperature=0` takes the likeliest token each time; above 0 samples, repeatably with a `seed`. `max_new_tokens` is
    by default 256, or what the model's length leaves. `template` holds further arguments of the chat template,
    `options` fields of transformers' GenerationConfig.

    The model may be in training mode, carry an adapter or be compiled: it is asked in eval mode with a KV cache and
    without gradients, and every module's mode, the tokenizer's padding side and torch's random state are left as found.

    Raises `UsageError` for wrong arguments and for prompts that do not fit, `DataError` for conversations that cannot
    be rendered.
    """
    sampling = {"top_p": top_p, "top_k": top_k, "min_p": min_p}
    wrong = _problems(max_new_tokens, temperature, sampling, options)
    refuse(model_problem(model), tokenizer_problem(tokenizer), *wrong)
    batch = as_batch(prompts)
    if stream and len(batch) != 1:
        raise UsageError(Problem("stream", True, f"one prompt, not {len(batch)}", "Leave stream out for a batch."))
    if not batch:
        return []
    with quiet():
        encoded = _encode(model, tokenizer, batch, template or {})
    config = _generation_config(model, tokenizer, _room(model, encoded, max_new_tokens), temperature, options)
    for name, value in (
        ("top_p", top_p),
        ("top_k", top_k),
        ("min_p", min_p),
        ("repetition_penalty", repetition_penalty),
    ):
        if value is not None:
            setattr(config, name, value)
    arguments: dict[str, Any] = {**encoded, "generation_config": config}
    if stop:
        config.stop_strings = [stop] if isinstance(stop, str) else list(stop)
        arguments["tokenizer"] = tokenizer
    if stream:
        return _stream(model, tokenizer, arguments, seed, skip_special_tokens)
    with asking(model, seed):
        out = model.generate(**arguments)
    return tokenizer.batch_decode(out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=skip_special_tokens)


# What says from which tokens one is sampled -> the value of it that leaves none out.
SAMPLING = {"top_p": 1, "top_k": 0, "min_p": 0}


def _problems(
    max_new_tokens: Any, temperature: Any, sampling: Mapping[str, Any], options: Mapping[str, Any]
) -> list[Problem | str]:
    """Return what is wrong with the numbers and with the names of further options."""
    from transformers import GenerationConfig

    problems: list[Problem | str] = []
    if max_new_tokens is not None and (not isinstance(max_new_tokens, int) or max_new_tokens < 1):
        problems.append(Problem("max_new_tokens", max_new_tokens, "a whole number of at least 1, or None"))
    if (
        not isinstance(temperature, (int, float))
        or isinstance(temperature, bool)
        or not 0 <= temperature < float("inf")
    ):
        problems.append(Problem("temperature", temperature, "a number of at least 0"))
    top_p = sampling["top_p"]
    if top_p is not None and not (isinstance(top_p, (int, float)) and 0 < top_p <= 1):
        problems.append(Problem("top_p", top_p, "a number above 0 and up to 1"))
    idle = {name: value for name, value in sampling.items() if value is not None and value != SAMPLING[name]}
    if temperature == 0 and not isinstance(temperature, bool):
        remedy = "At temperature 0, the default, the likeliest token is taken each time: set temperature to sample."
        expected = "to be left out at temperature 0"
        problems += [Problem(name, value, expected, remedy) for name, value in idle.items()]
    ours = argument_names(generate)
    instead = {"do_sample": "temperature above 0 samples, 0 does not"}
    theirs = [name for name in vars(GenerationConfig()) if not name.startswith("_") and name not in instead]
    problems += unknown_arguments("generate", options, ours, elsewhere=instead, unlisted=theirs)
    return problems


def as_batch(prompts: Any) -> list[str | Messages]:
    """Tell a text, texts, a conversation and conversations apart, and return a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise UsageError(Problem("prompts", prompts, "a text, a list of texts, messages, or a list of those"))
    if prompts and all(isinstance(entry, Mapping) for entry in prompts):
        return [prompts]
    for index, entry in enumerate(prompts):
        conversation = isinstance(entry, Sequence) and all(isinstance(message, Mapping) for message in entry)
        if not isinstance(entry, str) and not (conversation and entry):
            raise UsageError(Problem(f"prompts[{index}]", entry, "a text or a list of {'role', 'content'} messages"))
    return list(prompts)


def _encode(
    model: Any, tokenizer: Any, batch: list[str | Messages], template: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Tokenise the prompts; `input_ids` and `attention_mask` [B, T], padded on the left, on the model's device."""
    rows = token_rows(tokenizer, batch, template)
    width = max(len(ids) for ids in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows], device=model.device)
    return {"input_ids": input_ids, "attention_mask": mask}


def token_rows(tokenizer: Any, batch: Sequence[str | Messages], template: Mapping[str, Any]) -> list[list[int]]:
    """Return the token ids of each prompt, without padding."""
    rows = []
    for index, prompt in enumerate(batch):
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            where = f"prompts[{index}]" if len(batch) > 1 else "prompts"
            ids = tokenizer(_render(tokenizer, prompt, template, where), add_special_tokens=False)["input_ids"]
        if not ids:
            raise UsageError(Problem(f"prompts[{index}]", prompt, "a prompt of at least one token"))
        rows.append(ids)
    return rows


def _render(tokenizer: Any, messages: Messages, template: Mapping[str, Any], where: str) -> str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "prompts: messages were given, but this tokenizer has no chat template; pass the prompt as one text, or "
            "set tokenizer.chat_template (instruct models have one, base models often none)"
        )
    unfinished = messages[-1].get("role") == "assistant"
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=not unfinished,
            continue_final_message=unfinished,
            **template,
        )
    except (TemplateError, KeyError, TypeError, ValueError) as error:
        if wrong := message_problems(where, messages):
            raise DataError(*wrong) from error
        raise DataError(f"{where}: the chat template cannot render {list(messages)!r}: {error}") from error


def _room(model: Any, encoded: Mapping[str, torch.Tensor], asked: int | None) -> int:
    """Return how many tokens may be made, so that prompt and answer stay within the model's length."""
    width, length = encoded["input_ids"].shape[1], get_state(model).max_length
    if length is None:
        length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        return asked or DEFAULT_NEW_TOKENS
    remedy = "Shorten the prompt, or load the model with a larger max_length."
    if width >= length:
        raise UsageError(Problem("prompts", f"{width} tokens", f"fewer than the model's {length} tokens", remedy))
    if asked is not None and width + asked > length:
        raise UsageError(
            Problem("max_new_tokens", asked, f"at most {length - width} after a prompt of {width} tokens", remedy)
        )
    return asked or min(DEFAULT_NEW_TOKENS, length - width)


def _generation_config(
    model: Any, tokenizer: Any, new_tokens: int, temperature: float, options: Mapping[str, Any]
) -> Any:
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens, config.max_length = new_tokens, None
    config.use_cache = True
    config.do_sample = temperature > 0
    config.temperature = float(temperature) if temperature > 0 else None
    if not config.do_sample:
        config.top_p = config.top_k = config.min_p = None
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    for name, value in options.items():
        setattr(config, name, value)
    return config


@contextmanager
def asking(model: Any, seed: int | None) -> Iterator[None]:
    """Eval mode and, with a seed, a random state of its own; everything is as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [model.device.index or 0] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices) if seed is not None else nullcontext():
        if seed is not None:
            torch.manual_seed(seed)
        model.eval()
        try:
            with torch.no_grad(), quiet():
                yield
        finally:
            for module, training in modes:
                module.training = training


class _Pieces:
    """A streamer for transformers' generate: turns token ids into pieces of text and hands them to a queue."""

    def __init__(self, tokenizer: Any, out: "queue.Queue[Any]", skip_special_tokens: bool) -> None:
        self._tokenizer, self._out, self._skip = tokenizer, out, skip_special_tokens
        self._ids: list[int] = []
        self._told = 0
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (the first call, which is left out) or new token ids."""
        if self._prompt:
            self._prompt = False
            return
        self._ids += value.reshape(-1).tolist()
        text = self._text()
        # A character may take several tokens; until it is whole it decodes to the replacement character.
        if not text.endswith("\ufffd"):
            self._tell(text)

    def end(self) -> None:
        """Hand over what is left."""
        self._tell(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)

    def _tell(self, text: str) -> None:
        if len(text) > self._told:
            self._out.put(text[self._told :])
            self._told = len(text)


_END = object()


def _stream(
    model: Any, tokenizer: Any, arguments: dict[str, Any], seed: int | None, skip_special_tokens: bool
) -> Iterator[str]:
    """Yield pieces of text while a thread generates; leaving the loop early stops it at the next token."""
    pieces: queue.Queue[Any] = queue.Queue()
    left = threading.Event()

    def given_up(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), left.is_set(), dtype=torch.bool, device=ids.device)

    def work() -> None:
        try:
            with asking(model, seed):
                model.generate(
                    **arguments, streamer=_Pieces(tokenizer, pieces, skip_special_tokens), stopping_criteria=[given_up]
                )
        except BaseException as error:  # handed to the caller, who raises it
            pieces.put(error)
        finally:
            pieces.put(_END)

    thread = threading.Thread(target=work, name="fastft-generate", daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not _END:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        left.set()
        thread.join()
