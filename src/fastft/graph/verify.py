"""Prove a replacement: a captured region is a program of its own, and so the oracle for what is to replace it."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from attrs import frozen
from torch import fx

from fastft.errors import FastftError
from fastft.graph.capture import Binding
from fastft.graph.regions import Region, region_module
from fastft.memory.estimate import PROOF_TOKENS

FLOOR = 5e-6
"""Relative difference that fp32 arithmetic in another order can make."""


@frozen
class Allowed:
    """Relative differences allowed: in units of the dtype's epsilon, and beside that."""

    name: str
    forward: float
    gradient: float = 3.0
    forward_floor: float = FLOOR
    gradient_floor: float = 4 * FLOOR


# A replacement that claims the same roundings (norms, gates, rotations) differs only where a sum was taken in another
# order; one that claims the same mathematics (matrix products) may round each intermediate once more. One with fp8
# factors differs by their rounding: of each factor, evenly spread values lose 2.6 %, so a product of two 3.7 %, a gated
# feed-forward of three products 7 %, its gradient 9 %.
SAME_ROUNDING = Allowed("same rounding", 0.05)
SAME_MATHEMATICS = Allowed("same mathematics", 2.0)
# One that keeps gate and up in 8 bits has the same forward; evenly spread values lose 0.6 % of their size by that, each
# gradient of a feed-forward at most 1 %.
FP8 = Allowed("fp8", 2.0, forward_floor=0.10, gradient_floor=0.13)
EIGHT_BITS = Allowed("8 bits", 2.0, gradient_floor=0.02)
FP8_EIGHT_BITS = Allowed("fp8, 8 bits", 2.0, forward_floor=0.10, gradient_floor=0.13)


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
    allowed: Allowed,
    inputs: Mapping[fx.Node, torch.Tensor] | None = None,
    seed: int = 0,
    frozen: frozenset[fx.Node] = frozenset(),
) -> Verdict:
    """Run the region and `candidate(*arguments)` on random values, forward and backward, and compare.

    `arguments` hold nodes of the region where the candidate takes tensors. `inputs` overrides the random value of a
    node that needs structure; inputs that are `frozen` need no gradient. Frozen matrices and quantised weights keep
    their values, all else is random. Of a longer batch `PROOF_TOKENS` tokens are taken, unless the region is made for
    its very length. NaN fails, and so does a candidate that raises. Where gradients are off, as a graph that is never
    gone back through is captured, none are compared: operations without any may be in it.
    """
    oracle = region_module(owner, region)
    order = list(dict.fromkeys((*region.inputs, *region.parameters.values())))
    for length in dict.fromkeys((_proof_length(region), None)):
        values = _sample(region, binding, seed, length) | _cut(dict(inputs or {}), length)
        values |= {node: values[node].detach() for node in frozen}
        try:
            reference = _run(lambda env: oracle(*(env[node] for node in order)), values, seed)
            break
        except RuntimeError as error:  # a size is written into the graph
            if length is None or isinstance(error, torch.OutOfMemoryError):
                raise
    try:
        result = _run(lambda env: candidate(*_substitute(arguments, env)), values, seed)
    except torch.OutOfMemoryError:
        raise
    except (FastftError, RuntimeError, ValueError, TypeError, IndexError) as error:  # sizes that do not fit
        return Verdict(False, math.inf, math.inf, f"cannot be computed so: {str(error).splitlines()[0]}")
    return _compare(reference, result, allowed)


def _proof_length(region: Region) -> tuple[int, int] | None:
    """Return (length of the batch, length to prove at), None where the batch is short or its length is not clear."""
    shapes = [present_shape(n.meta["example_value"]) for n in region.inputs if _is_activation(n)]
    lengths = {shape[1] for shape in shapes if len(shape) == 3} or {max(shape[1:-1]) for shape in shapes}
    if len(lengths) != 1:
        return None
    length = lengths.pop()
    wanted = max(1, PROOF_TOKENS // max(shape[0] for shape in shapes))
    return (length, wanted) if wanted < length else None


def _is_activation(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.dim() >= 3


def _token_dim(shape: Sequence[int], length: int) -> int | None:
    """Return the dimension of tokens of [B, T, D], [B, H, T, D] or [B, T, H, D], None where it is not clear."""
    found = [dim for dim in range(1, len(shape) - 1) if shape[dim] == length]
    return found[0] if len(found) == 1 else None


def _cut(values: Mapping[fx.Node, torch.Tensor], length: tuple[int, int] | None) -> dict[fx.Node, torch.Tensor]:
    """Return the values with as many tokens as the proof takes."""
    if length is None:
        return dict(values)
    dims = {node: _token_dim(value.shape, length[0]) for node, value in values.items()}
    return {n: v if dims[n] is None else v.narrow(dims[n], 0, length[1]) for n, v in values.items()}


def _substitute(arguments: Sequence[object], env: Mapping[fx.Node, object]) -> tuple[object, ...]:
    return fx.node.map_aggregate(tuple(arguments), lambda a: env[a] if isinstance(a, fx.Node) else a)


def _sample(
    region: Region, binding: Binding, seed: int, length: tuple[int, int] | None = None
) -> dict[fx.Node, object]:
    values: dict[fx.Node, object] = {}
    for index, node in enumerate((*region.inputs, *region.parameters.values())):
        example = node.meta.get("example_value")
        real = binding.tensors.get(node.name)
        if isinstance(example, (torch.SymInt, torch.SymFloat)):
            values[node] = example.node.hint
        elif real is not None and not (real.requires_grad or (real.is_floating_point() and real.dim() == 1)):
            values[node] = real.detach()
        elif isinstance(example, torch.Tensor):
            shape = present_shape(example)
            if length is not None and real is None and (dim := _token_dim(shape, length[0])) is not None:
                shape[dim] = length[1]
            values[node] = _random_like(example, shape, real, seed + index)
        else:
            values[node] = example
    return values


def present_shape(example: torch.Tensor) -> list[int]:
    """Return the sizes of `example` as they are now. `int` of a dynamic size would bind the whole graph to it."""
    return [size.node.hint if isinstance(size, torch.SymInt) else size for size in example.shape]


def _random_like(example: torch.Tensor, shape: Sequence[int], real: torch.Tensor | None, seed: int) -> torch.Tensor:
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
    allowed: Allowed,
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
    most = allowed.forward_floor + epsilon * allowed.forward
    most_gradient = allowed.gradient_floor + epsilon * allowed.gradient
    ok = forward <= most and gradient <= most_gradient
    reason = (
        ""
        if ok
        else (
            f"differs from the module: forward {forward:.1e} (allowed {most:.1e}), "
            f"gradient {gradient:.1e} (allowed {most_gradient:.1e})"
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
