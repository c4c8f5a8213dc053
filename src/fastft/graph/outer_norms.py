"""Norms behind the decoder layers, such as the last one: compiled units of their own that run as the layers do."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import evolve
from torch import nn

from fastft.graph.backend import Settings
from fastft.graph.calls import Kind
from fastft.graph.capture import is_instance_of
from fastft.graph.passes.norm import RULE
from fastft.registry.spec import ModelSpec


def outer_norms(
    base: nn.Module, spec: ModelSpec, layers: Sequence[nn.Module], disable: Sequence[str] = ()
) -> tuple[nn.Module, ...]:
    """Return the modules of the spec's norm classes that come behind `layers`, in order; none if they are disabled.

    `disable`: names of rewrites that are left out. A norm before the layers, such as those of a part for images, does
    not know whether the layers will run compiled.
    """
    if RULE in disable:
        return ()
    classes = tuple(name for point in spec.norms for name in point.classes)
    inside = {id(module) for layer in layers for module in layer.modules()}
    modules = list(base.modules())
    behind = max(place for place, module in enumerate(modules) if id(module) in inside) + 1
    return tuple(module for module in modules[behind:] if is_instance_of(module, classes))


def norm_settings(settings: Settings) -> Settings:
    """Return how the graph of a norm alone is rewritten and lowered.

    Within a layer Inductor fuses a norm with its neighbours. Alone it is one fused operation, on which Inductor would
    have nothing to do but take seconds.
    """
    form = settings.norm_alone
    backend = "eager" if form == "op" else settings.backend
    return evolve(settings, backend=backend, implementations={**settings.implementations, RULE: form})


def follows(norm: nn.Module, kind: Kind | None) -> bool:
    """Say whether a call of `norm` is to be compiled: `kind` is that of the layers' last call, None if it was not."""
    if kind is None or not norm.training or torch.is_inference_mode_enabled():
        return False
    return kind.gradients == torch.is_grad_enabled()


def norm_dispatcher(
    norm: nn.Module,
    versions: Mapping[bool, Callable[..., Any]],
    kind: Callable[[], Kind | None],
    uncompiled: Callable[..., Any],
) -> Callable[..., Any]:
    """Return what `nn.Module.__call__` of a norm is to run: the compiled one where the layers ran compiled.

    `versions` are the compiled function with gradients and without; `kind` gives that of the layers' last call;
    `uncompiled` takes the norm, Dynamo's error and the arguments, and runs the norm as it is.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        now = kind()
        if not follows(norm, now):
            return norm._call_impl(*args, **kwargs)
        try:
            return versions[now.gradients](norm, *args, **kwargs)
        except (torch._dynamo.exc.FailOnRecompileLimitHit, torch._dynamo.exc.Unsupported) as error:
            return uncompiled(norm, error, args, kwargs)

    return call
