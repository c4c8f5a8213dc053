"""The arms: what is compared. Each runs in a process of its own, the only one that imports its packages."""

from collections.abc import Callable, Mapping
from typing import Any

from attrs import evolve, frozen

from fastft.memory.plan import named_part

REFERENCE = "reference"
FOLDER = "folder"
"""Not an arm: the process that writes a model's folder for arms that load from one."""


@frozen
class Arm:
    """One way to train.

    `module` prepares the model in the arm's process; `needs` are the packages it imports that may be absent; `loads`
    says that it wants the model as a folder. `options` are for its module. `exact`: its numbers are to be the model's
    own up to rounding; another arm is judged by limits of its own (`benchmarks.parity`).
    """

    name: str
    title: str
    module: str
    needs: tuple[str, ...] = ()
    loads: bool = False
    options: tuple[str, ...] = ()
    exact: bool = True

    @property
    def fp8(self) -> bool:
        """Say whether products with frozen weights have fp8 factors."""
        return any(option.startswith("fp8") for option in self.options)


@frozen
class Trainee:
    """What an arm's module returns: the model, its loss on a batch, and a function for facts worth keeping."""

    model: Any
    loss: Callable[[Mapping[str, Any]], Any]
    facts: Callable[[], dict[str, Any]] = dict


def _peft(name: str, title: str, *options: str, needs: tuple[str, ...] = ()) -> Arm:
    return Arm(name, title, "benchmarks.arms.peft", ("peft", "bitsandbytes", *needs), options=options)


# What stands before the colon of an arm with a memory plan -> its title, and options beside the plan.
PLANNED = {
    "fastft": ("fastft, {}",),
    "fastft-replay": ('fastft, cuda_graphs="always", {}', "always"),
    "fastft-fp8": ('fastft, {}, compute="fp8"', "fp8"),
    "fastft-fp8-head": ('fastft, {}, compute="fp8+head"', "fp8+head"),
}


def _fastft(kind: str, plan: str, name: str = "") -> Arm:
    title, *more = PLANNED[kind]
    arm = Arm(name or kind, title.format(f'plan="{plan}"'), "benchmarks.arms.fastft", options=(plan, *more))
    return evolve(arm, exact=not (arm.fp8 or named_part(plan)[1]))


_LIGER = ("liger_kernel",)
_UNSLOTH = ("unsloth", "unsloth_zoo", "bitsandbytes")

ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        _fastft("fastft", "keep"),
        Arm("fastft-launch", "fastft without CUDA graphs", "benchmarks.arms.fastft", options=("keep", "never")),
        _fastft("fastft-fp8", "keep"),
        _fastft("fastft-fp8-head", "keep"),
        Arm("fastft-auto", 'fastft, plan="auto"', "benchmarks.arms.fastft", options=("auto",)),
        Arm("fastft-min", 'fastft, plan="min"', "benchmarks.arms.fastft", options=("min",)),
        _peft("peft", "transformers + PEFT, eager"),
        _peft("peft-checkpoint", "transformers + PEFT, eager, gradient checkpointing", "checkpoint"),
        _peft("peft-compile", "transformers + PEFT, torch.compile on the whole model", "compile"),
        _peft("peft-liger", "transformers + PEFT + Liger", "liger", needs=_LIGER),
        _peft(
            "peft-liger-checkpoint",
            "transformers + PEFT + Liger, gradient checkpointing",
            "liger",
            "checkpoint",
            needs=_LIGER,
        ),
        _peft("peft-liger-compile", "transformers + PEFT + Liger, torch.compile", "liger", "compile", needs=_LIGER),
        Arm(
            "unsloth", "Unsloth, its default offloaded checkpointing", "benchmarks.arms.unsloth", _UNSLOTH, loads=True,
            options=("unsloth",),
        ),
        Arm("unsloth-none", "Unsloth, no checkpointing", "benchmarks.arms.unsloth", _UNSLOTH, loads=True),
    )
}  # fmt: skip

DEFAULT_ARMS = (
    "fastft", "fastft-min", "peft", "peft-checkpoint", "peft-compile", "peft-liger", "peft-liger-checkpoint", "unsloth",
    "unsloth-none",
)  # fmt: skip


def find_arm(name: str) -> Arm | None:
    """Return the arm called `name`, None if there is none.

    "fastft:PLAN" is fastft with that memory plan, "fastft-replay:PLAN" with CUDA graphs wherever they can be recorded,
    "fastft-fp8:PLAN" and "fastft-fp8-head:PLAN" with fp8 factors; "module:NAME" is an arm of one's own, a module with
    `prepare`.
    """
    kind, _, plan = name.partition(":")
    if kind in PLANNED and plan:
        return _fastft(kind, plan, name)
    if name.startswith("module:"):
        return Arm(name, "an arm of one's own", name.removeprefix("module:"))
    if name == REFERENCE:
        return Arm(REFERENCE, "transformers + PEFT, eager, in fp32 and in bf16", "benchmarks.arms.reference")
    return ARMS.get(name)
