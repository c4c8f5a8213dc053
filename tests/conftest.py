"""Settings for every test: few threads, no network, and uninitialised memory that shows."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fill what `torch.empty` and its kin return with NaN, so that a kernel that leaves a tail unwritten fails."""
    import torch

    def poison(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            real = not isinstance(out, torch._subclasses.FakeTensor)
            return out.fill_(float("nan")) if real and out.is_floating_point() else out

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
