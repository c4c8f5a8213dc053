"""A tensor seen as rows along its last dimension, without copying where its strides allow that."""

import torch
from attrs import frozen

# Row numbers of more than this need 64 bits; element offsets always have them.
MAX_INT32 = 2**31 - 1


@frozen(eq=False)
class Rows:
    """Rows of `tensor` in their logical order: row r is (i0, i1, i2) with i2 = r % d2, i1 = r // d2 % d1, i0 the rest.

    `addressing` is (d1, d2, stride0, stride1, stride2), strides in elements, the last dimension's stride being 1.
    """

    tensor: torch.Tensor
    count: int
    width: int
    addressing: tuple[int, int, int, int, int]

    @property
    def wide(self) -> bool:
        """Whether row numbers, rounded up to a whole tile, need 64 bits."""
        return self.count > MAX_INT32 - 2**16


def as_rows(x: torch.Tensor) -> Rows:
    """Describe x [..., D] as rows. Leading dimensions are merged where strides allow; more than three that do not
    merge, or a last dimension whose stride is not 1, make one contiguous copy."""
    width = x.shape[-1]
    count = x.numel() // width if width else 0
    dims: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1]):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if len(dims) > 3 or (x.stride(-1) != 1 and width > 1):
        return Rows(x.contiguous(), count, width, (1, 1, width, 0, 0))
    # Padding on the right keeps the divisors 1, which the compiler folds, for the usual flat tensor.
    (_, stride0), (d1, stride1), (d2, stride2) = dims + [(1, 0)] * (3 - len(dims))
    return Rows(x, count, width, (d1, d2, stride0, stride1, stride2))


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """View x [..., D] as [rows, D] with unit stride along D; copies only where no such view exists."""
    unit = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return unit.reshape(-1, x.shape[-1])


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)
