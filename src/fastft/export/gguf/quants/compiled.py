"""The inner steps of the searches compiled by `torch.compile` for the CPU, taken only if they give the same bits."""

import logging
import shutil
from functools import cache, partial

import torch
from torch import Tensor

from fastft.export.gguf.quants.search import (
    PLAIN,
    Step,
    Steps,
    affine_step,
    descend_step,
    symmetric_step,
    table_step,
)

_log = logging.getLogger(__name__)
# Chunks of one size compile once. Not a power of two: rows of one would fall on the same lines of the cache.
_CHUNK = 256 * 1032
_COMPILERS = ("g++", "c++", "clang++", "cl")


def can_compile() -> bool:
    """Say whether a C++ compiler is here, which `torch.compile` needs on a CPU."""
    return any(shutil.which(name) for name in _COMPILERS)


@cache
def compiled_steps() -> Steps:
    """Return the compiled steps, and the plain ones where there is no C++ compiler; nothing is compiled yet.

    A step compiles when it is first called, and its first results are compared with the plain step's. One that differs
    in a bit is replaced by the plain one from then on, and a warning says so.
    """
    if not can_compile():
        _log.warning("no C++ compiler found: quantising with the plain steps, which are several times slower")
        return PLAIN
    return Steps(
        _checked(affine_step, fused=True),
        _checked(symmetric_step, fused=True),
        _checked(descend_step),
        _checked(table_step, fused=True),
        chunk=_CHUNK,
        fixed=True,
    )


def _checked(plain: Step, **options: bool) -> Step:
    """Return `plain` compiled; the first result for every shape is compared with that of `plain` itself.

    Where compiling fails (a compiler without the headers it needs, say), `plain` is taken from then on.
    """
    # `plain` itself, not a partial of it: Dynamo counts versions by code, and all partials are the same code to it
    compiled = partial(torch.compile(plain, fullgraph=True, dynamic=False), **options)
    right: dict[tuple[int, ...], bool] = {}

    def step(x: Tensor, *arguments: object) -> tuple[Tensor, ...]:
        shape = tuple(x.shape)
        if shape in right:
            return (compiled if right[shape] else plain)(x, *arguments)
        expected = plain(x, *arguments)
        try:
            right[shape] = all(map(_same_bits, compiled(x, *arguments), expected))
        except torch._dynamo.exc.TorchDynamoException as error:
            right[shape] = False
            why = str(error).strip().partition("\n")[0]
            _log.warning("%s cannot be compiled and runs plain, which is several times slower: %s", plain.__name__, why)
            return expected
        if not right[shape]:
            _log.warning("compiled %s differs from the plain one for shape %s and is not used", plain.__name__, shape)
        return expected

    return step


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Compare fp32 numbers bit by bit; NaN equals any NaN."""
    both_nan = one.isnan() & other.isnan()
    return bool((both_nan | (one.view(torch.int32) == other.view(torch.int32))).all())
