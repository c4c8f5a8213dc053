"""The documentation: complete, its links whole, and its Python blocks run on the model that comes with fastft."""

import contextlib
import gc
import importlib.util
import json
import re
from inspect import Parameter, isclass, signature
from pathlib import Path
from typing import get_args

import attrs
import pytest

import fastft
from fastft.cli.main import app
from fastft.graph.backend import BACKENDS
from fastft.registry import spec as records
from fastft.registry.resolve import specs

ROOT = Path(__file__).parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sorted((ROOT / "docs").rglob("*.md"))}
PAGES |= {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "llms.txt")}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = {name: [code for kind, code in FENCE.findall(text) if kind == "python"] for name, text in PAGES.items()}
# Pages whose blocks compile as a reader's do, with Inductor by default; those of others with "eager": captured, proved
# and rewritten, but not lowered.
INDUCTOR = ("README.md", "docs/tutorial/first-fine-tune.md")


def part(page, heading):
    """Return the text below a heading, down to the next one of its level or above."""
    level = heading.split(" ")[0]
    found = re.search(
        rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", PAGES[page], re.MULTILINE | re.DOTALL
    )
    assert found, f"{page} has no {heading!r}; run docs/reference/generate.py"
    return found[1]


# ---- completeness


@pytest.mark.parametrize("name", fastft.__all__)
def test_every_public_name_and_argument_is_in_the_reference(name):
    assert f"fastft.{name}" in PAGES["docs/reference/api.md"]
    thing = getattr(fastft, name)
    if isclass(thing) or not callable(thing):
        return
    text = part("docs/reference/api.md", f"### fastft.{name}")
    call = FENCE.search(text)[2]
    for parameter in signature(thing).parameters.values():
        assert re.search(rf"\b{parameter.name}\b", call), parameter.name
        if isinstance(parameter.default, str | int | float) and parameter.default is not Parameter.empty:
            assert re.search(rf"\b{parameter.name}: [^\n]*= {re.escape(repr(parameter.default))}", call), parameter.name


@pytest.mark.parametrize("name", ["from_pretrained", "get_peft_model", "for_training", "for_inference"])
def test_every_argument_of_the_familiar_names_is_in_the_reference(name):
    call = FENCE.search(part("docs/reference/api.md", f"#### FastLanguageModel.{name}"))[2]
    for parameter in signature(getattr(fastft.FastLanguageModel, name)).parameters:
        assert re.search(rf"\b{parameter}\b", call), parameter


def commands(group, path=()):
    import typer

    context = typer.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = hasattr(command, "list_commands")
        yield (*path, name), command
        yield from commands(command, (*path, name)) if inner else ()


def test_every_command_and_option_is_in_the_reference():
    import typer

    found = dict(commands(typer.main.get_command(app)))
    assert {"registry", "env", "demo"} <= {path[0] for path in found} and ("registry", "check") in found
    for path, command in found.items():
        text = part("docs/reference/cli.md", f"## fastft {' '.join(path)}")
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert all(option in text for option in parameter.opts), (path, parameter.name)
            else:
                assert (parameter.metavar or parameter.name) in text, (path, parameter.name)


SPEC_RECORDS = [value for value in vars(records).values() if isclass(value) and attrs.has(value)]


@pytest.mark.parametrize("record", [r for r in SPEC_RECORDS if r is not records.Capabilities], ids=lambda r: r.__name__)
def test_every_field_of_a_spec_is_in_the_reference(record):
    text = part("docs/reference/spec.md", f"## {record.__name__}")
    for field in attrs.fields(record):
        assert f"| `{field.name}` |" in text, field.name
        for value in get_args(field.type):
            if isinstance(value, str):
                assert value in text


def test_capability_names():
    assert all(f"`{name}`" in PAGES["docs/reference/spec.md"] for name in get_args(records.CapabilityName))


def test_the_generator_still_runs():
    path = ROOT / "docs/reference/generate.py"
    module = importlib.util.module_from_spec(source := importlib.util.spec_from_file_location("generate", path))
    source.loader.exec_module(module)
    assert "### fastft.sft" in module.api() and "`offset`" in module.spec_page()


def test_readme_lists_the_families():
    table = PAGES["README.md"].split("fastft registry list -->")[1].split("\nA model of another")[0]
    rows = re.findall(r"^\| `([^`]*)` \| ([^|]*) \| (.*) \|$", table, re.MULTILINE)
    assert rows == [
        (s.name, s.title, ", ".join(name for name, claim in s.capabilities.items() if claim.status == "supported"))
        for s in specs()
    ]


def test_index_and_llms_txt_name_every_page():
    for name in PAGES:
        if name.startswith("docs/") and name != "docs/index.md":
            assert f"({name.removeprefix('docs/')})" in PAGES["docs/index.md"], name
            assert f"({name})" in PAGES["llms.txt"], name


# ---- links and numbers


def anchors(text):
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    text = FENCE.sub("", PAGES[page])
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.is_file(), target
        assert not anchor or anchor in anchors(path.read_text("utf-8")), target


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_the_text_exist(page):
    for name in re.findall(r"`((?:tests|scripts|docs)/[\w/.\-]+)`", PAGES[page]):
        assert (ROOT / name).exists(), name


def test_benchmark_page_says_what_its_data_say():
    folder = ROOT / "docs/benchmarks"
    for data in folder.glob("*.json"):
        own = data.with_suffix(".md")  # a page of several files names them all
        pages = (
            [own] if own.exists() else [page for page in folder.glob("*.md") if f"({data.name})" in page.read_text()]
        )
        text, measured = "\n".join(page.read_text("utf-8") for page in pages), json.loads(data.read_text("utf-8"))
        assert text, data.name
        for line in measured.get("cells", ()):
            rows = [row for row in text.splitlines() if row.startswith(f"| `{line['arm']}` |")]
            if line.get("tokens_per_second"):
                told = f"{line['tokens_per_second']:,.1f}", f"{line['step_ms']:.2f}", f"{line['peak_gb']:.3f}"
                assert any(all(f"| {value} |" in row for value in told) for row in rows), (data.name, line["arm"])
        if "results" not in measured:
            continue
        batch, length = re.search(r"--batch (\d+) --length (\d+)", measured["command"]).groups()
        for row in measured["results"]:
            line = next(line for line in text.splitlines() if line.startswith(f"| `{row['arm']}` |"))
            for value in (f"{row['tokens_per_second']:,}", f"{row['step_ms']}", f"{row['peak_gb']}"):
                assert f" {value} " in line, (data.name, row["arm"], value)
            assert f"| `{row['arm']}` | {row['loss0']:.6f} | {row['grad_norm0']:.6f} |" in text
            assert row["tokens_per_second"] == pytest.approx(int(batch) * int(length) / row["step_ms"] * 1e3, rel=1e-4)


# In a file of results: fastft's arm, the one beside it, and the ratios of speed and memory that the page says.
# File -> arm, the one it is compared with, speed, memory, and the cell where the file has several.
RATIOS = {
    "2026-11-28-llama-8b-nf4-2": [
        ("fastft:fast", "unsloth-none", "1.10", "1.00"),
        ("fastft:39.6GB", "unsloth-none", "1.01", "0.55"),
        ("fastft:10.1GB", "unsloth", "1.31", "0.91"),
    ],
    "2026-11-28-llama-8b-nf4-3": [("fastft", "unsloth-none", "1.09", "0.80")],
    "2026-11-27-llama-8b-long": [("fastft:14.2GB", "unsloth", "1.28", "0.92", "llama-8b nf4, 1 x 32768")],
    "2026-11-27-llama-1b-nf4": [
        ("fastft-replay:fast", "unsloth-none", "1.31", "1.04"),
        ("fastft-replay:keep+8bit", "unsloth-none", "1.27", "0.65"),
        ("fastft-replay:2.5GB", "unsloth", "1.31", "1.00"),
    ],
    "2026-11-27-llama-1b-nf4-2": [
        ("fastft-replay:fast", "unsloth-none", "1.26", "1.10"),
        ("fastft-replay:keep+8bit", "unsloth-none", "1.23", "0.69"),
        ("fastft-replay:2.5GB", "unsloth", "1.63", "1.02"),
    ],
    "2026-11-27-llama-1b-nf4-3": [("fastft-replay:keep+8bit", "unsloth-none", "1.21", "0.69")],
    "2026-11-27-llama-1b-bf16-full": [
        ("fastft", "unsloth-none", "1.26", "0.86", "llama-1b bf16, 4 x 2048"),
        ("fastft", "unsloth-none", "1.02", "0.85", "llama-1b full, 4 x 2048"),
    ],
    "2026-11-27-llama-3b-bf16-full": [
        ("fastft", "unsloth-none", "1.14", "0.83", "llama-3b bf16, 4 x 2048"),
        ("fastft", "unsloth-none", "1.02", "0.86", "llama-3b full, 4 x 2048"),
    ],
    "2026-11-28-llama-1b-nf4": [
        ("fastft-replay:keep+8bit", "unsloth-none", "1.38", "0.65"),
        ("fastft-fp8:keep+8bit", "unsloth-none", "1.69", "0.65"),
        ("fastft-fp8:2.5GB", "unsloth", "1.79", "1.01"),
    ],
    "2026-11-28-llama-1b-nf4-2": [
        ("fastft:2.5GB", "unsloth", "1.48", "1.00"),
        ("fastft-fp8:2.5GB", "unsloth", "1.91", "1.00"),
    ],
    "2026-11-28-qwen3-8b-nf4": [("fastft", "unsloth-none", "1.10", "0.75")],
    "2026-11-28-gemma3-4b-qwen3-8b-nf4": [("fastft", "unsloth-none", "1.24", "0.67", "gemma3-4b nf4, 4 x 2048")],
}


# README says these ratios in words; the benchmarks' own page has them in a table, beside those of the first machine.
AGAIN = (
    "2026-11-27-llama-1b-nf4-2",
    "2026-11-27-llama-1b-nf4-3",
    "2026-11-28-llama-1b-nf4",
    "2026-11-28-llama-1b-nf4-2",
)


@pytest.mark.parametrize("stem", RATIOS)
def test_results_are_those_of_the_benchmark(stem):
    """The numbers and ratios of README's table are those of the files, and so are those of the other machines."""
    text, again = (
        part("README.md", "## Results"),
        part("docs/benchmarks/README.md", "## The same shape on other machines"),
    )
    data = json.loads((ROOT / f"docs/benchmarks/{stem}.json").read_text("utf-8"))
    assert f"{stem}.md" in (again if stem in AGAIN else text)
    for arm, other, speed, memory, *cell in RATIOS[stem]:
        rows = {row["arm"]: row for row in data["cells"] if [row["cell"]] == cell or not cell}
        ours, theirs = rows[arm], rows[other]
        assert f"{ours['tokens_per_second'] / theirs['tokens_per_second']:.2f}" == speed, arm
        assert f"{ours['peak_gb'] / theirs['peak_gb']:.2f}" == memory, arm
        of_loss, of_norm = (3e-4, 4e-3) if arm.startswith("fastft-fp8") else (6e-5, 9e-4)
        assert ours["parity"]["loss_difference"] < of_loss and ours["parity"]["grad_norm_difference"] < of_norm
        if "llama-1b-nf4" in stem:
            table = again[again.index(f"({stem}.md)") :]
            assert f"`{arm}` | `{other}` | {speed} | {memory} |" in table[: table.find("\n| [") % len(table)], arm
        if stem not in AGAIN:
            first, second = (f"| {row['tokens_per_second']:,} | {row['peak_gb']} |" for row in (ours, theirs))
            assert f"{first} {speed} | {memory} |" in text and f"{second} | |" in text, arm


def test_ratios_that_readme_says_in_words_are_those_of_the_other_machines():
    text = re.sub(r"\s+", " ", part("README.md", "## Results"))
    of: dict[str, list[str]] = {}
    for arm, _, speed, _ in (row for stem in AGAIN for row in RATIOS[stem]):
        of.setdefault(arm.replace("-replay", ""), []).append(speed)
    assert f'{of["fastft:fast"][0]} times with "fast"' in text
    eight = sorted(of["fastft:keep+8bit"])
    assert f'{eight[0]} to {eight[-1]} times Unsloth\'s speed with "keep+8bit"' in text
    assert f'{" and ".join(sorted(of["fastft:2.5GB"]))} times its default\'s with "2.5GB"' in text
    assert f"{of['fastft-fp8:keep+8bit'][0]} times as fast in 0.65 of the memory" in text
    assert f"{of['fastft-fp8:2.5GB'][-1]} times as fast in 1.00" in text


@pytest.mark.parametrize("page", PAGES)
def test_text_is_finished(page):
    assert not re.search(r"\b(TODO|FIXME|OUT[a-z0-9]+|FAMILIES)\b", PAGES[page])
    assert not re.search(r"[^\x00-\x7F]", PAGES[page]), "plain ASCII only"


# ---- the Python blocks


def run_blocks(page, folder, monkeypatch):
    """Run a page's blocks in order, in one namespace and an empty folder; return the namespace."""
    monkeypatch.chdir(folder)
    for name, text in re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL):
        (folder / name).write_text(text, encoding="utf-8")
    space = {"__name__": "page"}
    for number, code in enumerate(BLOCKS[page], 1):
        exec(compile(code, f"{page}, block {number}", "exec"), space)
    return space


@pytest.fixture
def own_registry(monkeypatch):
    """Forget afterwards what a page registered."""
    from fastft.registry import resolve

    monkeypatch.setattr(resolve, "_registered", resolve._registered)


@pytest.fixture
def not_lowered(monkeypatch):
    """Compile with "eager" whatever backend is asked for, and leave no graphs to the next page."""
    import torch

    import fastft.graph.compile as module

    real = module.compile

    def compile(model, *args, backend="eager", **kwargs):
        assert backend in BACKENDS
        return real(model, *args, backend="eager", **kwargs)

    monkeypatch.setattr(module, "compile", compile)
    yield
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()


@pytest.mark.parametrize("page", [name for name in PAGES if BLOCKS[name] and name not in INDUCTOR])
def test_pages_run(page, tmp_path, monkeypatch, own_registry, not_lowered, capsys):
    space = run_blocks(page, tmp_path, monkeypatch)
    if page.endswith("verify.md"):
        assert space["checked"].ok
    if page.endswith("resume.md"):
        said = capsys.readouterr().out.splitlines()
        assert len([line for line in said if line.startswith("((1, ")]) == 2


@pytest.mark.parametrize("page", ["docs/how-to/packing.md", "docs/how-to/evaluate.md"])
def test_pages_show_what_their_first_block_prints(page, tmp_path, monkeypatch, own_registry, not_lowered, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[page][0], page, "exec"), {"__name__": "page"})
    shown = next(code for kind, code in FENCE.findall(PAGES[page]) if kind == "text")
    assert shown.splitlines() == capsys.readouterr().out.splitlines()[-len(shown.splitlines()) :]


def test_tutorial_shows_what_fastft_env_prints(monkeypatch, capsys):
    """Its last lines on a machine with triton and without a GPU."""
    from fastft.cli import env, main

    monkeypatch.setattr(env, "_gpus", lambda *_: ([], "this torch is built for CPUs only"))
    monkeypatch.setattr(env, "installed", lambda _: True)
    monkeypatch.setattr(env, "triton_interpreted", lambda: False)
    assert main.main(["env"]) == 0
    printed = capsys.readouterr().out
    text = part("docs/tutorial/first-fine-tune.md", "## 1. Install")
    shown = next(code for kind, code in FENCE.findall(text) if kind == "text")
    assert shown == printed[printed.index("gpus:") :]


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("page", INDUCTOR)
def test_readme_and_tutorial_run(page, tmp_path, monkeypatch):
    with contextlib.redirect_stdout(None):
        space = run_blocks(page, tmp_path, monkeypatch)
    losses = [loss for _, loss in space["result"].losses]
    assert losses[-1] < losses[0] / 5
    report = fastft.report(space["model"])
    assert not report.refused()
    if "question" in space:  # numbers of nodes depend on torch, what was replaced does not
        for line in str(report).splitlines():
            assert line.split("nodes;")[-1].strip() in PAGES[page], line
    if "question" in space:
        assert fastft.generate(space["again"], space["tokenizer"], space["question"]) == ["Twice 33 is 66, of course."]


@pytest.mark.slow
def test_the_checked_spec_is_the_one_shown(tmp_path):
    """What the page on families says of `registry check`, for its spec and for the one with a wrong offset."""
    from fastft.graph.check import check_spec
    from fastft.registry.convert import load_spec_file

    text = re.search(r"<!-- file: .*?```toml\n(.*?)```", PAGES["docs/how-to/add-a-model-family.md"], re.DOTALL)[1]
    for name, content in (("right", text), ("wrong", text.replace("[[norms]]\n", "[[norms]]\noffset = 1.0\n"))):
        (tmp_path / f"{name}.toml").write_text(content, encoding="utf-8")
    assert check_spec(load_spec_file(tmp_path / "right.toml")).ok
    failed = [claim for claim in check_spec(load_spec_file(tmp_path / "wrong.toml")).claims if not claim.ok]
    assert [claim.what for claim in failed] == ["llama float32: norm regions", "llama bfloat16: norm regions"]
