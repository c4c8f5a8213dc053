"""The text of an error: every mistake is named, and what to do about several that are alike is said once."""

import pickle

import pytest

from fastft.cli.main import main
from fastft.demo import MODEL_FOLDER
from fastft.errors import DataError, FastftError, Problem, UsageError

EMPTY, NAME = "Give it text.", "did you mean 'text'?"
FIRST, SECOND = Problem("row 1", "", "a text", EMPTY), Problem("row 4", None, "a text (str)", EMPTY)
ALONE, BARE = Problem("row 2", "txt", "'text'", NAME), Problem("row 3", 3, "a dict")


def test_a_remedy_of_several_mistakes_is_told_once_behind_them():
    error = DataError(FIRST, ALONE, BARE, SECOND, "and 3 more rows", BARE)
    assert (
        str(error).splitlines()
        == error.lines()
        == [
            "row 1: expected a text, got ''",
            "row 4: expected a text (str), got None",
            "For these 2: Give it text.",
            "row 2: expected 'text', got 'txt'. did you mean 'text'?",
            "row 3: expected a dict, got 3",
            "and 3 more rows",
            "row 3: expected a dict, got 3",
        ]
    )
    assert error.problems == (FIRST, ALONE, BARE, SECOND, "and 3 more rows", BARE)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("kind", [FastftError, UsageError])
def test_single_mistakes_come_with_what_to_do(kind):
    assert str(kind(FIRST)) == "row 1: expected a text, got ''. Give it text."
    error = kind(FIRST, SECOND)
    error.tell(ALONE, FIRST)
    assert error.lines() == [str(ALONE), str(FIRST)]


def test_the_command_line_tells_the_same_lines(tmp_path, capsys):
    path = tmp_path / "rows.json"
    path.write_text('[{"text": "a"}, 3, 4]')
    assert main(["preview", str(path), "--model", str(MODEL_FOLDER)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"error: {path}, row 1: expected a JSON object, one row, got 3",
        f"error: {path}, row 2: expected a JSON object, one row, got 4",
        "error: For these 2: A row has its fields by name.",
    ]
