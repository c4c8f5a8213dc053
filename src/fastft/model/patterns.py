"""Ranks and alphas of single layers (`rank_pattern`, `alpha_pattern` of `add_lora`): what is wrong with them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fastft.errors import Problem, did_you_mean

NUMBERS = {"rank_pattern": "a whole number of at least 1", "alpha_pattern": "a number above 0"}


def problems(base: nn.Module, options: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with the patterns among the options of `add_lora`: a wrong name would change nothing."""
    modules, found = dict(base.named_modules()), []
    for argument in NUMBERS:
        given = options.get(argument)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            expected = "a dict of numbers by the names of modules, or expressions that fit them"
            found.append(Problem(argument, given, expected, f"Such as {argument}={{'q_proj': 8}}."))
            continue
        for name, value in given.items():
            found += _wrong_value(argument, name, value)
            # of parameters that are no module's weight the names are not looked up
            found += [] if options.get("target_parameters") else _wrong_name(argument, name, value, modules)
    return found


def largest_rank(modules: Iterable[nn.Module]) -> int | None:
    """Return the largest rank that a change of one of the linear layers among `modules` can have; None without any."""
    linears = (module for module in modules if isinstance(module, nn.Linear))
    return max((min(linear.in_features, linear.out_features) for linear in linears), default=None)


def _wrong_value(argument: str, name: Any, value: Any) -> list[Problem]:
    number = isinstance(value, int if argument == "rank_pattern" else int | float) and not isinstance(value, bool)
    return [] if number and value > 0 else [Problem(f"{argument}[{name!r}]", value, NUMBERS[argument])]


def _wrong_name(argument: str, name: Any, value: Any, modules: Mapping[str, nn.Module]) -> list[Problem]:
    try:
        fitting = [module for path, module in modules.items() if re.match(rf"(.*\.)?({name})$", path)]  # as PEFT does
    except re.error as error:
        told = f"It does not compile: {error}."
        return [Problem(argument, name, "the name of a module, or an expression that fits some", told)]
    if not fitting:
        last = {path.rpartition(".")[2] for path, module in modules.items() if isinstance(module, nn.Linear)}
        near = did_you_mean(str(name), last) or f"There are {', '.join(sorted(last))}."
        return [Problem(argument, name, "a name or an expression that fits some module of this model", near)]
    most = largest_rank(fitting)
    if argument != "rank_pattern" or most is None or not isinstance(value, int) or value <= most:
        return []
    return [Problem(f"{argument}[{name!r}]", value, f"at most {most}, the largest rank that such a layer can have")]
