"""The command: each arm in a process of its own, one JSON line a cell."""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ARMS = {
    "fastft": "benchmarks.grpo.fastft",
    "trl": "benchmarks.grpo.trl",
    "trl-checkpoint": "benchmarks.grpo.trl",
    "unsloth": "benchmarks.grpo.unsloth",
    "unsloth-checkpoint": "benchmarks.grpo.unsloth",
}
FOLDER = "folder"
VERSIONS = ("torch", "transformers", "trl", "peft", "vllm", "bitsandbytes", "unsloth")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_grpo"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the arms one after another and print a JSON line for each; 1 if one of them failed."""
    given = _parser().parse_args(arguments)
    if given.job is not None:
        return _work(json.loads(given.job))
    return _all(given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "bench_grpo", description="Measure steps of GRPO of fastft beside other tools, on models with random weights."
    )
    parser.add_argument("--arms", default="fastft,trl", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--shape", default="llama-1b", help="of benchmarks.shapes, such as llama-1b or llama-8b")
    parser.add_argument("--mode", default="bf16", choices=("bf16", "nf4"), help="the base weights; LoRA is trained")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step")
    parser.add_argument("--generations", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=256, help="tokens of a completion")
    parser.add_argument("--rows", type=int, default=16, help="completions in a forward pass")
    parser.add_argument("--layers", type=int, default=0, help="layers instead of the shape's own")
    parser.add_argument("--engine", default="vllm", choices=("vllm", "transformers"))
    parser.add_argument("--engine-options", default="{}", help="JSON, for the engine")
    parser.add_argument("--backend", default="inductor", help="torch.compile's, of fastft")
    parser.add_argument("--seconds", type=float, default=0, help="of one arm, behind which it begins no more steps")
    parser.add_argument("--timeout", type=int, default=540, help="seconds for one arm; one that takes longer is killed")
    parser.add_argument("--output", help="a file that the lines are added to as well")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser


def _all(given: argparse.Namespace) -> int:
    names = given.arms.split(",")
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        print(f"bench_grpo: no arm {', '.join(unknown)}; there are {', '.join(ARMS)}", file=sys.stderr)
        return 2
    failed = False
    with tempfile.TemporaryDirectory(prefix="bench-grpo-") as folder:
        keys = ("shape", "mode", "steps", "prompts", "generations", "prompt", "completion", "rows", "layers", "engine")
        shared = {key: getattr(given, key) for key in keys}
        shared |= {"engine_options": json.loads(given.engine_options), "backend": given.backend}
        shared["folder"] = f"{folder}/model"
        if any(not name.startswith("fastft") for name in names):
            _run({**shared, "arm": FOLDER, "output": folder}, given.timeout)
        for name in names:
            until = time.time() + given.seconds if given.seconds else 0.0
            line = _run({**shared, "arm": name, "output": f"{folder}/{name}", "until": until}, given.timeout)
            failed |= "error" in line
            print(json.dumps(line), flush=True)
            if given.output:
                with Path(given.output).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    return int(failed)


def _run(job: dict[str, Any], timeout: int) -> dict[str, Any]:
    """Run one job in a process of its own and return its line; a job that says none is a line with the error."""
    began = time.monotonic()
    told = {key: job[key] for key in ("arm", "shape", "mode", "engine", "steps", "prompts", "generations", "rows")}
    told |= {"prompt": job["prompt"], "completion": job["completion"]}
    try:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "--job", json.dumps(job)], stdout=subprocess.PIPE, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {**told, "error": f"not done within {timeout} s"}
    wall = {"wall_seconds": round(time.monotonic() - began, 1)}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"result"')]
    if not lines:
        return {**told, **wall, "error": f"ended with {done.returncode} and said nothing"}
    return {**told, **wall, **json.loads(lines[-1])["result"]}


def _work(given: dict[str, Any]) -> int:
    """Do one job in this process and print its line."""
    if given["arm"].startswith("unsloth"):
        import unsloth  # noqa: F401  it must come before what it replaces

    import torch

    from benchmarks.grpo.job import Job, now, peak_of_device, save_model, summary
    from fastft.environment import version_of

    job, device = Job(**given), "cuda" if torch.cuda.is_available() else "cpu"
    if job.arm == FOLDER:
        save_model(job, device)
        print(json.dumps({"result": {}}))
        return 0
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {name: version_of(name) for name in VERSIONS},
    }
    began = now()
    with peak_of_device() as peak:
        try:
            made = importlib.import_module(ARMS[job.arm]).run(job, device)
        except Exception as error:
            traceback.print_exc()
            made = {"error": f"{type(error).__name__}: {error}"[:2000]}
    result |= peak
    steps = made.pop("steps", [])
    if steps:
        spent = sum(step["seconds"] for step in steps)
        result |= {"start_seconds": round(now() - began - spent, 1), **summary(steps)}
        tokens = job.completions * job.completion
        rollout = result["median"]["rollout"]
        result["rollout_tokens_per_second"] = round(tokens / rollout, 1) if rollout else None
        rounded = [{name: round(seconds, 4) for name, seconds in step.items()} for step in steps]
        result["all_steps"] = rounded
    print(json.dumps({"result": {**result, **made}}), flush=True)
    return int("error" in made)
