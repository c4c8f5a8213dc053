"""Prove a replacement: a captured region is a program of its own, and so the oracle for what is to replace it."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from attrs import frozen
from torch import fx

from fastft.errors import FastftError
from fastft.graph.capture import Binding
from fastft.graph.regions import Region, region_module

# Forward difference allowed, in units of the dtype's epsilon. A replacement that claims the same roundings (norms,
# gates, rotations) differs only where a sum was taken in another order; one that claims the same mathematics (matrix
# products) may round each intermediate once more.
SAME_ROUNDING = 0.05
SAME_MATHEMATICS = 2.0
GRADIENT = 3.0
FLOOR = 5e-6
"""Relative difference that fp32 arithmetic in another order can make."""


@frozen
class Verdict:
    """Whether a replacement computes what the region does: largest relative L2 differences, forward and backward."""

    ok: bool
    forward: float
    gradient: float
    reason: str = ""


def prove(
    owner: fx.GraphModule,
    region: Region,
    binding: Binding,
    candidate: Callable[..., object],
    arguments: Sequence[object],
    *,
    same_rounding: bool,
    inputs: Mapping[fx.Node, torch.Tensor] | None = None,
    seed: int = 0,
) -> Verdict:
    """Run the region and `candidate(*arguments)` on random values, forward and backward, and compare.

    `arguments` hold nodes of the region where the candidate takes tensors. `inputs` overrides the random value of a
    node that needs structure. Frozen matrices and quantised weights keep their values, all else is random. NaN fails,
    and so does a candidate that raises.
    """
    values = _sample(region, binding, seed) | dict(inputs or {})
    oracle = region_module(owner, region)
    order = list(dict.fromkeys((*region.inputs, *region.parameters.values())))
    with torch.enable_grad():
        reference = _run(lambda env: oracle(*(env[node] for node in order)), values, seed)
        try:
            result = _run(lambda env: candidate(*_substitute(arguments, env)), values, seed)
        except torch.OutOfMemoryError:
            raise
        except (FastftError, RuntimeError, ValueError, TypeError, IndexError) as error:  # sizes that do not fit
            return Verdict(False, math.inf, math.inf, f"cannot be computed so: {str(error).splitlines()[0]}")
    return _compare(reference, result, same_rounding)


def _substitute(arguments: Sequence[object], env: Mapping[fx.Node, object]) -> tuple[object, ...]:
    return fx.node.map_aggregate(tuple(arguments), lambda a: env[a] if isinstance(a, fx.Node) else a)


def _sample(region: Region, binding: Binding, seed: int) -> dict[fx.Node, object]:
    values: dict[fx.Node, object] = {}
    for index, node in enumerate((*region.inputs, *region.parameters.values())):
        example = node.meta.get("example_value")
        real = binding.tensors.get(node.name)
        if isinstance(example, (torch.SymInt, torch.SymFloat)):
            values[node] = example.node.hint
        elif real is not None and not (real.requires_grad or (real.is_floating_point() and real.dim() == 1)):
            values[node] = real.detach()
        elif isinstance(example, torch.Tensor):
            values[node] = _random_like(example, real, seed + index)
        else:
            values[node] = example
    return values


def present_shape(example: torch.Tensor) -> list[int]:
    """Return the sizes of `example` as they are now. `int` of a dynamic size would bind the whole graph to it."""
    return [size.node.hint if isinstance(size, torch.SymInt) else size for size in example.shape]


def _random_like(example: torch.Tensor, real: torch.Tensor | None, seed: int) -> torch.Tensor:
    shape = present_shape(example)
    device = real.device if real is not None else example.device
    generator = torch.Generator(device).manual_seed(seed)
    if example.dtype == torch.bool:
        return torch.rand(shape, generator=generator, device=device) > 0.5
    if not example.is_floating_point():
        return torch.randint(0, 2, shape, generator=generator, device=device, dtype=example.dtype)
    # A weight's rows are scaled as an initialiser would, so that products stay of order one.
    scale = shape[-1] ** -0.5 if real is not None and len(shape) == 2 else 1.0
    value = torch.randn(shape, generator=generator, device=device) * scale
    return value.to(example.dtype).requires_grad_(example.requires_grad if real is None else real.requires_grad)


def _run(
    function: Callable[[Mapping[fx.Node, object]], object], values: Mapping[fx.Node, object], seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    env = {
        node: value.detach().clone().requires_grad_()
        if isinstance(value, torch.Tensor) and value.requires_grad
        else value
        for node, value in values.items()
    }
    results = function(env)
    outputs = [
        out for out in (results if isinstance(results, (tuple, list)) else (results,)) if isinstance(out, torch.Tensor)
    ]
    leaves = [value for value in env.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    differentiable = [(index, out) for index, out in enumerate(outputs) if out.requires_grad]
    if not leaves or not differentiable:
        return [out.detach() for out in outputs], []
    upstream = []
    for index, out in differentiable:
        generator = torch.Generator(out.device).manual_seed(seed + 1000 + index)
        upstream.append(torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype))
    gradients = torch.autograd.grad([out for _, out in differentiable], leaves, upstream, allow_unused=True)
    return [out.detach() for out in outputs], list(gradients)


def _compare(
    reference: tuple[list[torch.Tensor], list[torch.Tensor | None]],
    result: tuple[list[torch.Tensor], list[torch.Tensor | None]],
    same_rounding: bool,
) -> Verdict:
    if [(o.shape, o.dtype) for o in reference[0]] != [(o.shape, o.dtype) for o in result[0]]:
        told = [f"{tuple(o.shape)} {o.dtype}" for o in result[0]]
        wanted = [f"{tuple(o.shape)} {o.dtype}" for o in reference[0]]
        return Verdict(False, math.inf, math.inf, f"gives {told} where the module gives {wanted}")
    forward = max((relative_difference(a, b) for a, b in zip(*(reference[0], result[0]), strict=True)), default=0.0)
    gradient = 0.0
    if len(reference[1]) != len(result[1]):
        return Verdict(False, forward, math.inf, "gradients are missing")
    for a, b in zip(reference[1], result[1], strict=True):
        if (a is None) != (b is None):
            return Verdict(
                False, forward, math.inf, "gives a gradient where the module gives none, or none where it does"
            )
        if a is not None and b is not None:
            gradient = _worst(gradient, relative_difference(a, b))
    dtypes = [o.dtype for o in reference[0] if o.is_floating_point()]
    epsilon = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    if torch.is_autocast_enabled(reference[0][0].device.type):
        epsilon = max(epsilon, torch.finfo(torch.get_autocast_dtype(reference[0][0].device.type)).eps)
    allowed = FLOOR + epsilon * (SAME_ROUNDING if same_rounding else SAME_MATHEMATICS)
    allowed_gradient = FLOOR * 4 + epsilon * GRADIENT
    ok = forward <= allowed and gradient <= allowed_gradient
    reason = (
        ""
        if ok
        else (
            f"differs from the module: forward {forward:.1e} (allowed {allowed:.1e}), "
            f"gradient {gradient:.1e} (allowed {allowed_gradient:.1e})"
        )
    )
    return Verdict(ok, forward, gradient, reason)


def relative_difference(reference: torch.Tensor, result: torch.Tensor) -> float:
    """Return ||result - reference|| / ||reference|| in fp32 (fp64 for fp64); infinity where NaN or infinity is."""
    wide = torch.float64 if reference.dtype == torch.float64 else torch.float32
    a, b = reference.detach().to(wide), result.detach().to(wide)
    norm = torch.linalg.vector_norm(a)
    error = (torch.linalg.vector_norm(b - a) / (norm if norm > 0 else 1.0)).item()
    return error if math.isfinite(error) else math.inf


def _worst(a: float, b: float) -> float:
    return b if not b <= a else a
