"""The layers of fastft: who may import whom, and what no file may do."""

import ast
import sys
from pathlib import Path

import pytest

import fastft

ROOT = Path(fastft.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8")) for path in FILES}

BOTTOM = {"errors", "given", "state", "environment", "noise"}
LOW = BOTTOM | {"registry", "kernels", "memory"}
MIDDLE = {"model", "data"}
# layer -> the layers of fastft that it may import besides itself; a layer that is not named may import all
ALLOWED = {
    "errors": set(),
    "environment": set(),
    "given": {"errors"},
    "noise": set(),
    "registry": {"errors"},
    "state": {"registry"},
    "kernels": {"errors", "environment"},
    "graph": LOW,
    "memory": BOTTOM | {"registry"},
    "model": LOW | {"graph"} | MIDDLE,
    "data": LOW | {"graph"} | MIDDLE,
    "rollout": LOW | {"graph"} | MIDDLE,
    "rewards": {"errors", "environment"},
    "train": LOW | {"graph", "rollout", "rewards"} | MIDDLE,
}
# layer -> the packages outside the standard library that it may import (attrs for records, launch settings among them)
OUTSIDE = {
    "__init__": set(),
    "errors": {"attrs"},
    "environment": set(),
    "given": set(),
    "noise": set(),
    "registry": {"attrs", "cattrs"},
    "state": {"attrs"},
    "rewards": {"attrs", "jsonschema", "referencing", "math_verify"},
    "kernels": {"attrs", "torch", "triton"},
}


def layer_of(file):
    return file.split("/")[0].removesuffix(".py")


def imports(tree):
    """Yield (module, line, at the top of the file) of every import."""
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            # `from fastft import x` may name a submodule
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, node.lineno, id(node) in top


def crossings(file, tree):
    layer = layer_of(file)
    if layer not in ALLOWED:
        return []
    found = []
    for name, line, _ in imports(tree):
        parts = name.split(".")
        if parts[0] == "fastft" and len(parts) > 1 and parts[1] not in {*ALLOWED[layer], layer}:
            found.append(f"{file}:{line} imports {name}")
    return found


def foreign(file, tree):
    layer = layer_of(file)
    if layer not in OUTSIDE:
        return []
    allowed = {*sys.stdlib_module_names, "fastft", *OUTSIDE[layer]}
    return [f"{file}:{line} imports {name}" for name, line, _ in imports(tree) if name.split(".")[0] not in allowed]


def forbidden(file, tree):
    """Return what runs text as code, looks at source text, or touches the environment."""
    found = []
    for node in ast.walk(tree):
        name = ""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.func.id if node.func.id in ("exec", "eval", "compile", "getsource", "getsourcelines") else ""
            if name == "compile" and any(isinstance(part, ast.FunctionDef) and part.name == name for part in tree.body):
                name = ""  # a function of the module's own
        elif isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id in ("inspect", "os", "builtins"):
                name = node.attr
        elif isinstance(node, ast.ImportFrom) and node.module in ("os", "inspect", "builtins"):
            names = {alias.name for alias in node.names} & FORBIDDEN
            name = min(names) if names else ""
        if name in ENVIRONMENT and file == "environment.py":
            continue
        if name in FORBIDDEN:
            found.append(f"{file}:{node.lineno} uses {name}")
    return found


ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
FORBIDDEN = {"exec", "eval", "compile", "getsource", "getsourcelines", *ENVIRONMENT}


@pytest.mark.parametrize("file", TREES)
def test_imports_point_down(file):
    assert crossings(file, TREES[file]) == []


@pytest.mark.parametrize("file", TREES)
def test_lower_layers_import_only_their_packages(file):
    assert foreign(file, TREES[file]) == []


@pytest.mark.parametrize("file", TREES)
def test_nothing_runs_text_or_touches_the_environment(file):
    assert forbidden(file, TREES[file]) == []


@pytest.mark.parametrize("file", [file for file in TREES if layer_of(file) == "cli"])
def test_commands_import_nothing_heavy_at_the_top(file):
    light = {"registry", "errors", "environment", "cli", "__version__"}
    for name, line, top in imports(TREES[file]):
        parts = name.split(".")
        if top and parts[0] == "fastft":
            assert parts[1] in light, f"{file}:{line} imports {name} at the top"
        elif top:
            assert parts[0] in {*sys.stdlib_module_names, "typer", "attrs"}, f"{file}:{line} imports {name} at the top"


def writes(tree):
    """Return the functions of a file that change the environment; "" stands for the file itself."""
    found = set()
    for part in tree.body:
        for node in ast.walk(part):
            if isinstance(node, ast.Attribute) and node.attr in {"putenv", "unsetenv", "setdefault", "update", "clear"}:
                found.add(getattr(part, "name", ""))
            stored = isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load)
            popped = isinstance(node, ast.Attribute) and node.attr == "pop"
            if stored or popped or (isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load)):
                found.add(getattr(part, "name", ""))
    return found


def test_environment_is_only_read_but_where_vllm_starts():
    assert writes(TREES["environment.py"]) == {"vllm_environment"}
    assert writes(ast.parse("import os\nos.environ['A'] = '1'")) == {""}
    assert writes(ast.parse("def f():\n    os.environ.pop('A')")) == {"f"}


@pytest.mark.parametrize(
    ("check", "file", "source"),
    [
        (crossings, "registry/x.py", "from fastft.kernels import rms_norm"),
        (crossings, "kernels/x.py", "def f():\n    from fastft import graph"),
        (crossings, "graph/x.py", "import fastft.train.sft.trainer"),
        (foreign, "registry/x.py", "import torch"),
        (foreign, "kernels/a/x.py", "from transformers import AutoModel"),
        (foreign, "errors.py", "import rich"),
        (forbidden, "train/x.py", "exec('1')"),
        (forbidden, "train/x.py", "eval('1')"),
        (forbidden, "train/x.py", "import inspect\ninspect.getsource(f)"),
        (forbidden, "train/x.py", "from inspect import getsource"),
        (forbidden, "train/x.py", "import os\nos.environ['A'] = '1'"),
        (forbidden, "train/x.py", "from os import environ"),
        (forbidden, "train/x.py", "import os\nos.getenv('A')"),
    ],
)
def test_the_checks_can_fail(check, file, source):
    assert len(check(file, ast.parse(source))) == 1
