"""Code against tests: the share that passes; what cheats, hangs or breaks gets nothing."""

import time

import pytest

from fastft.errors import DataError, UsageError
from fastft.rewards import Limits, code, sandbox

TESTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 1", "import math\nassert add(math.inf, 1) == math.inf"]
RIGHT = "def add(a, b):\n    return a + b\n"


@pytest.fixture(scope="module")
def isolation():
    return "limits" if sandbox.missing() else "full"


def score(reward, *texts, tests=TESTS):
    return reward(prompts=[""] * len(texts), completions=list(texts), tests=[tests] * len(texts))


def test_shares(isolation):
    answer = [
        {"role": "assistant", "content": f"Two ways.\n```python\nboom\n```\nBetter:\n```python\n{RIGHT}```\nDone"}
    ]
    texts = [RIGHT, f"```\n{RIGHT}```", answer, "def add(a, b): return 1", "def add(", ""]
    assert score(code(isolation=isolation), *texts) == [2 / 3, 2 / 3, 2 / 3, 1 / 3, 0.0, 0.0]


def test_columns(isolation):
    reward = code("checks", isolation=isolation)
    rows = {"prompts": [""] * 3, "completions": [RIGHT] * 3}
    assert reward(**rows, checks=["assert add(1, 1) == 2", None, ("assert False",)]) == [1.0, None, 0.0]
    for wrong in (7, [], [1]):
        with pytest.raises(DataError, match="row 1: column 'checks'"):
            reward(**rows, checks=["pass", wrong, "pass"])
    with pytest.raises(UsageError, match=r"code: column.*'checks'"):
        reward(**rows, tests=["pass"] * 3)


@pytest.mark.parametrize(
    "text",
    [
        "import os\nos._exit(0)",
        "raise SystemExit(0)",
        "def add(a, b): raise SystemExit(0)",
        "print('0\\n1\\n2')\nimport os\nos.write(1, b'0\\n1\\n2\\n')\nos._exit(0)",
        "import os\nfor name in os.listdir('.'): os.unlink(name)",
        "import glob\nfor name in glob.glob('test*.py'): open(name, 'w').write('pass')",
        "import os, shutil\nshutil.copy('secret', 'x')",
        "import builtins\nbuiltins.AssertionError = None\n1/0",
    ],
    ids=["exit", "SystemExit", "exit in a test", "print", "delete tests", "rewrite tests", "read the secret", "raise"],
)
def test_cheats(text, isolation):
    assert score(code(isolation=isolation), text) == [0.0]


def test_what_passed_before_the_time_limit_counts(isolation):
    reward = code(limits=Limits(seconds=1.5), isolation=isolation)
    tests = ["assert add(1, 1) == 2", "while True: pass", "assert add(1, 1) == 2"]
    assert score(reward, RIGHT, tests=tests) == [1 / 3]


def test_printing_without_end_costs_nothing_but_time(isolation):
    noisy = RIGHT + "print('x' * 10_000_000)\n"
    assert score(code(isolation=isolation), noisy) == [2 / 3]


def test_rows_run_beside_each_other(isolation):
    started = time.monotonic()
    reward = code(limits=Limits(seconds=1), workers=8, isolation=isolation)
    assert score(reward, *["import time\ntime.sleep(60)"] * 8) == [0.0] * 8
    assert time.monotonic() - started < 20


def test_wrong_use(monkeypatch):
    for arguments in ({"isolation": "some"}, {"workers": 0}):
        with pytest.raises(UsageError):
            code(**arguments)
    monkeypatch.setattr(sandbox, "_way", lambda: sandbox._Way(False, None, ("the network",)))
    with pytest.raises(UsageError, match="the network"):
        code()
    assert code(isolation="limits").__name__ == "code"
