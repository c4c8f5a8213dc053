r"""Reward for a number, in whatever way it is written: $1,234.50, 50%, -1/2, 1 1/2, \frac{1}{2}, 3 x 10^8."""

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from numbers import Real
from typing import Any

from attrs import frozen

from fastft.errors import DataError, Problem, UsageError
from fastft.rewards.making import Reward, against_column, column_problems
from fastft.rewards.text import answer_of

_LONGEST = 400  # characters of one number; what is longer is none, as huge numbers cost time and memory
_BODY = r"(?:\d|\.\d)[\d.,]*(?:[eE][+-]?\d+)?"
_NUMBER = re.compile(
    rf"""(?P<sign>(?<![\w)\]}}])[+-][ ]?)?(?:[$\u20ac\u00a3\u00a5\u20b9][ ]?(?P<inner>-)?)?(?<![\w.])
    (?: (?P<whole>\d+)[ ]{{1,2}}(?P<part>\d+)[ ]?/[ ]?(?P<parts>\d+)
      | (?P<above>{_BODY})[ ]?/[ ]?(?P<below>{_BODY})
      | (?P<body>{_BODY})(?:[ ]?\^[ ]?\{{?(?P<power>[+-]?\d+)\}}?)? )
    (?P<percent>[ ]?(?:%|percent\b))?(?P<more>[ ]?\^)?""",
    re.VERBOSE,
)
_DECIMAL = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?")
_SUPERSCRIPTS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
_COMMAND = re.compile(r"\\[A-Za-z]+")
# Spellings of the same thing; in this order.
_SPELLINGS = (
    (re.compile("[\u2212\u2013\ufe63\uff0d\u2010\u2011]"), "-"),
    (re.compile("\u2044"), "/"),
    (re.compile(r"\\([%$#&])"), r"\1"),
    (re.compile(r"(?<=\d)(?:\{,\}|\\[,;:! ]|[\u00a0\u2009\u202f'](?=\d{3}(?!\d)))(?=\d)"), ","),
    (re.compile(r"\\[,;:! ]|[\u00a0\u2009\u202f]"), " "),
    (re.compile(r"\\(?:left|right|big|Big|displaystyle)\b"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf|operatorname)[ ]?\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"(?<=\d)[ ]?\\frac"), r" \\frac"),
    (re.compile(r"\\frac[ ]?(?:\{[ ]?([+-]?[\d.,]+)[ ]?\}|(\d))[ ]?(?:\{[ ]?([\d.,]+)[ ]?\}|(\d))"), r"\1\2/\3\4"),
    (re.compile(r"[ ]?(?:\u00d7|\\times|\\cdot|\*|x)[ ]?10[ ]?(?:\^|\*\*)[ ]?\{?([+-]?\d+)\}?"), r"e\1"),
    (re.compile(r"\*\*(?=[ ]?[+-]?\d)"), "^"),
    (re.compile(r"\\circ\b|\^\{?\\circ\}?|\u00b0"), " "),
)


@frozen
class Written:
    """A number as it was written: its value, and whether a percent sign stood behind it (the value is before it)."""

    value: Fraction
    percent: bool = False

    @property
    def readings(self) -> tuple[Fraction, ...]:
        """Return what it may mean: 50% is 50 or 1/2."""
        return (self.value, self.value / 100) if self.percent else (self.value,)


def number(column: str = "answer", *, tolerance: float = 0.0, name: str = "number") -> Reward:
    r"""Return a reward of 1 for texts whose answer is the number in the row's `column`, and 0 for others.

    The answer is the last number in the last of \boxed{...}, <answer>...</answer> or "#### ...", and of the whole
    text where there is none of them. It may have thousands separators, a sign, a currency, an exponent, a percent
    sign (50% equals 50 and 0.5), or be a fraction or mixed number, in LaTeX too, with digits of any script. "1,23",
    "1.234.567" and numbers of more than 400 characters are read as no number.

    Values are compared exactly, as fractions: |answer - wanted| <= tolerance * max(1, |wanted|).
    The column may hold numbers, or texts that are read in the same way; where it is None so is the reward.

    Raises `DataError` for a row whose column is no number.
    """
    problems = column_problems("column", column)
    if not 0 <= tolerance < 1:
        problems.append(Problem("tolerance", tolerance, "a number from 0 to below 1"))
    if problems:
        raise UsageError(*problems)
    allowed = Fraction(str(tolerance))

    def score(text: str, wanted: Any) -> float:
        right = _wanted(wanted, column)
        found = read_number(text)
        if found is None:
            return 0.0
        near = (abs(a - b) <= allowed * max(Fraction(1), abs(b)) for a in found.readings for b in right.readings)
        return float(any(near))

    return against_column(name, column, score)


def read_number(text: str) -> Written | None:
    """Return the last number of a text's answer, or of the text without one; None if there is none or it is unclear."""
    answer = answer_of(text)
    plain = _plain(text if answer is None else answer)
    last, tower = None, False
    for match in _NUMBER.finditer(plain):
        tower = last is not None and bool(last["more"]) and last.end() == match.start()  # 9^9^9
        last = match
    if last is None or tower or (answer is not None and _COMMAND.search(plain)):
        return None  # \frac{\pi}{2} is not 2
    return _value(last)


def _wanted(value: Any, column: str) -> Written:
    problem = Problem(f"column {column!r}", value, "a number, or a text that ends with one")
    if isinstance(value, bool):
        raise DataError(problem)
    try:
        if isinstance(value, int | Fraction | Decimal):
            return Written(Fraction(value))
        if isinstance(value, Real):
            return Written(Fraction(repr(float(value))))
    except (ValueError, OverflowError) as error:  # NaN and infinities
        raise DataError(problem) from error
    found = read_number(value) if isinstance(value, str) else None
    if found is None:
        raise DataError(problem)
    return found


def _plain(text: str) -> str:
    """Return the text in plain spelling: ASCII digits, fractions with a slash, powers of ten as exponents."""
    if not text.isascii():
        text = re.sub(r"(?<=[\d)])[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+", _raised, text)
        text = "".join(map(_ascii, text))
    for spelling, plain in _SPELLINGS:
        text = spelling.sub(plain, text)
    return text


def _raised(match: re.Match[str]) -> str:
    return "^" + match[0].translate(_SUPERSCRIPTS)


def _ascii(character: str) -> str:
    if character.isascii():
        return character
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if unicodedata.category(character) == "No" and "<fraction>" in unicodedata.decomposition(character):
        return " " + unicodedata.normalize("NFKC", character)
    return character


def _value(match: re.Match[str]) -> Written | None:
    if len(match[0]) > _LONGEST or match["more"]:
        return None
    if match["whole"]:
        parts = int(match["parts"])
        value = int(match["whole"]) + Fraction(int(match["part"]), parts) if parts else None
    elif match["above"]:
        above, below = _decimal(match["above"]), _decimal(match["below"])
        value = above / below if above is not None and below else None
    else:
        value = _raise(_decimal(match["body"]), match["power"])
    if value is None:
        return None
    negative = ((match["sign"] or "").strip() == "-") != bool(match["inner"])
    return Written(-value if negative else value, bool(match["percent"]))


def _decimal(text: str) -> Fraction | None:
    text = text.rstrip(".,")
    _, _, exponent = text.lower().partition("e")
    if not _DECIMAL.fullmatch(text) or len(exponent.lstrip("+-")) > 3:
        return None
    return Fraction(text.replace(",", ""))


def _raise(base: Fraction | None, power: str | None) -> Fraction | None:
    if base is None or not power:
        return base
    if len(power) > 5 or (base == 0 and int(power) < 0):
        return None
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    return base ** int(power) if bits * abs(int(power)) <= 8192 else None
