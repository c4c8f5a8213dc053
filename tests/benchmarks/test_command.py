"""The command as a user runs it: arms in processes of their own, one file, one page, nothing overwritten."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import command, page
from benchmarks.arms import ARMS, DEFAULT_ARMS, REFERENCE, find_arm
from benchmarks.cells import Cell, Task

ROOT = Path(__file__).parents[2]
ARMS_RUN = ["fastft", "peft", "unsloth", "module:wrong_arm"]
FIELDS = {
    "arm", "cell", "shape", "mode", "batch", "length", "status", "tokens_per_second", "non_padding_per_second",
    "loss_bearing_per_second", "step_ms", "step_p95_ms", "base_gb", "peak_gb", "reserved_gb", "host_peak_gb",
    "first_step_s", "graphs", "recompilations", "loss0", "grad_norm0", "mfu", "tflop_per_step", "clocks", "versions",
    "parity", "allocator", "process_s",
}  # fmt: skip


def bench(*arguments, **environment):
    here = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent), **environment}
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/bench"), *map(str, arguments)], capture_output=True, text=True, env=here
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    run = bench(
        "--arms", ",".join(ARMS_RUN), "--shape", "tiny", "--mode", "nf4", "--batch", 2, "--length", 48, "--steps", 4,
        "--warmup", 2, "--completion", 0.5, "--head-scale", 8, "--out", out,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (path,) = out.glob("*.json")
    return run, path, json.loads(path.read_text("utf-8"))


def test_one_line_a_cell_on_stdout_and_in_the_file(done):
    run, path, data = done
    shown = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["arm"] for line in shown] == ARMS_RUN == [line["arm"] for line in data["cells"]]
    for line in shown:
        assert line["command"] == data["command"] and line["commit"] == data["commit"] and line["device"]
    assert data["command"].startswith("scripts/bench --arms fastft,peft") and str(path.parent) not in data["command"]
    assert path.name == f"{data['date'][:10]}-tiny-nf4.json"


def test_a_short_table_is_on_stderr(done):
    """With every arm, the wrong one's speed left out; what is on stdout stays JSON."""
    run, path, data = done
    shown = run.stderr.splitlines()[-2 - len(ARMS_RUN) - 1 :]
    assert shown[0].split() == ["arm", "cell", "tokens/s", "step", "ms", "peak", "GB", "parity"]
    assert shown[-2:] == [str(path), str(path.with_suffix(".md"))]
    fastft, peft, unsloth, wrong = shown[1:-2]
    for told, line in ((fastft, data["cells"][0]), (peft, data["cells"][1])):
        numbers = [f"{line['tokens_per_second']:,.1f}", f"{line['step_ms']:,.2f}"]
        assert told.startswith(line["arm"]) and told.split()[-4:] == [*numbers, "-", "yes"]  # a CPU counts no peak
        assert line["cell"] in told
    if data["cells"][2]["status"] == "absent":
        assert unsloth.split()[-4:] == ["-", "-", "-", "absent"]
    assert wrong.startswith("module:wrong_arm") and wrong.split()[-4:] == ["-", "-", "-", "no"]


def test_metrics(done):
    _, _, data = done
    for line in data["cells"][:2]:
        assert line["status"] == "ok" and set(line) >= FIELDS
        assert line["tokens_per_second"] == pytest.approx(96 / line["step_ms"] * 1e3, rel=1e-3, abs=0.1)
        # the last 24 of 48 tokens bear loss; every one is the target of the token before it
        assert line["loss_bearing_per_second"] == pytest.approx(line["tokens_per_second"] / 2, rel=1e-3, abs=0.1)
        assert line["non_padding_per_second"] == line["tokens_per_second"]
        assert line["step_p95_ms"] >= line["step_ms"]
        assert line["recompilations"] == 0
    fastft, peft = data["cells"][:2]
    assert fastft["graphs"] > 0 and peft["graphs"] == 0
    assert fastft["facts"]["applied"] and not fastft["facts"]["refused"]
    # two layers: q and o 128 x 128, k and v 128 x 64, three of 128 x 256; the adapters' weights are trained
    frozen = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)
    trained = 2 * 16 * (2 * 256 + 2 * 192 + 3 * 384)
    needed = 96 * (4 * frozen + 6 * trained) + 48 * 4 * 128 * 2048 + 12 * 128 * 2 * (2 * 48 * 49 // 2)
    assert fastft["tflop_per_step"] == peft["tflop_per_step"] == pytest.approx(needed / 1e12, abs=1e-6)


def test_right_arms_pass_parity_and_the_wrong_one_is_struck_out(done):
    _, _, data = done
    fastft, peft, _, wrong = data["cells"]
    for line in (fastft, peft):
        told = line["parity"]
        assert told["ok"] is True and "struck_out" not in line
        assert 1e-3 < told["eager_gradient_error"] < 0.02
        assert told["gradient_allowed"] == pytest.approx(1.25 * told["eager_gradient_error"] + 1e-5)
        assert 0.5 * told["eager_gradient_error"] < told["gradient_error"] <= told["gradient_allowed"]
        assert told["reference_s"] > 0
    assert wrong["parity"]["ok"] is False
    assert wrong["tokens_per_second"] is None and wrong["step_ms"] is None and wrong["mfu"] is None
    assert wrong["struck_out"]["tokens_per_second"] > 0


def test_fastft_tells_its_plan(done):
    _, _, data = done
    facts = data["cells"][0]["facts"]
    assert facts["plan"] == "keep" and facts["kept"] and "predicted_peak_gb" in facts
    assert facts["measured_peak_gb"] is None and facts["predicted_over_measured"] is None  # a CPU counts no peak
    facts = {**facts, "predicted_peak_gb": 10.077, "measured_peak_gb": 9.937, "predicted_over_measured": 1.0141}
    text = page.plan_table([{"arm": "fastft", "facts": facts}, data["cells"][1]])
    assert text.endswith(f"| `fastft` | keep | {facts['kept']} | 10.077 | 9.937 | 1.014 |\n") and "peft" not in text


@pytest.mark.skipif(find_spec("unsloth") is not None, reason="Unsloth is installed")
def test_an_absent_peer_is_absent_and_not_slow(done):
    _, _, data = done
    line = data["cells"][2]
    assert line["status"] == "absent" and "unsloth" in line["reason"] and "tokens_per_second" not in line


def test_the_page_says_what_the_file_says(done):
    _, path, data = done
    text = path.with_suffix(".md").read_text("utf-8")
    drawn = sorted(plot.name for plot in path.parent.glob("*.png"))
    assert drawn == [f"{path.stem}-speed.png"] and f"({drawn[0]})" in text  # one length: no picture of memory
    assert text == page.render(data, path.name, drawn)
    for line in data["cells"][:2]:
        row = next(
            row for row in text.splitlines() if row.startswith(f"| `{line['arm']}` | {line['tokens_per_second']:,}")
        )
        assert f"| {line['step_ms']:.2f} |" in row and f"| {line['host_peak_gb']:.3f} |" in row
        assert f"| `{line['arm']}` | {line['loss0']:.6f} | {line['grad_norm0']:.6f} |" in text
    struck = data["cells"][3]["struck_out"]
    assert f"| `module:wrong_arm` | ~~{struck['tokens_per_second']:,}~~ |" in text and "| **no** |" in text
    assert "`unsloth` did not run, absent" in text


def test_nothing_is_overwritten(done):
    _, path, data = done
    second = command.fresh_file(path.parent, path.stem)
    assert second.name == f"{path.stem}-2.json" and second.read_text() == ""
    assert command.fresh_file(path.parent, path.stem).name == f"{path.stem}-3.json"
    assert json.loads(path.read_text("utf-8")) == data
    before = path.with_suffix(".md").read_bytes()
    again = bench("--page", path)
    assert again.returncode == 3 and "nothing is overwritten" in again.stderr
    assert path.with_suffix(".md").read_bytes() == before


def start(*arguments):
    here = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/bench"), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=here, preexec_fn=heed_interrupts,
    )  # fmt: skip


def heed_interrupts():
    """Undo what a shell does to its background jobs, which ignore SIGINT, and so would the command under test."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_stopped_command_writes_what_it_has(tmp_path):
    """One arm is done, the second never ends: file, page, a message, no traceback, and the arm's process is gone."""
    run = start(
        "--arms", "peft,module:endless_arm,fastft", "--shape", "tiny", "--mode", "bf16", "--batch", 1, "--length", 8,
        "--steps", 1, "--warmup", 1, "--out", tmp_path, "--work", tmp_path,
    )  # fmt: skip
    first = json.loads(run.stdout.readline())
    assert first["arm"] == "peft" and first["status"] == "ok"
    (work,) = tmp_path.glob("bench-*")
    deadline = time.monotonic() + 600
    pid = work / "pid"
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    child = int(pid.read_text())
    run.send_signal(signal.SIGTERM)
    _, told = run.communicate(timeout=600)
    assert run.returncode == 143 and "Traceback" not in told
    assert "stopped by SIGTERM, 1 of 3 arms were done" in told
    assert [line.split()[-1] for line in told.splitlines()[-5:-2]] == ["yes", "stopped", "stopped"]
    (path,) = tmp_path.glob("*.json")
    lines = json.loads(path.read_text("utf-8"))["cells"]
    assert [line["status"] for line in lines] == ["ok", "stopped", "stopped"]
    assert "`fastft` did not run, stopped: stopped by SIGTERM before it was done" in path.with_suffix(".md").read_text(
        "utf-8"
    )
    assert not work.exists() and not list(tmp_path.glob("*.part"))
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_stopped_before_anything_is_measured(tmp_path):
    """The file then tells what was wanted; there is no page without a number."""
    run = start("--arms", "module:endless_arm", "--shape", "tiny", "--out", tmp_path, "--work", tmp_path)
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("bench-*/task.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    shown, told = run.communicate(timeout=600)
    assert run.returncode == 130 and shown == "" and "Traceback" not in told and "0 of 1 arms were done" in told
    (path,) = tmp_path.iterdir()
    assert [line["status"] for line in json.loads(path.read_text("utf-8"))["cells"]] == ["stopped"]


def run_of(tmp_path, **changes):
    settings = dict(steps=1, warmup=1, limit=600.0, backend="aot_eager", work=tmp_path) | changes
    return command.Run(**settings)


def test_an_arm_that_takes_too_long_or_dies_is_a_line_with_its_reason(tmp_path, monkeypatch):
    task = Task("peft", Cell("tiny", "bf16", 1, 8), 1, 1)
    late = command.process(task, run_of(tmp_path, limit=0.2), "a")
    assert late == {"status": "timed out", "reason": "not done after 0.2 s"}
    unknown = Task("fastft:half", Cell("tiny", "bf16", 1, 8), 1, 1, "aot_eager")
    real = command.process  # the reference has nothing to say about an arm without a result
    monkeypatch.setattr(command, "process", lambda task, *how: real(task, *how) if task.arm != REFERENCE else {})
    (line,) = command.measure([unknown.cell], ["fastft:half"], run_of(tmp_path))
    assert line["status"] == "failed" and "half" in line["reason"] and "parity" not in line
    told = command.death(
        1, "Traceback\n  File x\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n"
    )
    assert told["status"] == "out of memory" and "2 GiB" in told["reason"]
    assert "signal 9" in command.death(-9, "")["reason"]


def test_wrong_usage_names_every_mistake(tmp_path):
    wrong = bench("--shape", "llama-9b,tiny", "--mode", "int3", "--length", "1", "--padding", "2", "--out", tmp_path)
    assert wrong.returncode == 3 and not list(tmp_path.iterdir())
    for part in ("llama-9b", "did you mean 'llama-8b'?", "int3", "--length", "--padding"):
        assert part in wrong.stderr
    wrong = bench("--arms", "unslothed", "--out", tmp_path)
    assert wrong.returncode == 3 and "did you mean 'unsloth'?" in wrong.stderr


def test_arms():
    assert set(DEFAULT_ARMS) <= set(ARMS)
    assert find_arm("fastft-replay:24GB").options == ("24GB", "always") and find_arm("peft:24GB") is None
    with_head = find_arm("fastft-fp8-head:fast")
    assert with_head.options == ("fast", "fp8+head") and not with_head.exact
    assert with_head.title == 'fastft, plan="fast", compute="fp8+head"'
    assert find_arm("fastft-fp8:24GB").options == ("24GB", "fp8") and not find_arm("fastft-fp8:24GB").exact
    assert find_arm("fastft-fp8").options == ("keep", "fp8") and find_arm("fastft-replay:24GB").exact
    assert find_arm("fastft:24GB").options == ("24GB",) and find_arm("fastft:") is None and find_arm("x") is None


def test_places_are_no_part_of_the_kept_command():
    given = ["--arms", "fastft", "--out", "a b", "--commit=x", "--peers", "p", "--steps", "3"]
    assert command.kept_command(given) == "scripts/bench --arms fastft --steps 3"


def test_lengths_measured_together_are_those_measured_alone(tmp_path):
    """One process an arm, shortest first; each length begins with the first weights, or parity would fail."""
    given = ("--arms", "peft,fastft", "--shape", "tiny", "--mode", "nf4", "--batch", 2, "--steps", 2, "--warmup", 1)
    assert bench(*given, "--lengths", "96,32", "--together", "--out", tmp_path / "both").returncode == 0
    assert bench(*given, "--length", 96, "--out", tmp_path / "one").returncode == 0
    ((both, page_of),) = [(p, p.with_suffix(".md")) for p in (tmp_path / "both").glob("*.json")]
    lines = json.loads(both.read_text("utf-8"))["cells"]
    assert [(line["arm"], line["length"]) for line in lines] == [
        ("peft", 32),
        ("peft", 96),
        ("fastft", 32),
        ("fastft", 96),
    ]
    assert all(set(line) >= FIELDS and line["status"] == "ok" and line["parity"]["ok"] for line in lines)
    assert [line["first_step_s"] is None for line in lines] == [False, True, False, True]
    assert [line["host_peak_gb"] is None for line in lines] == [False, True, False, True]
    (one,) = (tmp_path / "one").glob("*.json")
    for alone in json.loads(one.read_text("utf-8"))["cells"]:
        (line,) = [line for line in lines if (line["arm"], line["length"]) == (alone["arm"], 96)]
        assert line["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert line["parity"]["reference_loss0"] == pytest.approx(alone["parity"]["reference_loss0"], rel=1e-6)
    assert page_of.read_text("utf-8").count("## tiny nf4, 2 x 96\n") == 1


def test_lengths_that_were_done_before_a_process_ended_are_kept(tmp_path):
    cells = [Cell("tiny", "nf4", 2, length) for length in (16, 32, 64)]
    done = {"status": "ok", "base_gb": 1.0, "first_step_s": 2.0, "host_peak_gb": 3.0}
    (tmp_path / "result.json").write_text(json.dumps({**done, "longer": [{**done, "base_gb": None}]}))
    ended = {"status": "timed out", "reason": "not done after 3 s"}
    first, second, third = command.each(command._with_what_is_done(tmp_path / "result.json", ended), cells)
    assert first == done and third == ended
    assert second == {**done, "base_gb": None, "first_step_s": None, "host_peak_gb": None}
    assert command.each(command._with_what_is_done(tmp_path / "none.json", ended), cells) == [ended] * 3
