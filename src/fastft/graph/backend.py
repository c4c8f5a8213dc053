"""The Dynamo backend: rewrite a captured graph, then lower it."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import define, evolve, field, frozen
from torch import fx, nn

import fastft.kernels
from fastft.graph.capture import bind, is_instance_of, module_stack
from fastft.graph.passes.context import Context
from fastft.graph.pipeline import rewrite
from fastft.graph.recompute import TagPass
from fastft.graph.report import GraphReport
from fastft.graph.verify import Verdict
from fastft.registry.spec import ModelSpec

BACKENDS = ("inductor", "aot_eager", "eager")


@frozen(eq=False)
class Settings:
    """How graphs are rewritten and lowered. `plan` is what was asked for, `level` what one version of a layer keeps."""

    backend: str = "inductor"
    plan: str | int = "auto"
    level: str = "keep"
    disable: tuple[str, ...] = ()
    implementations: Mapping[str, str] = field(factory=dict)


@define(eq=False, repr=False)
class RewritingBackend:
    """A backend for `torch.compile`: one object per compiled model, which remembers what it proved and did."""

    root: nn.Module
    spec: ModelSpec
    settings: Settings
    verdicts: dict[tuple[object, ...], Verdict] = field(factory=dict)
    graphs: list[GraphReport] = field(factory=list)

    def at_level(self, level: str) -> "RewritingBackend":
        """Return a backend for another level, which shares what was proved and reported."""
        if level == self.settings.level:
            return self
        return evolve(self, settings=evolve(self.settings, level=level))

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Rewrite `graph_module` and return the function that runs it."""
        binding = bind(graph_module, example_inputs, self.root)
        context = Context(binding, self.spec, self.settings.implementations, self.verdicts)
        unit = _unit_name(graph_module, context)
        # What the proofs save is none of the layer's: the hooks that move a layer's results do not see it.
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            new, report = rewrite(graph_module, context, unit, self.settings.disable)
        self.graphs.append(report)
        return lower(new, example_inputs, self.settings)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _unit_name(graph_module: fx.GraphModule, context: Context) -> str:
    """Name the class of the compiled decoder layer: the one whose name begins the names of the graph's modules."""
    layers = {
        name: type(module).__name__
        for name, module in context.binding.modules.values()
        if is_instance_of(module, context.spec.layer_classes)
    }
    for node in graph_module.graph.nodes:
        for ident in module_stack(node):
            name = context.binding.modules.get(ident, ("", None))[0]
            parents = (".".join(name.split(".")[:end]) for end in range(name.count(".") + 1, 0, -1))
            found = next((layers[parent] for parent in parents if parent in layers), None)
            if found:
                return found
    return "graph"


def lower(graph_module: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings) -> Callable[..., Any]:
    """Turn a rewritten graph into a function, through AOTAutograd and Inductor where asked."""
    if settings.backend == "eager":
        return graph_module.forward
    tags = TagPass(settings.level)
    if settings.backend == "aot_eager":
        return _aot_eager(graph_module, example_inputs, tags)
    from torch._inductor.compile_fx import compile_fx

    # The bodies of custom operations are no part of Inductor's cache key.
    with torch.compiler.config.patch(cache_key_tag=f"{torch.compiler.config.cache_key_tag}fastft-{kernel_hash()}"):
        return compile_fx(graph_module, list(example_inputs), config_patches={"joint_custom_pre_pass": tags})


def _aot_eager(graph_module: fx.GraphModule, example_inputs: Sequence[Any], tags: TagPass) -> Callable[..., Any]:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def partition(joint: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any):
        tags(joint.graph)
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    def run(graph: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=run, bw_compiler=run, partition_fn=partition)(graph_module, example_inputs)


def kernel_hash() -> str:
    """Return a hash over the sources of all kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(fastft.kernels.__path__[0]).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
