"""The shipped demo model (4.5 M parameters, tied head)."""

import pytest

from fastft.demo import MODEL_FOLDER


@pytest.fixture
def folder():
    return str(MODEL_FOLDER)
