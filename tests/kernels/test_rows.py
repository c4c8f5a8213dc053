import pytest
import torch

from fastft.kernels.rows import as_matrix, as_rows, ceil_div, next_power_of_2


def _offsets(rows):
    d1, d2, s0, s1, s2 = rows.addressing
    row = torch.arange(rows.count)
    return row // d2 // d1 * s0 + row // d2 % d1 * s1 + row % d2 * s2


def _views():
    base = torch.arange(2 * 3 * 5 * 7 * 4).view(2, 3, 5, 7, 4)
    return {
        "contiguous": (base, False),
        "transposed": (base[0].transpose(0, 1), False),
        "three dimensions apart": (base.transpose(1, 3)[0], False),
        "packed": (base[..., 1:3], False),
        "packed and transposed": (base[0, :, :, :, 1:].transpose(0, 1), False),
        "every other row": (base[0, ::2, ::2], False),
        "expanded": (torch.arange(4).expand(3, 5, 4), False),
        "ones": (base[:1, :, :1], False),
        "vector": (base[0, 0, 0, 0], False),
        "four dimensions apart": (base[:, ::2, ::2, ::2, :2].permute(3, 1, 0, 2, 4), True),
        "every other column": (base[..., ::2], True),
        "one column": (base[..., 1:2], False),
        "no rows": (base[:0], False),
    }


@pytest.mark.parametrize("name", _views())
def test_rows_address_every_element_in_logical_order(name):
    x, copies = _views()[name]
    rows = as_rows(x)
    assert (rows.count, rows.width) == (x[..., 0].numel(), x.shape[-1])
    assert (rows.tensor.data_ptr() != x.data_ptr()) == copies
    flat = torch.as_strided(
        rows.tensor, (rows.tensor.untyped_storage().size() // 8 - rows.tensor.storage_offset(),), (1,)
    )
    assert torch.equal(flat[_offsets(rows)[:, None] + torch.arange(rows.width)], x.reshape(-1, rows.width))


def test_rows_are_flat_where_memory_is():
    assert as_rows(torch.empty(2, 3, 4)).addressing == (1, 1, 4, 0, 0)


@pytest.mark.parametrize("name", _views())
def test_matrix_has_unit_columns(name):
    x, _ = _views()[name]
    matrix = as_matrix(x)
    assert matrix.shape[1] == 1 or matrix.stride(1) == 1
    assert torch.equal(matrix, x.reshape(-1, x.shape[-1]))


def test_halves_of_a_packed_tensor_are_not_copied():
    packed = torch.empty(3, 5, 8)
    for half in packed.chunk(2, dim=-1):
        assert as_matrix(half).data_ptr() == half.data_ptr()


def test_integer_helpers():
    assert [next_power_of_2(n) for n in (1, 2, 3, 4, 5, 1023, 1024, 1025)] == [1, 2, 4, 4, 8, 1024, 1024, 2048]
    assert [ceil_div(a, 4) for a in (0, 1, 4, 5)] == [0, 1, 1, 2]
