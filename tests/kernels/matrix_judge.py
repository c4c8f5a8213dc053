"""What the tests of the matrix kernels share: a judge of errors.

Loaded by path (`importlib`), since test folders are no packages.
"""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rms_ratio(value, truth):
    """Return ||value - truth|| / ||truth|| in fp64; NaN counts as infinite."""
    value, truth = value.detach().double(), truth.detach().double()
    assert value.shape == truth.shape, (value.shape, truth.shape)
    error, size = (value - truth).norm().item(), truth.norm().item()
    ratio = error / size if size else error
    return ratio if ratio == ratio else float("inf")


def assert_within(name, value, eager, truth, slack=1.0, floor=0.0):
    """Fail unless the error of `value` against `truth` is at most that of `eager`, the same dtype by plain torch.

    slack: a factor on that budget, for sums that a fused op makes in another order. floor: the least budget, for
    cases in which eager happens to be exact.
    """
    got, budget = rms_ratio(value, truth), max(slack * rms_ratio(eager, truth), floor)
    assert got <= budget, f"{name}: error {got:.3e} exceeds {budget:.3e}"
