"""The page of a file of results: what ran where, speed, memory, parity, and what did not run, with two plots."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.arms import find_arm
from benchmarks.fit import memory_fits
from benchmarks.parity import GRADIENT_OF_EAGER, INEXACT_CURVE
from fastft.errors import Problem, UsageError

SPEED = (
    ("tokens/s", "tokens_per_second", ",.1f"), ("non-padding/s", "non_padding_per_second", ",.1f"),
    ("loss-bearing/s", "loss_bearing_per_second", ",.1f"), ("step, ms", "step_ms", ".2f"),
    ("p95, ms", "step_p95_ms", ".2f"), ("MFU", "mfu", ".1%"), ("first step, s", "first_step_s", ".2f"),
    ("recompilations", "recompilations", "d"), ("base, GB", "base_gb", ".3f"), ("peak, GB", "peak_gb", ".3f"),
    ("reserved, GB", "reserved_gb", ".3f"), ("host peak, GB", "host_peak_gb", ".3f"),
)  # fmt: skip
PARITY = (
    ("loss of step 0", "loss0", ".6f"), ("gradient norm", "grad_norm0", ".6f"),
    ("loss, off by", "loss_difference", ".1e"), ("norm, off by", "grad_norm_difference", ".1e"),
    ("gradient's error", "gradient_error", ".2e"), ("eager's", "eager_gradient_error", ".2e"),
    ("allowed", "gradient_allowed", ".2e"),
)  # fmt: skip
READ = """\
Speeds are medians of the timed steps; a struck-out speed belongs to an arm that failed parity. GB are 10^9 bytes. Base
is what is allocated before the first step; peak and reserved are those of the timed steps, on the device; host peak is
the process's on the CPU side, loading included. The first step starts with empty compiler caches. MFU counts the
operations that the step needs (frozen weights 4 per weight and token, trained ones 6), recomputation not, against the
device's dense 16-bit peak. [How to read it](README.md)
"""


def write(path: Path) -> Path:
    """Write page and plots beside the file of results `path`; returns the page.

    Raises UsageError if there is a page already, or if `path` is no file of results.
    """
    target = path.with_suffix(".md")
    if not path.is_file():
        raise UsageError(Problem("--page", str(path), "a file of results"))
    data = json.loads(path.read_text("utf-8"))
    if "cells" not in data:
        raise UsageError(Problem("--page", str(path), "a file of results, with `cells`"))
    if target.exists():
        raise UsageError(Problem("--page", str(target), "no page there", "Move it away: nothing is overwritten."))
    drawn = plots.draw(data, path)
    target.write_text(render(data, path.name, [plot.name for plot in drawn]), encoding="utf-8")
    return target


def render(data: Mapping[str, Any], name: str, drawn: Sequence[str]) -> str:
    """Return the page's text for the results `data` of the file `name`, with the plots `drawn`."""
    parts = [f"# {title(data)}\n", f"The numbers are also in [{name}]({name}).\n", f"```sh\n{data['command']}\n```\n"]
    parts += [facts(data), READ]
    parts += [f"![{plot.split('-')[-1].removesuffix('.png')}]({plot})\n" for plot in drawn]
    for cell in dict.fromkeys(line["cell"] for line in data["cells"]):
        lines = [line for line in data["cells"] if line["cell"] == cell]
        done = [line for line in lines if line["status"] == "ok"]
        parts.append(f"## {cell}\n")
        if done:
            parts += [speed_table(done), parity_table(done), plan_table(done)]
        parts += [
            f"* `{line['arm']}` did not run, {line['status']}: {plain(line['reason'])}\n"
            for line in lines
            if line not in done
        ]
    fits = memory_fits(data["cells"])
    if fits:
        parts.append(fit_table(fits))
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def title(data: Mapping[str, Any]) -> str:
    """Return the page's heading: shapes, modes, device, date."""
    shapes = ", ".join(dict.fromkeys(line["shape"] for line in data["cells"]))
    modes = ", ".join(dict.fromkeys(line["mode"] for line in data["cells"]))
    return f"{shapes} in {modes}, {data['device']['name']}, {data['date'][:10]}"


def facts(data: Mapping[str, Any]) -> str:
    """Return the table of what the numbers depend on."""
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    first = data["cells"][0]
    rows = [("device", data["device"]["name"]), ("versions", versions), ("commit", data["commit"])]
    rows += [("steps", f"{first['steps']} timed after {first['warmup']} warm-up steps, random tokens, bf16 autocast")]
    rows += [("adapter", f"LoRA r={first['rank']} on all linears; none in mode full")]
    clocks = [line["clocks"] for line in data["cells"] if line.get("clocks")]
    if clocks:
        low, high = (choose(clock["sm_mhz"] for clock in clocks) for choose in (min, max))
        rows.append(("SM clock", f"{low:g} to {high:g} MHz (medians of the arms)"))
    others = {line["arm"]: line.get("versions", {}) for line in data["cells"]}
    for arm, found in others.items():
        more = [f"{name} {version}" for name, version in found.items() if data["versions"].get(name) != version]
        rows.append((f"`{arm}`", plain(find_arm(arm).title) + (f" ({', '.join(more)})" if more else "")))
    return "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows)


def speed_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of speed and memory."""
    rows = []
    for line in lines:
        struck = line.get("struck_out", {})
        cells = []
        for _, key, form in SPEED:
            value = struck.get(key, line.get(key))
            told = "-" if value is None else format(value, form)
            cells.append(f"~~{told}~~" if key in struck and value is not None else told)
        rows.append([f"`{line['arm']}`", *cells])
    return table(["arm", *(head for head, _, _ in SPEED)], rows)


def _inexact(line: Mapping[str, Any]) -> str:
    """Return what an arm that is not exact was judged by, "" for any other."""
    parity = line["parity"]
    if "curve_difference" not in parity:
        return ""
    gradient = f"{parity['gradient_allowed']:.3g}{_beside_fp8(parity)}"
    return (
        f"\n`{line['arm']}` is not exact and has limits of its own: loss {parity['loss_allowed']:g}, norm "
        f"{parity['grad_norm_allowed']:g}, gradient {gradient}; its losses differ from an exact "
        f"arm's by {parity['curve_difference']:.1e} of themselves on average over all steps, allowed "
        f"{INEXACT_CURVE:g}.\n"
    )


def _beside_fp8(parity: Mapping[str, Any]) -> str:
    """Return where the limit of a gradient with fp8 factors is from, "" for any other."""
    error = parity.get("eager_fp8_gradient_error")
    return "" if error is None else f" ({GRADIENT_OF_EAGER:g} times eager's with fp8 factors, {error:.3g})"


def parity_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of losses and gradients against the reference's."""
    rows, judged = [], [line for line in lines if line.get("parity")]
    for line in judged:
        told = {**line, **line["parity"]}
        verdict = {True: "yes", False: "**no**", None: plain(told.get("reason", ""))}[told["ok"]]
        rows.append(
            [
                f"`{line['arm']}`",
                *("-" if told.get(key) is None else format(told[key], form) for _, key, form in PARITY),
                verdict,
            ]
        )
    with_reference = [line["parity"] for line in judged if line["parity"]["ok"] is not None]
    if not rows:
        return ""
    text = table(["arm", *(head for head, _, _ in PARITY), "same"], rows)
    if with_reference:
        one = next((parity for parity in with_reference if "curve_difference" not in parity), with_reference[0])
        text = (
            f"The reference's loss of step 0, in fp32, is {one['reference_loss0']:.6f}, its gradient norm "
            f"{one['reference_grad_norm0']:.6f}. Allowed: loss {one['loss_allowed']:g}, norm "
            f"{one['grad_norm_allowed']:g}. The gradient's error is the relative L2 difference from the reference's; "
            f"allowed is {GRADIENT_OF_EAGER:g} times that of eager transformers and PEFT in bf16.\n\n{text}"
            + "".join(_inexact(line) for line in judged)
        )
    return text


def plan_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of fastft's memory plans: what its layers keep, and the peak predicted and measured."""
    told = [(line["arm"], line["facts"]) for line in lines if line.get("facts", {}).get("plan")]
    if not told:
        return ""
    keys = (("predicted_peak_gb", ".3f"), ("measured_peak_gb", ".3f"), ("predicted_over_measured", ".3f"))
    rows = [
        [
            f"`{arm}`",
            plain(str(facts["plan"])),
            plain(str(facts.get("kept") or "-")),
            *("-" if facts.get(key) is None else format(facts[key], form) for key, form in keys),
        ]
        for arm, facts in told
    ]
    return table(["arm", "plan", "layers", "predicted peak, GB", "measured, GB", "ratio"], rows)


def fit_table(fits: Sequence[Mapping[str, Any]]) -> str:
    """Return the section on memory against length."""
    rows = [
        [
            f"`{fit['arm']}`",
            fit["of"],
            ", ".join(map(str, fit["lengths"])),
            f"{fit['mb_per_token']:.4f}",
            f"{fit['intercept_gb']:.3f}",
            f"{fit['largest_residual_gb']:.3f}",
        ]
        for fit in fits
    ]
    heads = ["arm", "of", "lengths", "slope, MB per token", "intercept, GB", "largest residual, GB"]
    return "## Memory against length\n\nLeast squares over peak memory; tokens are those of a batch.\n\n" + table(
        heads, rows
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown whose first column is text and whose others are numbers."""
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def plain(text: str) -> str:
    """Return text that is safe in a table: ASCII, one line, no bars or brackets that Markdown would read."""
    return " ".join(
        text.encode("ascii", "replace").decode().replace("|", "/").replace("[", "(").replace("]", ")").split()
    )
