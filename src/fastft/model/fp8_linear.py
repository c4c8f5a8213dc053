"""A frozen linear layer that holds its weight in fp8, and the loading of a model's linears into such layers.

A byte a weight (e4m3) and a scale for each of its rows in fp32. Outside `compute="fp8"` it is dequantised in passing,
in the forward and again in the backward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastft.errors import Problem, UsageError
from fastft.kernels import fp8, lora


class _Bytes(Tensor):
    """Bytes that stand for other numbers: they may be moved, copied and compared, not computed with or written to.

    Raises `UsageError` for an operation in place, for one whose result is a tensor of floating-point numbers, and for
    `data = ...`, which would go to a passing view of the bytes and be lost.
    """

    @property
    def data(self) -> Tensor:
        """Return the bytes."""
        return self.detach()

    @data.setter
    def data(self, value: object) -> None:
        raise _refusal("data = ...")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if args and isinstance(args[0], cls) and _writes(name):
            raise _refusal(name)
        made = super().__torch_function__(func, types, args, kwargs or {})
        if any(isinstance(one, Tensor) and one.is_floating_point() for one in _each(made)):
            raise _refusal(name)
        return made


def _each(made: Any) -> Sequence[Any]:
    return made if isinstance(made, tuple | list) else (made,)


def _writes(name: str) -> bool:
    """Say whether the method of a tensor with this name changes its numbers: "add_", "__iadd__", "__setitem__"."""
    if name.startswith("__"):
        return name == "__setitem__" or (name[2] == "i" and hasattr(Tensor, f"__{name[3:]}"))
    return name.endswith("_") and name not in ("requires_grad_", "detach_", "share_memory_")


def _refusal(name: str) -> UsageError:
    remedy = (
        "Use fastft.merge(model, folder), which dequantises the weights, adds the adapter, and rounds once; an adapter "
        "that computes with the weights themselves (DoRA) needs a model in 16 bits."
    )
    return UsageError(Problem(f"a weight's fp8 bytes, {name}", "bytes", "weights that are numbers", remedy))


class Fp8Linear(nn.Linear):
    """`x W^T + bias` with W [out, in] as the bytes of e4m3 (uint8) in `weight` and `weight_scale` [out] in fp32.

    It is an `nn.Linear` for PEFT, whose LoRA layers wrap it; W has no gradient.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight of its own
        self.out_features, self.in_features = weight.shape
        # not by its name, which is a property's here
        self._parameters["weight"] = nn.Parameter(weight.view(torch.uint8), requires_grad=False)
        self.bias = bias
        self.register_buffer("weight_scale", scale)

    @classmethod
    def of(cls, linear: nn.Linear, device: torch.device) -> "Fp8Linear":
        """Quantise a linear layer on `device`; what it is made of may be freed then."""
        weight = linear.weight.detach().to(device)
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(device), requires_grad=False)
        return cls(*fp8.weight_rows(weight, [], *weight.shape), bias)

    @property
    def weight(self) -> Tensor:
        """Return the bytes, as others see them: PEFT would merge into them, or take a norm of them; see `_Bytes`."""
        return self.stored.detach().as_subclass(_Bytes)

    @property
    def stored(self) -> nn.Parameter:
        """Return the bytes, as the parameter `weight` that they are."""
        return self._parameters["weight"]

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return W [out, in] in `dtype`, rounded once."""
        return fp8.dequantize(self.stored.detach().view(fp8.ref.FP8), self.weight_scale, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] of x [..., in], computed in the dtype of x (under autocast: in autocast's)."""
        none = x.new_empty(0, self.in_features), x.new_empty(self.out_features, 0)
        state = [[self.weight_scale]]
        return lora.lora_linears(x, [self.stored], [self.bias], [none[0]], [none[1]], [1.0], state)[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Fp8Linear":
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:  # a cast of the model is none of the scales
            self.weight_scale = scale.to(self.weight_scale.device)
        return self


def quantize_linears(model: Any, skip: Sequence[str], device: torch.device) -> int:
    """Replace the linear layers of `model`, but those that `skip` names, by `Fp8Linear` on `device`; return how many.

    skip: names of modules, as a spec's `keep_16bit` has them. The rest of the model is moved to `device`.
    """
    head = model.get_output_embeddings()
    found = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    count = 0
    for name, module in found:
        if module is head or any(f".{part}." in f".{name}." for part in skip):
            continue
        model.set_submodule(name, Fp8Linear.of(module, device))
        count += 1
    model.to(device)
    return count
