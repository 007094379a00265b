"""The formats of packed caches against float64, over heads that hurt."""

import math

import pytest
import torch
from aograph.kernels.kv_cache import CODES, FP8, INT4, INT4_CHANNEL, INT8, KVFormat
from aograph.kernels.kv_update import kv_update

FORMATS = [
    INT8,
    FP8,
    INT4,
    KVFormat("int8", 8, 32),
    KVFormat("fp8", 8, 16),
    KVFormat("int4", 4),
    KVFormat("int4", 4, 16),
]
each = pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.name}-{form.group_size}")
floats = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def groups_of(x, form):
    return x.unflatten(-1, (form.groups(x.shape[-1]), -1))


def allowed(x, form):
    """By how much each value may be off, float64, from the range of its group."""
    wide = groups_of(x.double(), form)
    most, span = wide.abs().amax(-1, keepdim=True), wide.amax(-1, keepdim=True) - wide.amin(-1, keepdim=True)
    if form.name == "int8":
        bound = most / 127 / 2
    elif form.name == "fp8":
        bound = torch.maximum(wide.abs() / 16, most / 448 * 2.0**-10)
    else:  # half a step, and what rounding the minimum and the scale to bf16 adds
        bound = span / 15 / 2 * 1.01 + wide.amin(-1, keepdim=True).abs() / 256 + span / 256
    return (bound * 1.001 + 2e-37).expand_as(wide).flatten(-2)


@each
@floats
def test_what_comes_back_is_as_near_as_the_codes_are(form, dtype):
    x = torch.randn(3, 2, 17, 64).to(dtype)
    x[0, 0, 3, 5], x[0, 0, 4], x[0, 0, 5], x[0, 0, 6] = 1e4, 0, 7, -3
    x[0, 0, 7], x[0, 0, 8], x[1, 1, 1] = x[0, 0, 7] * 1e-4, x[0, 0, 8] + 100, x[1, 1, 1].abs() * 1e4
    for given in (x, x.transpose(1, 2), x[:, :, ::2], x[:0], x.expand(2, 3, 2, 17, 64)):
        codes, scales = form.quantize(given)
        for made, (kind, shape) in zip((codes, scales), form.layout(1, 1, 1, 64), strict=True):
            assert made.dtype is kind and made.shape == (*given.shape[:-1], *shape[3:])
        back = form.dequantize(codes, scales, torch.float64)
        assert back.dtype is torch.float64 and back.shape == given.shape
        assert ((back - given.double()).abs() <= allowed(given, form)).all()
        single = form.dequantize(codes, scales, torch.float32)
        torch.testing.assert_close(
            single.double(), back, rtol=1e-6, atol=1e-6 * given.abs().amax(-1).max().item() if given.numel() else 0
        )


def check_nearest(form, x, codes, scales):
    """No other code, with the same scale as it is stored, is nearer."""
    back = form.dequantize(codes, scales, torch.float64)
    if form.name == "fp8":
        grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        grid = grid[grid.isfinite()]
    else:
        grid = torch.arange(-127, 128).double() if form.name == "int8" else torch.arange(16).double()
    scale, minimum = scales.double().unbind(-1) if form.asymmetric else (scales.double(), torch.tensor(0.0))
    values = grid * scale[..., None] + minimum[..., None]  # [4, groups, codes]
    nearest = (groups_of(x.double(), form)[..., None] - values[:, :, None]).abs().amin(-1)
    assert (groups_of(back - x, form).abs() <= nearest * (1 + 1e-5) + 1e-7).all()


@each
def test_rounding_is_to_the_nearest_code(form):
    x = torch.randn(500, 32)
    check_nearest(form, x, *form.quantize(x))


def test_compiled_rounding_is_to_the_nearest_code(fresh_compiler):
    x = torch.randn(len(FORMATS), 500, 32)
    quantize = torch.compile(lambda x: [form.quantize(each) for form, each in zip(FORMATS, x, strict=True)])
    for form, each, packed in zip(FORMATS, x, quantize(x), strict=True):
        check_nearest(form, each, *packed)


def test_the_layout_of_int4():
    codes, scales = KVFormat("int4", 4, 16).quantize(torch.arange(16.0).repeat(2))
    assert codes.tolist() == [2 * j | (2 * j + 1) << 4 for j in range(8)] * 2
    assert scales.dtype is torch.bfloat16 and scales.tolist() == [[1, 0], [1, 0]]


@each
def test_strides_do_not_matter(form):
    codes, scales = form.quantize(torch.randn(3, 5, 64))
    expected = form.dequantize(codes, scales, torch.float32)
    turned = codes.mT.contiguous().mT, scales
    assert turned[0].stride(-1) != 1 and form.dequantize(*turned, torch.float32).equal(expected)


@each
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_stays_in_its_group(form, bad):
    x = torch.randn(2, 64)
    x[1, 17] = bad
    codes, scales = form.quantize(x)
    back = groups_of(form.dequantize(codes, scales, torch.float32), form)
    hit = torch.zeros_like(groups_of(x, form), dtype=torch.bool)
    hit[1, 17 // hit.shape[-1]] = True
    assert (back.isnan() == hit).all()
    assert not codes.float().isnan().any()
    assert form.dequantize(codes, scales.nan_to_num(0), torch.float32).isfinite().all()


@each
def test_an_empty_cache_stands_for_zeros(form):
    codes, scales = form.empty(2, 3, 5, 96)
    assert codes.dtype is CODES[form.name] and form.dequantize(codes, scales, torch.float32).equal(
        torch.zeros(2, 3, 5, 96)
    )
    assert codes.nbytes + scales.nbytes == 2 * 3 * 5 * form.token_bytes(96)


def test_bytes_of_a_token():
    assert [form.token_bytes(128) for form in (INT8, FP8, INT4)] == [132, 132, 80]
    assert KVFormat("int4", 4, 128).token_bytes(128) == 68


def test_heads_that_no_format_takes():
    for form, D in ((INT8, 24), (INT4, 80), (KVFormat("fp8", 8, 64), 96)):
        with pytest.raises(ValueError, match=f"{form.name}: a head of {D}; expected a multiple of 16"):
            form.quantize(torch.zeros(1, D))
        with pytest.raises(ValueError, match="expected a multiple"):
            form.empty(1, 1, 1, D)


@each
def test_a_format_is_known_by_its_tensors(form):
    codes, scales = form.empty(1, 1, 1, 64)
    found, D = kv_update.fit(codes, scales)
    assert D == 64 and (found.name, found.bits, found.groups(64)) == (form.name, form.bits, form.groups(64))


def test_tensors_of_no_format():
    codes, scales = INT8.empty(1, 2, 3, 64)
    for wrong in ((codes.float(), scales), (codes[0], scales), (codes, scales[..., None]), (codes, scales[0])):
        with pytest.raises(
            ValueError, match=r"codes and scales are .*; expected those of one of \['int8', 'fp8', 'int4'\]"
        ):
            kv_update.fit(*wrong)
    for wrong in ((codes, scales[:, :1]), (codes, scales.half()), (codes, scales[..., :0]), (codes, scales.to("meta"))):
        with pytest.raises(ValueError, match=r"kv_update: scales is .*; expected torch.float32 \[1, 2, 3, 1\] on cpu"):
            kv_update.fit(*wrong)
    with pytest.raises(ValueError, match=r"int8: a head of 40; expected a multiple of 16"):
        kv_update.fit(torch.zeros(1, 1, 1, 40, dtype=torch.int8), torch.zeros(1, 1, 1, 1))


# --- by channel --------------------------------------------------------------------------------------------


@floats
@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_channel_of_a_block_is_what_a_token_is_otherwise(dtype, n):
    """The same as the format by token makes of each block turned around: channels as tokens, tokens as channels."""
    by_token, x = KVFormat("int4", 4), torch.randn(2, 3, n * 64, 32).to(dtype)
    x[..., 5] *= 1e4
    codes, scales = INT4_CHANNEL.quantize(x)
    assert codes.shape == (2, 3, n * 64, 16) and scales.shape == (2, 3, n, 32, 2)
    turned = x.unflatten(2, (n, 64)).mT.contiguous()
    for wide in (torch.float32, torch.float64):
        back = by_token.dequantize(*by_token.quantize(turned), wide).mT.flatten(2, 3)
        assert INT4_CHANNEL.dequantize(codes, scales, wide).equal(back)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stays_in_its_channel_of_its_block(bad):
    x = torch.randn(2, 1, 128, 32)
    x[1, 0, 70, 5] = bad
    hit = INT4_CHANNEL.dequantize(*INT4_CHANNEL.quantize(x), torch.float32).isnan()
    assert hit[1, 0, 64:, 5].all() and hit.sum() == 64


@pytest.mark.parametrize("S", [1, 63, 64, 65, 200])
def test_what_a_cache_holds_is_packed_by_channel(S):
    form = INT4_CHANNEL
    x = torch.randn(4, 2, S, 32).bfloat16()
    ends = [0, S // 2, S - 1, S - 1]  # row 0 is empty
    for row, end in enumerate(ends):
        x[row, :, end + (row > 0) :] = 0
    codes, scales, window, held = packed = form.pack(x)
    for made, (kind, shape) in zip(packed, form.layout(4, 2, S, 32, torch.bfloat16), strict=True):
        assert made.dtype is kind and made.shape == shape
    for row in range(4):
        last = x[row].any(2).any(0).nonzero()
        block = int(last[-1]) // 64 if len(last) else 0
        exact = x[row, :, block * 64 : block * 64 + 64]
        assert held[row] == block and window[row, :, : exact.shape[1]].equal(exact)
    back = form.dequantize(codes, scales, torch.float32)[:, :, :S]
    span = x.float().amax((1, 2, 3)) - x.float().amin((1, 2, 3))
    assert ((back - x.float()).abs().amax((1, 2, 3)) <= span / 15 / 2 * 1.2 + 0.05).all()
    assert INT4.pack(x)[0].equal(INT4.quantize(x)[0]) and len(INT4.pack(x)) == 2


def test_an_empty_cache_by_channel():
    tensors = INT4_CHANNEL.empty(2, 3, 70, 96, dtype=torch.bfloat16)
    assert not any(each.any() for each in tensors) and tensors[2].dtype is torch.bfloat16
    assert INT4_CHANNEL.token_bytes(128) == 72 and [INT4_CHANNEL.positions(S) for S in (0, 64, 65)] == [0, 64, 128]
    assert sum(each.nbytes for each in tensors[:2]) == 2 * 3 * 128 * INT4_CHANNEL.token_bytes(96)
    found, D = kv_update.fit(*tensors)
    assert D == 96 and found == INT4_CHANNEL


def test_tensors_of_no_cache_by_channel():
    codes, scales, window, held = good = INT4_CHANNEL.empty(1, 2, 128, 32)
    kv_update.fit(*good)
    for wrong, message in (
        ((codes, scales, window, None), "a window needs held"),
        ((codes, scales, None, held), "a window needs held"),
        (
            (codes[:, :, :100], scales, window, held),
            "codes have 100 positions; expected whole blocks of the window's 64",
        ),
        ((codes, scales[:, :, :1], window, held), r"scales is .*; expected torch.bfloat16 \[1, 2, 2, 32, 2\] on cpu"),
        ((codes, scales, window[0], held), r"the window is .*; expected \[B, H, W, D\] beside codes of int4"),
        ((codes, scales, window.double(), held), r"window is torch.float64"),
        ((codes, scales, window, held.int()), r"held is torch.int32 \[1\] on cpu; expected torch.int64 \[1\]"),
        ((*INT8.empty(1, 2, 128, 32), window, held), r"the window is .* beside codes of int8; expected .* int4"),
    ):
        with pytest.raises(ValueError, match=f"kv_update: {message}"):
            kv_update.fit(*wrong)
