"""The arguments of `fastft.compile`: what is wrong with them, asked before anything of the model is changed."""

from collections.abc import Collection, Mapping
from typing import Any

from fastft.errors import Problem, UsageError, did_you_mean
from fastft.graph.backend import BACKENDS
from fastft.graph.pipeline import PASSES
from fastft.memory.estimate import COMPUTE
from fastft.memory.plan import plan_problem


def check_arguments(
    plan: object, backend: object, disable: Any, implementations: Any, dynamic: object, batch: Any, compute: object
) -> None:
    """Raise `UsageError` with everything that is wrong with the arguments by themselves."""
    problems: list[Problem] = []
    wrong_plan = plan_problem(plan)
    if wrong_plan is not None:
        problems.append(wrong_plan)
    for name, value, known in (("backend", backend, BACKENDS), ("compute", compute, COMPUTE)):
        if value not in known:
            problems.append(Problem(name, value, f"one of {known}", did_you_mean(str(value), known)))
    problems += [*_disable_problems(disable), *_implementation_problems(implementations)]
    if dynamic is not None and not isinstance(dynamic, bool):
        problems.append(Problem("dynamic", dynamic, "True, False or None"))
    problems += _batch_problems(batch)
    if problems:
        raise UsageError(*problems)


def _rewrites() -> list[str]:
    return [step.name for step in PASSES]


def _disable_problems(disable: Any) -> list[Problem]:
    names = _rewrites()
    if isinstance(disable, str) or not isinstance(disable, Collection):
        listed = f"Write [{disable!r}]." if disable in names else did_you_mean(str(disable), names)
        return [Problem("disable", disable, f"a list of names of rewrites, of {names}", listed)]
    return [
        Problem("disable", name, f"one of {names}", did_you_mean(str(name), names))
        for name in disable
        if name not in names
    ]


def _implementation_problems(implementations: Any) -> list[Problem]:
    names, kinds = _rewrites(), ("op", "torch")
    if implementations is None:
        return []
    if not isinstance(implementations, Mapping):
        remedy = f"Such as {{{names[0]!r}: 'torch'}}."
        return [Problem("implementations", implementations, "a dict from a rewrite to 'op' or 'torch'", remedy)]
    wrong = [name for name in implementations if name not in names]
    return [
        *(Problem("implementations", name, f"one of {names}", did_you_mean(str(name), names)) for name in wrong),
        *(
            Problem(f"implementations[{name!r}]", value, "'op' or 'torch'")
            for name, value in implementations.items()
            if value not in kinds
        ),
    ]


def _batch_problems(batch: Any) -> list[Problem]:
    """Return what is wrong with a largest batch: (rows, length), or None."""
    two = isinstance(batch, tuple | list) and len(batch) == 2
    if batch is None or (two and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in batch)):
        return []
    remedy = "Such as (4, 1024): 4 rows of 1024 tokens."
    return [Problem("batch", batch, "(rows, length), two whole numbers of at least 1, or None", remedy)]
