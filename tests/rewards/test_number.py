"""Numbers as models write them: read exactly, or not at all."""

import time
from decimal import Decimal
from fractions import Fraction

import pytest

from fastft.errors import DataError, UsageError
from fastft.rewards import code, expression, number
from fastft.rewards.numbers import read_number

READ = {
    "$1,234.50": "1234.5",
    "That is $1,234.50.": "1234.5",
    "-$5": "-5",
    "$-5.25": "-5.25",
    "5-3 = 2.": "2",
    "a-3": "3",
    "x = -3": "-3",
    "x = - 3": "-3",
    "(3)-4": "4",
    r"\boxed{\frac{1}{2}}": "1/2",
    r"\boxed{-\dfrac12} or 7": "-1/2",
    r"\boxed{1\frac{3}{4}}": "7/4",
    r"\boxed{\text{about } 5\text{ cm}}": "5",
    r"\boxed{\boxed{3}}": "3",
    r"\boxed{1{,}234}": "1234",
    r"\boxed{90^\circ}": "90",
    "$5$": "5",
    "1 1/2 cups": "3/2",
    "1\u00bd cups": "3/2",
    "\u2212\u00bd": "-1/2",
    "1\u20442": "1/2",
    "\u0663\u0664": "34",
    "\uff11\uff12": "12",
    "10\u00b2": "100",
    "10\u207b\u00b2": "1/100",
    "2^10": "1024",
    r"3 \times 10^{8}": "300000000",
    "6.02\u00d710^23": "602000000000000000000000",
    "1.5e-3": "3/2000",
    ".5": "1/2",
    "1\u202f234\u202f567": "1234567",
    "1'000": "1000",
    "5kg": "5",
    "first 3, then <answer> -7 </answer> and 99": "-7",
    "<answer>1</answer> no: <answer>2</answer>": "2",
    "<answer>1</answer> <answer> unclosed 2": "1",
    "12 + 30 = 42\n#### 42\n": "42",
}
NOT_READ = [
    "",
    "nan",
    "inf",
    "1,23",
    "12,34,567",
    "1.2.3",
    "H2O and x2",
    "\u00b2",
    "1/0",
    "0^-1",
    "9^9^9^9",
    "9^99999",
    "1e999999",
    "9" * 5000,
    r"\boxed{\frac{\pi}{2}}",
    r"\boxed{2\sqrt{3}}",
    r"\boxed{",
    r"\boxed{} but 5",
]


@pytest.mark.parametrize(("text", "value"), READ.items())
def test_what_is_read(text, value):
    assert read_number(text).value == Fraction(value)


@pytest.mark.parametrize("text", NOT_READ)
def test_what_is_not_read(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("text", "wanted", "reward"),
    [
        ("1,000", 1000, 1.0),
        ("0.1", 0.1, 1.0),  # as it is written, not the binary fraction nearest to it
        ("0.3", Decimal("0.3"), 1.0),
        ("1/3", Fraction(1, 3), 1.0),
        ("12345678901234567891", "12345678901234567890", 0.0),
        ("50%", 0.5, 1.0),
        ("50%", 50, 1.0),
        (r"50\%", "0.5", 1.0),
        ("50", "50%", 1.0),
        ("5", "50%", 0.0),
        ("42", "6 * 7 = 42\n#### 42", 1.0),
        ("nothing", 1, 0.0),
        ([{"role": "user", "content": "1"}, {"role": "assistant", "content": "it is 2"}], 2, 1.0),
        ([{"role": "assistant", "content": [{"type": "text", "text": "2"}]}], 2, 1.0),
        ([{"role": "assistant", "content": None, "tool_calls": []}], 2, 0.0),
        ("2", None, None),
    ],
)
def test_rewards(text, wanted, reward):
    assert number()(prompts=["?"], completions=[text], answer=[wanted]) == [reward]


def test_tolerance_is_relative_above_one_and_absolute_below():
    reward = number("gold", tolerance=0.01)
    texts, gold = ["3.14", "3.1", "101", "102", "0.009", "0.011"], [3.14159, 3.14159, 100, 100, 0, 0]
    assert reward(prompts=[""] * 6, completions=texts, gold=gold) == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("wanted", [float("nan"), float("inf"), "none of it", True, [1]])
def test_a_column_that_is_no_number(wanted):
    with pytest.raises(DataError, match="row 1: column 'answer'"):
        number()(prompts=["", ""], completions=["1", "1"], answer=[1, wanted])


def test_wrong_use():
    with pytest.raises(UsageError, match=r"number: column.*'label'"):
        number()(prompts=[""], completions=["1"], label=[1])
    with pytest.raises(UsageError, match="tolerance"):
        number(tolerance=float("nan"))


PIECES = ["1", "1,", "-", r"\boxed{", "1 ", "<answer>", "10^", r"\frac{", "e1", "1/", "####", "{", "\u00bd", "\u00b2"]


@pytest.mark.parametrize("piece", PIECES)
def test_long_texts_take_time_in_proportion(piece):
    started = time.process_time()
    read_number(piece * (200_000 // len(piece)))
    assert time.process_time() - started < 5  # squared it would be minutes


@pytest.mark.parametrize("column", [5, None, ""])
def test_a_column_is_a_text(column):
    with pytest.raises(UsageError) as caught:
        number(column, tolerance=2.0)
    assert [problem.where for problem in caught.value.problems] == ["column", "tolerance"]
    assert f"column: expected the name of a column, a text, got {column!r}" in str(caught.value)
    with pytest.raises(UsageError, match="tests: expected the name of a column"):
        code(column, isolation="limits")
    with pytest.raises(UsageError, match="column: expected the name of a column"):
        expression(column)
