"""Bars of `datasets` are shown where there is something to wait for, and the user's own switch is left alone."""

import pytest
from datasets import Dataset, config, disable_progress_bars, enable_progress_bars
from datasets.utils import are_progress_bars_disabled

from fastft.data.bars import bars_if_large
from fastft.data.pipeline import LARGE

FEW, MANY = Dataset.from_dict({"a": [1, 2]}), range(LARGE)


@pytest.fixture(autouse=True)
def shown():
    enable_progress_bars()
    yield
    enable_progress_bars()


@pytest.mark.parametrize(
    ("data", "hidden"),
    [
        ([FEW], True),
        ([FEW, None], True),
        ([{"a": FEW, "b": FEW}], True),
        ([MANY], False),
        ([FEW, MANY], False),
        ([{"a": FEW, "b": MANY}], False),
        ([iter([1])], False),
    ],
    ids=["few", "none", "several", "many", "few and many", "many among several", "unknown"],
)
def test_hidden_for_few_rows(data, hidden, capsys):
    with bars_if_large(*data):
        assert are_progress_bars_disabled() is hidden
        FEW.map(lambda row: {"b": 1}, load_from_cache_file=False)
    assert ("Map" in capsys.readouterr().err) is not hidden
    assert not are_progress_bars_disabled()


def test_the_users_switches_stay(monkeypatch):
    disable_progress_bars()
    with bars_if_large(MANY):
        assert are_progress_bars_disabled()
    assert are_progress_bars_disabled()
    enable_progress_bars()
    monkeypatch.setattr(config, "HF_DATASETS_DISABLE_PROGRESS_BARS", False)
    with bars_if_large(FEW):
        assert not are_progress_bars_disabled()


def test_shown_again_after_an_error():
    with pytest.raises(KeyError), bars_if_large(FEW):
        raise KeyError
    assert not are_progress_bars_disabled()
