"""The engine "transformers": samples from the very model that trains, in its process and on its device.

A loop of its own rather than transformers' `generate`: a prompt is computed once for all its completions, rows that
have ended leave the batch, and the log-probability of each sampled token costs no second pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from attrs import frozen

from fastft.errors import EngineError
from fastft.model.generate import asking
from fastft.rollout.base import Completion, Engine, Sampling
from fastft.rollout.requests import check_request
from fastft.state import base_model, get_state

MAX_ROWS = 256
MAX_BATCH_TOKENS = 65_536


@frozen
class _Batch:
    """Prompts that are computed together, by their index, and the completions of each that this batch makes."""

    prompts: tuple[int, ...]
    copies: int


class TransformersEngine(Engine):
    """Samples with transformers from the model that was handed over, which is used as it is and not copied.

    The model may be in training mode, compiled, quantised, or carry an adapter; a batch runs in eval mode with a
    key-value cache and without gradients, under the autocast of the caller, and leaves everything as it found it.
    `max_rows` and `max_batch_tokens` (prompt, padding and completion of all rows) bound what is computed at once.
    At temperature 0 the log-probabilities are those of temperature 1.
    """

    name = "transformers"

    def __init__(self, *, max_rows: int = MAX_ROWS, max_batch_tokens: int = MAX_BATCH_TOKENS) -> None:
        self._max_rows, self._max_batch_tokens = max_rows, max_batch_tokens
        self._model: Any = None

    def hand_over(self, model: Any) -> None:
        """Take `model` itself: what it has learnt when `generate` is called is what is sampled from."""
        from accelerate.utils import extract_model_from_parallel
        from torch.distributed.tensor import DTensor

        model = extract_model_from_parallel(model)
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise EngineError(
                "engine 'transformers': the model's weights are spread over several processes (FSDP), which would have "
                "to sample in step; use engine='vllm', or DDP, where every process has the whole model"
            )
        self._model = model

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, count: int = 1) -> list[list[Completion]]:
        """Return `count` completions of each prompt; see `Engine.generate`."""
        if self._model is None:
            raise EngineError("engine 'transformers': no weights yet; call hand_over(model) before generate")
        check_request(prompts, sampling, count, _length_of(self._model))
        device = base_model(self._model).device
        generator = torch.Generator(device).manual_seed(sampling.seed) if sampling.seed is not None else None
        made: list[list[Completion]] = [[] for _ in prompts]
        with asking(self._model, None), _own_autocast(device):
            for batch in self._batches([len(prompt) for prompt in prompts], sampling.max_new_tokens, count):
                rows = [prompts[index] for index in batch.prompts]
                done = self._sample(rows, batch.copies, sampling, generator, device)
                for place, index in enumerate(batch.prompts):
                    made[index] += done[place * batch.copies : (place + 1) * batch.copies]
        return made

    def sleep(self) -> None:
        """Do nothing: nothing is held between calls."""

    def wake(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Forget the model."""
        self._model = None

    def _batches(self, lengths: Sequence[int], new_tokens: int, count: int) -> Iterator[_Batch]:
        """Yield batches within the bounds; prompts of like length share one, so that little is padding."""
        order = sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True)
        while order:
            most = max(1, min(self._max_rows, self._max_batch_tokens // (lengths[order[0]] + new_tokens)))
            taken, order = order[: max(1, most // count)], order[max(1, most // count) :]
            for start in range(0, count, most):
                yield _Batch(tuple(taken), min(most, count - start))

    def _sample(
        self, rows: Sequence[Sequence[int]], copies: int, sampling: Sampling, generator: Any, device: torch.device
    ) -> list[Completion]:
        try:
            ids, logprobs = sample(self._model, rows, copies, sampling, generator, device)
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"engine 'transformers': out of memory with {len(rows) * copies} completions at once: {error}. Lower "
                f"max_rows (now {self._max_rows}) or max_batch_tokens (now {self._max_batch_tokens})"
            ) from error
        completions = [_cut(*row, sampling.stop_ids) for row in zip(ids.tolist(), logprobs.tolist())]
        for completion in completions:
            if not all(value > float("-inf") for value in completion.logprobs or ()):
                raise EngineError(
                    "engine 'transformers': the model's logits are not finite; look at the last gradient norms, and "
                    "lower the learning rate"
                )
        return completions


def _length_of(model: Any) -> int | None:
    known = get_state(model).max_length
    return known or getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)


@contextmanager
def _own_autocast(device: torch.device) -> Iterator[None]:
    """Keep the caller's autocast, but not its cache: weights cast here, without gradients, must not train later."""
    kind = device.type
    enabled = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
        yield


def _cut(ids: Sequence[int], logprobs: Sequence[float], stop_ids: Sequence[int]) -> Completion:
    """Return a row up to its first stop token, that one included."""
    end = next((place + 1 for place, token in enumerate(ids) if token in stop_ids), len(ids))
    return Completion(tuple(ids[:end]), tuple(logprobs[:end]))


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    copies: int,
    sampling: Sampling,
    generator: torch.Generator | None,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (int64) and log-probabilities (fp32), each [len(prompts) * copies, T] with T <= max_new_tokens.

    The copies of a prompt stand together. What follows a row's first stop token is without meaning.
    """
    from transformers import DynamicCache

    prompts_BT, mask_BT = _pad_left(prompts, device)
    cache = DynamicCache(config=base_model(model).config)
    logits_BV = _logits(model, prompts_BT, mask_BT, cache)
    cache.batch_repeat_interleave(copies)
    logits_RV, mask_RT = logits_BV.repeat_interleave(copies, 0), mask_BT.repeat_interleave(copies, 0)
    seen_RT = _without_padding(prompts_BT, mask_BT).repeat_interleave(copies, 0)
    total, steps = logits_RV.shape[0], sampling.max_new_tokens
    ids = torch.zeros(total, steps, dtype=torch.long, device=device)
    logprobs = torch.zeros(total, steps, device=device)
    stop = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)
    warp = _warpers(sampling)
    rows, ended = torch.arange(total, device=device), torch.zeros(total, dtype=torch.bool, device=device)
    for step in range(steps):
        token_R, logprob_R = _draw(warp(seen_RT, logits_RV.float()), sampling.temperature > 0, generator)
        ids[rows, step], logprobs[rows, step] = token_R, logprob_R
        ended |= torch.isin(token_R, stop)
        left = int((~ended).sum())
        if not left or step + 1 == steps:
            break
        seen_RT = torch.cat([seen_RT, token_R[:, None]], 1)
        mask_RT = torch.cat([mask_RT, torch.ones_like(mask_RT[:, :1])], 1)
        if left <= len(rows) // 2:  # copying the cache costs about a step: not for every row that ends
            keep = (~ended).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, ended, seen_RT, mask_RT = rows[keep], ended[keep], seen_RT[keep], mask_RT[keep]
            token_R = token_R[keep]
        logits_RV = _logits(model, token_R[:, None], mask_RT, cache)
    return ids[:, : step + 1], logprobs[:, : step + 1]


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _without_padding(ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Return the ids with a prompt's last token for padding: a penalty on what was seen must not see padding."""
    return torch.where(mask_BT.bool(), ids_BT, ids_BT[:, -1:])


def _logits(model: Any, ids_RT: torch.Tensor, mask_RS: torch.Tensor, cache: Any) -> torch.Tensor:
    """Return the logits [R, V] of the last place, and add the ids to the cache; S counts what is in it already."""
    positions_RS = (mask_RS.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=ids_RT,
        attention_mask=mask_RS,
        position_ids=positions_RS[:, -ids_RT.shape[1] :],
        use_cache=True,
        logits_to_keep=1,
        **{_name_of_cache(model): cache},
    )
    return out.logits[:, -1]


def _name_of_cache(model: Any) -> str:
    """Return what the model's forward calls the cache: "past_key_values" until transformers 5.23, "cache" since."""
    return "cache" if "cache" in signature(base_model(model).forward).parameters else "past_key_values"


def _warpers(sampling: Sampling) -> Any:
    """Return transformers' own processors, in the order in which its `generate` applies them."""
    from transformers.generation import logits_process as given

    chosen = given.LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        chosen.append(given.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.temperature == 0:
        return chosen
    if sampling.temperature != 1.0:
        chosen.append(given.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        chosen.append(given.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        chosen.append(given.TopPLogitsWarper(float(sampling.top_p)))
    if sampling.min_p:
        chosen.append(given.MinPLogitsWarper(float(sampling.min_p)))
    return chosen


def _draw(
    scores_RV: torch.Tensor, random: bool, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token of each row, or take the likeliest; return tokens [R] and their log-probabilities [R], fp32.

    Drawn by inverting the cumulative distribution, in fp64 so that the tail of a large vocabulary keeps its share.
    Nothing waits for the device or asserts there: logits that are not finite show in the log-probabilities.
    """
    logprobs_RV = scores_RV.log_softmax(-1)
    if random:
        shares_RV = logprobs_RV.double().exp().cumsum(-1)
        point_R1 = torch.rand(shares_RV.shape[0], 1, dtype=torch.double, device=shares_RV.device, generator=generator)
        # the first token whose cumulated share is above the point: never one whose own share is 0
        token_R = torch.searchsorted(shares_RV, point_R1 * shares_RV[:, -1:], right=True)[:, 0]
        token_R = token_R.clamp(max=shares_RV.shape[1] - 1)
    else:
        token_R = logprobs_RV.argmax(-1)
    return token_R, logprobs_RV.gather(1, token_R[:, None])[:, 0]
