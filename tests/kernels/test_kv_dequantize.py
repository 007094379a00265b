"""kv_dequantize: what was packed, in every format, and what of it is in the window."""

import pytest
import torch
from aograph.kernels.kv_cache import FP8, INT4, INT4_CHANNEL, INT8, KVFormat
from aograph.kernels.kv_dequantize import kv_dequantize
from aograph.kernels.kv_update import kv_update

B, H, S, D = 2, 3, 128, 64
FORMATS = [INT8, FP8, INT4, KVFormat("int8", 8, 32)]
BLOCKS = KVFormat("int4", 4, block=32)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def unpacked(packed, dtype):
    codes, scales, *window = packed
    return kv_dequantize(codes, scales, dtype, *window)


@dtypes
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.name}-{form.group_size}")
def test_by_token(form, dtype):
    for length in (0, 1, 7, S):
        packed = form.pack(torch.randn(B, H, length, D))
        expected = form.dequantize(*packed, torch.float64)
        found = unpacked(packed, dtype)
        assert found.dtype is dtype and found.shape == (B, H, length, D)
        torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


@dtypes
@pytest.mark.parametrize("form", [INT4_CHANNEL, BLOCKS], ids=["64", "32"])
def test_by_channel(form, dtype):
    """The block of each row that is in the window is exact, the others are what their codes say."""
    packed = form.empty(B, H, S, D, dtype=dtype)
    new = torch.randn(B, H, 3 * form.block // 2, D).to(dtype)
    for t in range(new.shape[2]):  # the second row is behind by half a block
        positions = torch.tensor([[t], [max(t - form.block // 2, 0)]])
        kv_update(*packed[:2], new[:, :, t : t + 1], positions, *packed[2:])
    codes, scales, window, held = packed
    found, expected = unpacked(packed, dtype), form.dequantize(codes, scales, torch.float32).to(dtype)
    assert held.tolist() == [1, 0]
    for row, block in enumerate(held.tolist()):
        inside = slice(block * form.block, (block + 1) * form.block)
        expected[row, :, inside] = window[row]
    assert torch.equal(found, expected)
    assert torch.equal(found[0, :, form.block : new.shape[2]], new[0, :, form.block :])


def test_a_cache_may_be_part_of_another():
    whole = INT8.pack(torch.randn(B, S, 2 * H, D))
    part = [each.transpose(1, 2)[:, ::2] for each in whole]
    assert torch.equal(unpacked(part, torch.float32), unpacked([each.contiguous() for each in part], torch.float32))


def test_what_is_not_finite_stays_in_its_token():
    x = torch.ones(B, H, 4, D)
    x[0, 0, 1, 3], x[1, 2, 2, 0] = torch.nan, torch.inf
    found = unpacked(INT8.pack(x), torch.float32)
    assert found[0, 0, 1].isnan().all() and found[1, 2, 2].isnan().all() and found.isnan().sum() == 2 * D


def test_arguments_that_do_not_fit():
    codes, scales = INT8.empty(B, H, S, D)
    with pytest.raises(ValueError, match=r"kv_dequantize: scales is .*expected"):
        kv_dequantize(codes, scales[:1], torch.float32)
    with pytest.raises(ValueError, match=r"kv_dequantize: dtype is torch.int8; expected one of"):
        kv_dequantize(codes, scales, torch.int8)


def test_the_fake_has_the_sizes_of_the_real():
    for form in (INT8, INT4, INT4_CHANNEL):
        packed = form.empty(B, H, S, D)
        torch.library.opcheck(kv_dequantize.overload, (*packed[:2], torch.bfloat16, *packed[2:]))
