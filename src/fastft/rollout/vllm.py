"""The engine "vllm": vLLM in this process, on the device that training uses, asleep while training steps run."""

import gc
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastft.environment import vllm_environment
from fastft.errors import EngineError, FastftError, Problem, UsageError
from fastft.rollout.adapter_file import adapter_of
from fastft.rollout.base import Completion, Engine, Sampling
from fastft.rollout.base_weights import base_tensors, bytes_to_write, write_base
from fastft.rollout.choose import check_vllm, vllm_obstacle
from fastft.rollout.engine_memory import engine_memory, held_by_training
from fastft.rollout.requests import check_request
from fastft.state import base_model, get_state

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM has LoRA kernels for
MEMORY_FOLDER = Path("/dev/shm")
_CPU_CACHE = 256 << 20
_REMEDY = (
    "What was trained is untouched. engine='transformers' needs no vLLM; a server of its own (engine='http://...') "
    "keeps its failures to itself"
)


class VLLMEngine(Engine):
    """vLLM inside the training process.

    It starts from the base weights that training computes with (for an NF4 or int8 model: the numbers that those stand
    for, in 16 bits). `hand_over` gives it the LoRA adapter through a file system in memory: nothing is merged, and no
    base weight moves; the weights of a fully trained model are copied into the engine's own. Each hand-over has a name
    of its own, so keys and values that the prefix cache holds from earlier weights are never used.

    * `sequences`: rows computed at once, at most. `max_length`: tokens of a prompt and its completion; None is the
      model's own length.
    * `max_lora_rank`: the largest rank to come; None is that of the model's adapter, or 64 without one.
    * `gpu_memory_utilization`: the engine's part of the GPU; None is worked out from what training holds.
    * `training_peak`: bytes of a training step, wanted for that where `sleep` is False.
    * `sleep`: whether `sleep()` frees the engine's GPU memory (weights wait in CPU memory).
    * `eager`: no torch.compile and no CUDA graphs: up at once, slower at sampling. None is True on a CPU.
    * `options`: further arguments of `vllm.LLM`.

    While it starts, torch's, numpy's and Python's random states are put by and the environment is as
    `fastft.environment.vllm_environment` says. vLLM itself starts a process group of one process, and on a CPU replaces
    `torch.set_num_threads` by a function that does nothing.
    """

    name = "vllm"

    def __init__(
        self,
        model: Any,
        *,
        sequences: int = 256,
        max_length: int | None = None,
        max_lora_rank: int | None = None,
        gpu_memory_utilization: float | None = None,
        training_peak: int = 0,
        sleep: bool = True,
        eager: bool | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        check_vllm()
        _check_alone()
        base, state = base_model(model), get_state(model)
        self._cpu = base.device.type != "cuda"
        self._sleeps = sleep and not self._cpu
        self._asleep = False
        self._full = state.full or _trains_base(model)
        self._length = max_length or state.max_length or base.config.get_text_config().max_position_embeddings
        self._rank = _slot(0 if self._full else _rank_of(model, max_lora_rank))
        why = vllm_obstacle(model)
        if why and self._rank:
            raise UsageError(f"engine 'vllm': {why}; load it with dtype='bfloat16', or take engine='transformers'")
        self._request: Any = None
        self._count = 0
        self._folder = Path(tempfile.mkdtemp(prefix="fastft-rollout-", dir=_memory_folder()))
        self._llm: Any = None
        arguments = {
            "dtype": str(base.dtype).removeprefix("torch."),
            "max_model_len": self._length,
            "max_num_seqs": sequences,
            "enable_lora": bool(self._rank),
            "enable_prefix_caching": True,
            "enable_sleep_mode": self._sleeps,
            "enforce_eager": self._cpu if eager is None else eager,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            **({"max_lora_rank": self._rank, "max_loras": 1} if self._rank else {}),
            **_memory(model, sequences, self._length, self._rank, gpu_memory_utilization, training_peak, self._sleeps),
            **(options or {}),
        }
        try:
            self._llm = _start(model, arguments)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def hand_over(self, model: Any) -> None:
        """Give the engine the adapter that `model` has now, or all its weights where it is trained whole.

        Raises `UsageError` for an adapter that vLLM cannot serve, and for one of a larger rank than it was started for.
        """
        from accelerate.utils import extract_model_from_parallel

        model = extract_model_from_parallel(model)
        if self._full:
            if self._asleep:
                self.wake()
            with self._telling("taking new weights"):
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": base_tensors(base_model(model))})
                self._llm.reset_prefix_cache()
            return
        adapter = adapter_of(model)
        if adapter is not None and adapter.rank > self._rank:
            remedy = "Start the engine with a larger max_lora_rank."
            raise UsageError(Problem("adapter r", adapter.rank, f"at most {self._rank}", remedy))
        self._forget_adapter()
        if adapter is None:
            return
        from vllm.lora.request import LoRARequest

        self._count += 1
        name = f"step-{self._count}"
        folder = adapter.write(self._folder / name)
        self._request = LoRARequest(name, self._count, str(folder))
        if not self._asleep:
            self._add_adapter()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, count: int = 1) -> list[list[Completion]]:
        """Return `count` completions of each prompt; see `Engine.generate`."""
        check_request(prompts, sampling, count, self._length)
        if self._llm is None:
            raise EngineError("engine 'vllm': it was closed; make another with fastft.rollout.make_engine")
        if not prompts:
            return []
        if self._asleep:
            self.wake()
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        drawn = count if sampling.temperature > 0 else 1  # greedy completions of a prompt are all the same
        parameters = [_parameters(sampling, drawn, index) for index in range(len(prompts))]
        with self._telling("sampling"):
            answers = self._llm.generate(asked, parameters, use_tqdm=False, lora_request=self._request)
        made = [[_completion(out) for out in sorted(a.outputs, key=lambda out: out.index)] for a in answers]
        return [completions * (count // drawn) for completions in made]

    def sleep(self) -> None:
        """Free the engine's GPU memory: weights wait in CPU memory, the cache is dropped. On a CPU: nothing."""
        if self._sleeps and not self._asleep:
            with self._telling("going to sleep"):
                self._llm.sleep(level=1)
            self._asleep = True

    def wake(self) -> None:
        """Take the memory again. Raises `EngineError` if training has left too little."""
        if not self._asleep:
            return
        gc.collect()
        torch.cuda.empty_cache()  # what training's allocator holds without use
        with self._telling("waking up"):
            self._llm.wake_up()
        self._asleep = False
        if self._request is not None:
            self._add_adapter()

    def close(self) -> None:
        """Stop the engine and give back its memory and its files."""
        if self._llm is None:
            return
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=2)
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = self._request = None
        if self._sleeps:
            _forget_pools()
        shutil.rmtree(self._folder, ignore_errors=True)
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()

    @property
    def closed(self) -> bool:
        """Whether the engine was closed."""
        return self._llm is None

    def _add_adapter(self) -> None:
        """Load the adapter now rather than with the first request, unless that was done."""
        with self._telling("taking the adapter"):
            self._llm.llm_engine.add_lora(self._request)

    def _forget_adapter(self) -> None:
        if self._request is None:
            return
        if not self._asleep:
            with self._telling("dropping the last adapter"):
                self._llm.llm_engine.remove_lora(self._request.lora_int_id)
        shutil.rmtree(self._request.lora_path, ignore_errors=True)
        self._request = None

    @contextmanager
    def _telling(self, doing: str) -> Iterator[None]:
        """Turn what vLLM raises into an `EngineError` that says what failed, in whose words, and what to do."""
        try:
            yield
        except FastftError:
            raise
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            raise EngineError(f"engine 'vllm' failed while {doing}: {words}. {_REMEDY}") from error


def _check_alone() -> None:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise EngineError(
            f"engine 'vllm': this run has {distributed.get_world_size()} processes, and an engine in each is not "
            "supported; run vLLM as a server (engine='http://...'), or take engine='transformers'"
        )


def _trains_base(model: Any) -> bool:
    return not getattr(model, "peft_config", None) and any(p.requires_grad for p in model.parameters())


def _rank_of(model: Any, asked: int | None) -> int:
    adapter = adapter_of(model)
    held = adapter.rank if adapter is not None else 0
    return max(asked or (held or 64), held)


def _slot(rank: int) -> int:
    """Return the smallest rank that vLLM has kernels for and `rank` fits in; 0 for none."""
    if rank > RANKS[-1]:
        raise UsageError(Problem("adapter r", rank, f"at most {RANKS[-1]} for vLLM", "Take engine='transformers'."))
    return next(size for size in RANKS if size >= rank) if rank else 0


def _memory_folder() -> Path | None:
    """Return a folder that lies in memory; None (the system's place for temporary files) where there is none."""
    return MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None


def _memory(
    model: Any, sequences: int, length: int, rank: int, share: float | None, peak: int, sleeps: bool
) -> dict[str, Any]:
    """Return vLLM's arguments for its memory: a part of the GPU, or the bytes of the cache on a CPU."""
    from fastft.graph.head import find_spec
    from fastft.memory.measure import setup_of_model

    base = base_model(model)
    if base.device.type != "cuda":
        return {"kv_cache_memory_bytes": _CPU_CACHE}
    if share is not None:
        return {"gpu_memory_utilization": share}
    spec = find_spec(base)
    if spec is None:
        raise UsageError(
            f"engine 'vllm': the sizes of the architecture {base.config.model_type!r} are not known, so its part of "
            "the GPU is not either; pass gpu_memory_utilization (0 to 1)"
        )
    setup = setup_of_model(model, spec)
    torch.cuda.empty_cache()  # what the allocator holds without use is free
    free, device = torch.cuda.mem_get_info(base.device)
    held = held_by_training(setup.weights, setup.adapter, setup.gradients, setup.optimizer, peak, sleeps)
    used = device - free
    sizes = {"element": base.dtype.itemsize, "rank": rank, "sequences": sequences, "length": length}
    plan = engine_memory(setup.shape, **sizes, device=device, training=max(held, used))
    return {"gpu_memory_utilization": round(plan.share(device), 4)}


def _start(model: Any, arguments: Mapping[str, Any]) -> Any:
    """Return vLLM's `LLM` over the base weights of `model`; their folder is gone when it is up."""
    wanted = bytes_to_write(model)
    memory = _memory_folder()
    roomy = memory is not None and shutil.disk_usage(memory).free > 2 * wanted
    where = Path(tempfile.mkdtemp(prefix="fastft-base-", dir=memory if roomy else None))
    try:
        folder = write_base(model, where)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        with vllm_environment(), _random_states():
            from vllm import LLM

            try:
                return LLM(model=str(folder), **arguments)
            except Exception as error:
                words = f"{type(error).__name__}: {error}"
                raise EngineError(f"engine 'vllm' did not start: {words}. {_REMEDY}") from error
    finally:
        shutil.rmtree(where, ignore_errors=True)


def _forget_pools() -> None:
    """Let vLLM's allocator for engines that sleep serve another: a process has one, and it refuses a second engine.

    Asleep, an engine's memory is given back already, but stays in the allocator's books. Its pools stay referred to,
    under other names: a pool that goes would have that memory freed once more.
    """
    from vllm.device_allocator.cumem import CuMemAllocator

    allocator = CuMemAllocator.get_instance()
    allocator.pointer_to_data.clear()
    pools = allocator.allocator_and_pools
    for tag in [tag for tag in pools if not tag.startswith("closed")]:
        pools[f"closed {len(pools)} {tag}"] = pools.pop(tag)


@contextmanager
def _random_states() -> Iterator[None]:
    """Put torch's, numpy's and Python's random states by: vLLM seeds them all."""
    import numpy

    states = random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def _parameters(sampling: Sampling, count: int, index: int) -> Any:
    """Return vLLM's SamplingParams for the prompt at `index`; with a seed, each completion of a call has its own."""
    from vllm import SamplingParams

    return SamplingParams(
        n=count,
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        stop_token_ids=list(sampling.stop_ids),
        ignore_eos=True,  # stop_ids alone say where a completion ends
        seed=None if sampling.seed is None else (sampling.seed + index * count) % 2**63,
        logprobs=0,  # of the sampled token alone
        detokenize=False,
    )


def _completion(out: Any) -> Completion:
    ids = tuple(out.token_ids)
    return Completion(ids, tuple(places[token].logprob for places, token in zip(out.logprobs, ids)))
