"""Expressions in LaTeX, compared by math-verify; text that would compute for ever costs its row and no more."""

import pytest

from fastft.errors import DataError, UsageError
from fastft.rewards import expression


def score(*rows, **options):
    texts, answers = zip(*rows)
    return expression(**options)(prompts=[""] * len(rows), completions=list(texts), answer=list(answers))


def test_equal_and_not():
    pytest.importorskip("math_verify", reason="math-verify is not installed: expressions are not compared")
    rows = [
        (r"so \boxed{\frac{1}{2}}", "0.5"),
        (r"so \boxed{\frac{1}{3}}", "0.5"),
        ("<answer>x^2+2x+1</answer>", "(x+1)^2"),
        (r"$\{2,1\}$", r"\{1,2\}"),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}"),
        ("no idea", "5"),
        ("7", None),
        ([{"role": "assistant", "content": r"\boxed{7}"}], 7),
    ]
    assert score(*rows, seconds=60) == [1.0, 0.0, 1.0, 1.0, 1.0, 0.0, None, 1.0]


def test_adversarial_text_is_not_equal_and_ends_in_time():
    pytest.importorskip("math_verify", reason="math-verify is not installed: expressions are not compared")
    rows = [(r"\boxed{9^{9^{9^{9}}}}", "5"), (r"\boxed{" + "(" * 5000 + "}", "5"), (r"\boxed{5}", "5")]
    for seconds in (2, 10, 50):  # a busy machine may need more than two for the row that is right
        found = score(*rows, seconds=seconds)
        if found[2]:
            break
    assert found == [0.0, 0.0, 1.0]


def test_a_column_that_cannot_be_read():
    pytest.importorskip("math_verify", reason="math-verify is not installed: expressions are not compared")
    with pytest.raises(DataError, match="row 1: column 'answer'"):
        score((r"\boxed{5}", "5"), (r"\boxed{5}", ""))


def test_wrong_use(monkeypatch):
    monkeypatch.setattr("fastft.rewards.expressions.installed", lambda package: False)
    with pytest.raises(UsageError, match=r"math-verify.*fastft\[rewards\]"):
        expression()
    monkeypatch.setattr("fastft.rewards.expressions.installed", lambda package: True)
    with pytest.raises(UsageError, match="seconds"):
        expression(seconds=0)
