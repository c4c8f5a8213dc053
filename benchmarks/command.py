"""`scripts/bench`: reads the arguments, runs every arm in its own process, writes one file of results and its page."""

import argparse
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from attrs import asdict, evolve, frozen

from benchmarks import machine, page
from benchmarks.arms import ARMS, DEFAULT_ARMS, FOLDER, REFERENCE, Arm, find_arm
from benchmarks.cells import Cell, Task, default_cells, file_stem
from benchmarks.parity import judged
from benchmarks.shapes import MODES, SHAPES
from benchmarks.terminal import short_table
from fastft.errors import Problem, UsageError, did_you_mean

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs/benchmarks"
USAGE = 3
CHOICES = f"{', '.join(ARMS)}, fastft:PLAN, module:NAME"
# Options that say where things lie and not what is measured: they are no part of the command that is kept.
PLACES = ("--out", "--work", "--peers", "--commit")
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EPILOG = """\
examples:
  scripts/bench                                   what fits the GPU at hand, every arm that is installed
  scripts/bench --arms fastft,unsloth --shape llama-8b --mode nf4 --batch 4 --length 4096 --steps 20
  scripts/bench --arms fastft-min,unsloth --shape llama-8b --batch 1 --lengths 4096,8192,16384,32768
  scripts/bench --page docs/benchmarks/FILE.json  the page and the plots of a file of results
"""


@frozen
class Run:
    """How the processes of one run are started.

    work: folder for models, caches and messages; peers: folder of packages that only the other tools' arms see.
    warm: measure the first step a second time with the compiler's cache of the first process.
    together: an arm measures all lengths of a batch in one process, the shortest first.
    """

    steps: int
    warmup: int
    limit: float
    backend: str
    work: Path
    peers: str = ""
    warm: bool = False
    together: bool = False


class Stopped(BaseException):
    """A signal asked the command to end: of a terminal, or of a limit on its time from outside."""

    def __init__(self, number: int) -> None:
        self.number, self.name = number, signal.Signals(number).name
        super().__init__(f"stopped by {self.name}")


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise Stopped at the first of `STOPS` while the block runs; more of them do not disturb the cleaning up then.

    A signal that was ignored already, as nohup does it, stays so.
    """
    heard = [one for one in STOPS if signal.getsignal(one) is not signal.SIG_IGN]

    def stop(number: int, frame: object) -> None:
        for one in heard:
            signal.signal(one, signal.SIG_IGN)
        raise Stopped(number)

    before = {one: signal.signal(one, stop) for one in heard}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 if no arm gave a number, 3 for wrong usage, 128 and the signal's
    number if a signal stopped it.
    """
    with stopped_by_signals():
        try:
            return started(list(sys.argv[1:] if arguments is None else arguments))
        except Stopped as stop:
            print(f"scripts/bench: {stop} while no arm was running", file=sys.stderr)
            return 128 + stop.number


def started(arguments: list[str]) -> int:
    """Run the command; returns its exit code. Raises Stopped for a signal before or after the measuring."""
    args = parser().parse_args(arguments)
    try:
        if args.page:
            print(page.write(args.page))
            return 0
        device = machine.device()
        cells, arms = cells_of(args, device), arms_of(args)
    except UsageError as error:
        print(error, file=sys.stderr)
        return USAGE
    command = kept_command(arguments)
    head = {
        "command": command, "date": datetime.now(UTC).isoformat(timespec="seconds"), "device": device,
        "commit": args.commit or machine.commit(ROOT), "versions": machine.versions(),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    path = fresh_file(args.out, f"{head['date'][:10]}-{file_stem(cells)}")
    lines: list[dict[str, Any]] = []
    write_whole(path, {**head, "cells": lines})
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.work) as work:
        backend = args.backend or ("inductor" if device["memory"] else "aot_eager")
        run = Run(args.steps, args.warmup, args.limit, backend, Path(work), args.peers, args.warm, args.together)
        try:
            for line in measure(cells, arms, run):
                lines.append({key: value for key, value in line.items() if key != "log"})
                shown = {**line, "device": device["name"], "command": command, "commit": head["commit"]}
                print(json.dumps(shown), flush=True)
                write_whole(path, {**head, "cells": lines})
        except Stopped as stop:
            return leave(stop, path, head, lines + not_done(lines, cells, arms, run, f"{stop} before it was done"))
    written = page.write(path)
    print(f"{short_table(lines)}\n{path}\n{written}", file=sys.stderr)
    return 0 if any(line["status"] == "ok" for line in lines) else 1


def not_done(
    lines: Sequence[dict[str, Any]], cells: Sequence[Cell], arms: Sequence[str], run: Run, reason: str
) -> list[dict[str, Any]]:
    """Return a line with the status "stopped" for every arm of every cell that has none among `lines`."""
    done = {(line["cell"], line["arm"]) for line in lines}
    wanted = [(cell, arm) for cell in cells for arm in arms if (cell.name, arm) not in done]
    return [{**told(arm, cell, run), "status": "stopped", "reason": reason} for cell, arm in wanted]


def leave(stop: Stopped, path: Path, head: dict[str, Any], lines: list[dict[str, Any]]) -> int:
    """Write what there is, with a page if an arm was measured, say so, and return the exit code."""
    write_whole(path, {**head, "cells": lines})
    count = sum(line["status"] != "stopped" for line in lines)
    print(f"scripts/bench: {stop}, {count} of {len(lines)} arms were done", file=sys.stderr)
    measured = any(line["status"] == "ok" for line in lines)
    print(f"{short_table(lines)}\n{path}\n{page.write(path)}" if measured else path, file=sys.stderr)
    return 128 + stop.number


def kept_command(arguments: Sequence[str]) -> str:
    """Return the command line without the options of `PLACES`."""
    kept, rest = ["scripts/bench"], list(arguments)
    while rest:
        word = rest.pop(0)
        if word in PLACES:
            rest[:1] = []
        elif word.partition("=")[0] not in PLACES:
            kept.append(word)
    return shlex.join(kept)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    made = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure training steps of fastft and of other tools: random weights, random tokens, each arm in a "
        "process of its own. Writes one dated file of results and its page.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add(
        "--arms",
        default=",".join(DEFAULT_ARMS),
        help=f"of {', '.join(ARMS)}, fastft:PLAN, module:NAME; default: %(default)s",
    )
    add("--shape", default="", help=f"of {', '.join(SHAPES)}; several with commas; default: what fits the GPU")
    add("--mode", default="nf4", help="nf4 (QLoRA), bf16 (LoRA), full; several with commas; default: nf4")
    add("--batch", default="4", help="rows of a batch; several with commas; default: 4")
    add("--length", "--lengths", default="2048", help="tokens of a row; several with commas; default: 2048")
    add("--steps", type=int, default=20, help="timed steps; default: 20")
    add("--warmup", type=int, default=5, help="steps before them; default: 5")
    add("--layers", type=int, default=0, help="fewer layers than the shape has")
    add("--rank", type=int, default=16, help="rank of LoRA; default: 16")
    add("--padding", type=float, default=0.0, help="largest share of padding in a row, 0 to 0.9")
    add("--completion", type=float, default=1.0, help="share of a row, at its end, that bears loss")
    add("--head-scale", type=float, default=1.0, help="factor on the head's weights; 8 gives peaked logits")
    add("--seed", type=int, default=0, help="of the tokens")
    add("--warm", action="store_true", help="time the first step a second time, with the compiler's cache warm")
    add("--together", action="store_true", help="an arm measures all lengths in one process, shortest first")
    add("--limit", type=float, default=600.0, help="seconds that a process may take for a length; default: 600")
    add("--backend", default="", help="of torch.compile; default: inductor, on a CPU aot_eager")
    add("--peers", default="", metavar="DIR", help="folder of packages for the arms of other tools alone")
    add("--out", type=Path, default=PAGES, help="folder of results and page; default: docs/benchmarks")
    add("--work", type=Path, default=None, help="folder for models and caches of the run; default: the system's own")
    add("--commit", default="", help="name of the commit, where there is no git")
    add("--page", type=Path, default=None, metavar="FILE.json", help="write the page of a file of results, no more")
    return made


def arms_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the names of the arms asked for. Raises UsageError for unknown ones."""
    names = tuple(dict.fromkeys(args.arms.split(",")))
    wrong = [name for name in names if find_arm(name) is None]
    if wrong:
        raise UsageError(*(Problem("--arms", name, f"of {CHOICES}", did_you_mean(name, ARMS)) for name in wrong))
    return names


def cells_of(args: argparse.Namespace, device: dict[str, Any]) -> tuple[Cell, ...]:
    """Return every combination of shape, mode, batch and length asked for. Raises UsageError for all mistakes."""
    problems = []
    for option, given, allowed in (("--shape", args.shape, SHAPES), ("--mode", args.mode, MODES)):
        for word in given.split(",") if given else ():
            if word not in allowed:
                problems.append(Problem(option, word, f"of {', '.join(allowed)}", did_you_mean(word, allowed)))
    numbers = {"--batch": args.batch, "--length": args.length}
    for option, given in numbers.items():
        if not all(word.isdigit() and int(word) > (option == "--length") for word in given.split(",")):
            problems.append(Problem(option, given, "whole numbers with commas, a length of 2 at least"))
    for option, value, low, high in (
        ("--padding", args.padding, 0.0, 0.9),
        ("--completion", args.completion, 0.01, 1.0),
        ("--steps", args.steps, 1, 10**6),
        ("--warmup", args.warmup, 1, 10**6),
    ):
        if not low <= value <= high:
            problems.append(Problem(option, value, f"a number from {low} to {high}"))
    if problems:
        raise UsageError(*problems)
    more = dict(
        layers=args.layers, rank=args.rank, padding=args.padding, completion=args.completion,
        head_scale=args.head_scale, seed=args.seed,
    )  # fmt: skip
    if not args.shape:
        return tuple(evolve(cell, **more) for cell in default_cells(device["memory"]))
    batches, lengths = ([int(word) for word in given.split(",")] for given in numbers.values())
    product = itertools.product(args.shape.split(","), args.mode.split(","), batches, lengths)
    return tuple(Cell(*combination, **more) for combination in product)


def measure(cells: Sequence[Cell], arms: Sequence[str], run: Run) -> Iterator[dict[str, Any]]:
    """Yield one line for each arm on each cell, arms in turn within a cell, judged by the cell's reference.

    Where lengths are measured together the cells that differ in nothing else are taken as one here, an arm's lines
    one after the other.
    """
    caches = itertools.count(1)
    for group in together(cells) if run.together else [(cell,) for cell in cells]:
        fp8 = any(find_arm(name).fp8 for name in arms)
        task = Task(REFERENCE, group[0], fp8=fp8, longer=group[1:])
        references = each(process(task, run, "reference"), group) if set(arms) - {REFERENCE} else [{}] * len(group)
        beside: dict[str, dict[str, Any]] = {}
        for name in arms:
            task = Task(name, group[0], run.steps, run.warmup, run.backend, longer=group[1:])
            arm = find_arm(name)
            for cell, result, reference in zip(group, each(one(task, run, f"{next(caches)}"), group), references):
                if name != REFERENCE:
                    result = judged(result, reference, arm.exact, beside.get(cell.name), arm.fp8)
                if arm.exact and cell.name not in beside and result.get("parity", {}).get("ok"):
                    beside[cell.name] = result
                yield {**told(name, cell, run), **result}


def together(cells: Sequence[Cell]) -> list[tuple[Cell, ...]]:
    """Return the cells that differ in nothing but the length side by side, shortest first."""
    groups: dict[Cell, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(evolve(cell, length=0), []).append(cell)
    return [tuple(sorted(group, key=lambda cell: cell.length)) for group in groups.values()]


def each(result: dict[str, Any], group: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return the results of the cells that one process measured; what ended it early is that of those not done.

    Of a longer batch the first step is not one with empty caches, and the process's peak not its own: left out.
    """
    shared = {key: value for key, value in result.items() if key not in ("longer", "ended")}
    if len(group) == 1 or result["status"] != "ok":
        return [shared] * len(group)
    general = {key: result[key] for key in ("base_gb", "build_s", "versions", "process_s") if key in result}
    not_its_own = {"first_step_s": None, "host_peak_gb": None}
    done = [shared, *({**general, **found, **not_its_own} for found in result.get("longer", ()))]
    return done + [result.get("ended", {})] * (len(group) - len(done))


def told(arm: str, cell: Cell, run: Run) -> dict[str, Any]:
    """Return what every line begins with: what is measured, and how often."""
    return {"arm": arm, "cell": cell.name, **asdict(cell), "steps": run.steps, "warmup": run.warmup}


def one(task: Task, run: Run, cache: str) -> dict[str, Any]:
    """Return an arm's result on a cell. Its compilers' caches are empty at first."""
    arm = find_arm(task.arm)
    missing = absent(arm, run)
    if missing:
        return {"status": "absent", "reason": f"not installed: {', '.join(missing)}"}
    if arm.loads:
        folder = model_folder(task, run)
        if isinstance(folder, dict):
            return folder
        task = evolve(task, folder=str(folder))
    result = process(task, run, cache)
    if run.warm and result["status"] == "ok":
        again = process(evolve(task, steps=1, warmup=1, longer=()), run, cache)
        result["first_step_warm_s"] = again["first_step_s"] if again["status"] == "ok" else None
    return result


def absent(arm: Arm, run: Run) -> list[str]:
    """Return the packages that the arm needs and that are not installed. Nothing is imported."""
    places = [*([run.peers] if run.peers else []), *sys.path]
    return [package for package in arm.needs if PathFinder.find_spec(package, places) is None]


def model_folder(task: Task, run: Run) -> Path | dict[str, Any]:
    """Return the folder of the cell's model, made if it is not there, or the result that says why it cannot be."""
    cell = task.cell
    folder = run.work / f"{cell.shape}-{cell.layers}-{cell.head_scale:g}"
    if not folder.exists():
        made = process(evolve(task, arm=FOLDER, folder=str(folder)), run, "folder")
        if made["status"] != "ok":
            shutil.rmtree(folder, ignore_errors=True)
            return {**made, "reason": f"the model's folder could not be made: {made['reason']}"}
    return folder


def process(task: Task, run: Run, cache: str) -> dict[str, Any]:
    """Run `benchmarks.measure` on the task in a process of its own; what ends it early becomes status and reason.

    Where some of its cells were done by then, those are kept, and status and reason stand under `ended`.
    """
    files = {name: run.work / name for name in ("task.json", "result.json", "log.txt")}
    files["task.json"].write_text(json.dumps(task.to_dict()), encoding="utf-8")
    files["result.json"].unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.measure", str(files["task.json"]), str(files["result.json"])]
    began = time.perf_counter()
    with files["log.txt"].open("w") as log:
        child = subprocess.Popen(
            command,
            cwd=run.work,
            env=environment(task, run, cache),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            limit = run.limit * (1 + len(task.longer))
            code = child.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            late = {"status": "timed out", "reason": f"not done after {limit:g} s"}
            return _with_what_is_done(files["result.json"], late)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    if code == 0:
        seconds = round(time.perf_counter() - began, 1)
        return {**json.loads(files["result.json"].read_text("utf-8")), "process_s": seconds}
    ended = death(code, files["log.txt"].read_text("utf-8", errors="replace"))
    return _with_what_is_done(files["result.json"], ended)


def _with_what_is_done(path: Path, ended: dict[str, Any]) -> dict[str, Any]:
    """Return what a process had written before it `ended`, with that beside it, or that alone."""
    return {**json.loads(path.read_text("utf-8")), "ended": ended} if path.exists() else ended


def environment(task: Task, run: Run, cache: str) -> dict[str, str]:
    """Return the environment of an arm's process: this tree's fastft, own caches, no hub, the peers where needed."""
    arm = find_arm(task.arm)
    peers = [run.peers] if run.peers and arm and arm.needs else []
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    caches = run.work / "caches" / cache
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*peers, str(ROOT), str(ROOT / "src"), *inherited]),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "UNSLOTH_COMPILE_LOCATION": str(caches / "unsloth"),
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def death(code: int, log: str) -> dict[str, Any]:
    """Return status and reason of a process that ended with `code`, from what it said last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    reason = (named or lines or [f"exit code {code}, without a word"])[-1][:400]
    if code < 0:
        reason = f"ended by signal {-code}" + (" (the host may be out of memory)" if code == -signal.SIGKILL else "")
    status = "out of memory" if "OutOfMemoryError" in reason else "failed"
    return {"status": status, "reason": reason, "log": lines[-12:]}


def fresh_file(folder: Path, stem: str) -> Path:
    """Create and return a file of results that was not there: STEM.json, STEM-2.json, ..., with no page beside it."""
    for number in itertools.count(1):
        path = folder / f"{stem}{'' if number == 1 else f'-{number}'}.json"
        if path.with_suffix(".md").exists():
            continue
        try:
            path.open("x").close()
        except FileExistsError:
            continue
        return path


def write_whole(path: Path, data: dict[str, Any]) -> None:
    """Write this run's own file anew, whole or not at all."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
