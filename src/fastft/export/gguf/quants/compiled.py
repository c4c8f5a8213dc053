"""The inner steps of the searches compiled by `torch.compile` for the CPU, taken only if they give the same bits."""

import logging
import warnings
from functools import cache, partial

import torch

from fastft.export.gguf.quants.search import PLAIN, Steps, affine_step, descend_step, symmetric_step, table_step

_log = logging.getLogger(__name__)
# Chunks of one size compile once. Not a power of two: rows of one would fall on the same lines of the cache.
_CHUNK = 256 * 1032


@cache
def compiled_steps() -> Steps:
    """Return the compiled steps."""
    def compiled(step):
        return torch.compile(step, fullgraph=True, dynamic=False)

    return Steps(
        compiled(partial(affine_step, fused=True)),
        compiled(partial(symmetric_step, fused=True)),
        compiled(descend_step),
        compiled(partial(table_step, fused=True)),
        chunk=_CHUNK,
        fixed=True,
    )
