"""Code against tests: the share that passes; what cheats, hangs or breaks gets nothing."""

import threading

import pytest

from fastft.errors import DataError, UsageError
from fastft.rewards import Limits, code, programs, sandbox

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
    tests = ["assert add(1, 1) == 2", "while True: pass", "assert add(1, 1) == 2"]
    for seconds in (1.5, 6, 24):  # on a busy machine a program may not get to its first test sooner
        found = score(code(limits=Limits(seconds=seconds), isolation=isolation), RIGHT, tests=tests)
        if found != [0.0]:
            break
    assert found == [1 / 3]


def test_printing_without_end_costs_nothing_but_time(isolation):
    noisy = RIGHT + "print('x' * 10_000_000)\n"
    assert score(code(isolation=isolation), noisy) == [2 / 3]


def test_rows_run_beside_each_other(isolation, monkeypatch):
    """Each of eight waits for the other seven to be there."""
    together, run = threading.Barrier(8, timeout=120), programs.run

    def meeting(*arguments, **options):
        together.wait()
        return run(*arguments, **options)

    monkeypatch.setattr(programs, "run", meeting)
    reward = code(limits=Limits(seconds=60), workers=8, isolation=isolation)
    assert score(reward, *[RIGHT] * 8) == [2 / 3] * 8


def test_wrong_use(monkeypatch):
    for arguments in ({"isolation": "some"}, {"workers": 0}):
        with pytest.raises(UsageError):
            code(**arguments)
    monkeypatch.setattr(sandbox, "_way", lambda: sandbox._Way(False, None, ("the network",)))
    with pytest.raises(UsageError, match="the network"):
        code()
    assert code(isolation="limits").__name__ == "code"
