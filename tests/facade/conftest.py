"""The shipped demo model (4.5 M parameters, tied head) and compilation without Inductor, which is slow on a CPU."""

from functools import partial

import pytest

from fastft.demo import MODEL_FOLDER


@pytest.fixture
def folder():
    return str(MODEL_FOLDER)


@pytest.fixture
def aot_eager(monkeypatch):
    import fastft.graph.compile as module

    monkeypatch.setattr(module, "compile", partial(module.compile, backend="aot_eager"))
