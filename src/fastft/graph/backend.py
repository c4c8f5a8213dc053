"""The Dynamo backend: rewrite a captured graph, then lower it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import define, evolve, field, frozen
from torch import fx, nn

from fastft.graph.ahead import Ahead
from fastft.graph.capture import bind, find_unit
from fastft.graph.first_input import FirstInput
from fastft.graph.joint import JointPass
from fastft.graph.keepable import left_packed
from fastft.graph.kept import KeptInput, KeptWeights, examples, finder
from fastft.graph.passes.context import Context
from fastft.graph.pipeline import rewrite
from fastft.graph.report import GraphReport
from fastft.graph.verify import Verdict
from fastft.memory.estimate import Mode
from fastft.memory.levels import keeps_wide
from fastft.registry.spec import ModelSpec

BACKENDS = ("inductor", "aot_eager", "eager")


@frozen(eq=False)
class Settings:
    """How graphs are rewritten and lowered. `plan` is what was asked for, `level` what one version of a layer keeps.

    `compute` is "exact", or "fp8" where large products may have fp8 factors. `dequantised`: this version of a layer
    reads copies of its NF4 weights, dequantised or as fp8 factors. `eight_bits`: gate and up are kept in 8 bits.
    `norm_alone`: the form, of `implementations`, of a norm that is a graph of its own.
    """

    backend: str = "inductor"
    plan: str | int = "auto"
    level: str = "keep"
    disable: tuple[str, ...] = ()
    implementations: Mapping[str, str] = field(factory=dict)
    compute: str = "exact"
    dequantised: bool = False
    eight_bits: bool = False
    norm_alone: str = "op"


@define(eq=False, repr=False)
class RewritingBackend:
    """A backend for `torch.compile`: one object per compiled model, which remembers what it proved and did.

    `units`: the modules that are compiled with it. `weights`: the copies of NF4 weights that are kept. `first`: the
    input of a call that needs no gradient. `ahead`: calls that compile kernels which the proofs need.
    """

    root: nn.Module
    spec: ModelSpec
    settings: Settings
    units: tuple[nn.Module, ...]
    verdicts: dict[tuple[object, ...], Verdict] = field(factory=dict)
    graphs: list[GraphReport] = field(factory=list)
    weights: KeptWeights = field(factory=KeptWeights)
    first: FirstInput = field(factory=FirstInput)
    ahead: Ahead = field(factory=Ahead)

    def for_mode(self, mode: Mode) -> "RewritingBackend":
        """Return a backend for layers of a mode, which shares what was proved and reported."""
        eight_bits = self.settings.eight_bits and keeps_wide(mode.level)
        settings = evolve(self.settings, level=mode.level, dequantised=mode.dequantised, eight_bits=eight_bits)
        return evolve(self, settings=settings)

    def for_units(self, units: tuple[nn.Module, ...], settings: Settings) -> "RewritingBackend":
        """Return a backend for other modules of the model, which shares what was proved and reported."""
        return evolve(self, units=units, settings=settings)

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Rewrite `graph_module` and return the function that runs it."""
        self.ahead.join()
        binding = bind(graph_module, example_inputs, self.root)
        settings = self.settings
        kept: list[KeptInput] | None = [] if settings.dequantised else None
        eight_bits = settings.eight_bits and torch.is_grad_enabled()  # without gradients nothing is kept
        shown = self.first.name(binding)
        context = Context(
            binding, self.spec, settings.implementations, self.verdicts, settings.compute, kept, eight_bits, shown
        )
        unit = find_unit(graph_module, binding, self.units)
        # What the proofs save is none of the layer's: the hooks that move a layer's results do not see it.
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            new, report = rewrite(graph_module, context, unit, settings.disable)
        gated = [done for done in report.rewrites if done.rule == "glu"] if eight_bits else []
        narrow = all(done.kept for done in gated) if gated else None
        forms = [self.first.detached(new, shown), new] if shown else [new]
        self.graphs += [evolve(report, gradients=torch.is_grad_enabled(), eight_bits=narrow)] * len(forms)
        # Both at once, so that what either asks of dynamic lengths guards the one capture.
        lowered = [lower(form, [*example_inputs, *examples(kept or ())], settings) for form in forms]
        run = self.first.choose(detached=lowered[0], whole=lowered[1]) if shown else lowered[0]
        if kept is None:
            return run
        copies = finder(new.graph, kept, self.weights, left_packed(new.graph, binding, kept))
        return lambda *inputs: run(*inputs, *copies(inputs))


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def lower(graph_module: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings) -> Callable[..., Any]:
    """Turn a rewritten graph into a function, through AOTAutograd and Inductor where asked."""
    if settings.backend == "eager":
        return graph_module.forward
    joint = JointPass(settings.level)
    if settings.backend == "aot_eager":
        return _aot_eager(graph_module, example_inputs, joint)
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph_module, list(example_inputs), config_patches={"joint_custom_pre_pass": joint})


def _aot_eager(graph_module: fx.GraphModule, example_inputs: Sequence[Any], before: JointPass) -> Callable[..., Any]:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def partition(joint: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any):
        before(joint.graph)
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    def run(graph: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=run, bw_compiler=run, partition_fn=partition)(graph_module, example_inputs)
