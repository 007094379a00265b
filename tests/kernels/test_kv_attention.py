"""kv_attention against float64 by torch's own attention, by each implementation, over caches that hurt."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from aograph.kernels import kv_attention as module
from aograph.kernels.kv_attention import kv_attention as op
from aograph.kernels.kv_cache import FP8, INT4, INT4_CHANNEL, INT8, CacheCase, KVFormat
from aograph.kernels.kv_update import kv_update

FORMATS = [INT8, FP8, INT4, KVFormat("int8", 8, 32)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of the norm: y's own rounding
each = pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.name}-{form.group_size}")
floats = pytest.mark.parametrize("dtype", TOLERANCE)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(module, "SCORES", {"cpu": 1 << 10})


def caches(form, B, H, S, D, Dv=None, values=None):
    """k, k_scales, v, v_scales of random tokens."""
    values = values or form
    return *form.quantize(torch.randn(B, H, S, D)), *values.quantize(torch.randn(B, H, S, Dv or D) + 0.3)


def expected_of(
    q, k, k_scales, v, v_scales, positions, start, mask, scale, softcap, window, k_window=None, held=None, sinks=None,
    new_k=None, new_v=None, stored=None,
):  # fmt: skip
    """One token at a time, in float64, over nothing but the positions that it sees."""
    keys, values = op.format_of(k, k_scales, k_window), op.format_of(v, v_scales)
    (B, Hq, T, _), (_, H, S, _) = q.shape, v.shape
    k, v = keys.dequantize(k, k_scales, torch.float64), values.dequantize(v, v_scales, torch.float64)
    for b in range(B if k_window is not None else 0):
        first = int(held[b]) * keys.block
        k[b, :, first : first + keys.block] = k_window[b].double()
    for b, t in itertools.product(range(B), range(T if T > 16 and stored is not None else 0)):
        p = int(stored[t] if stored.dim() == 1 else stored[b, t])
        k[b, :, p], v[b, :, p] = new_k[b, :, t].double(), new_v[b, :, t].double()
    y = torch.zeros(B, Hq, T, v.shape[3], dtype=torch.float64)
    for b, h, t in itertools.product(range(B), range(Hq), range(T)):
        p = int(positions[b, t])
        first = max(0 if start is None else int(start[b]), p - window + 1 if window > 0 else 0)
        places = [s for s in range(max(first, 0), min(p + 1, S))]
        bias = torch.zeros(len(places), dtype=torch.float64)
        if mask is not None:
            row = mask[tuple(i if size > 1 else 0 for i, size in zip((b, h, t), mask.shape[:3], strict=True))]
            if mask.dtype is torch.bool:
                places = [s for s in places if row[s]]
                bias = bias[: len(places)]
            else:
                bias = row[places].double()
        if places:
            group = h // (Hq // H)
            scores = k[b, group, places] @ q[b, h, t].double() * scale
            scores = (torch.tanh(scores / softcap) * softcap if softcap else scores) + bias
            if sinks is not None:
                scores = torch.cat([scores, sinks[h, None].double()])
            y[b, h, t] = scores.softmax(0).nan_to_num(0)[: len(places)] @ v[b, group, places]
    return y


def check(*arguments):
    expected, q = expected_of(*arguments), arguments[0]
    for each in op:
        if each.supports(op.case_of(*arguments)) is True:
            y = op.run(*arguments, implementation=each.name)
            assert y.dtype is q.dtype and y.shape == expected.shape, each.name
            assert (y.double() - expected).norm() <= TOLERANCE[q.dtype] * expected.norm(), each.name
            assert (y[expected == 0] == 0).all(), each.name


@each
@floats
@pytest.mark.parametrize("T", [1, 3, 16])
def test_ragged_lengths(form, dtype, T):
    """Lengths of one token, of a block, of nearly two and of all; query heads 1, 4 and 8 for a KV head."""
    B, H, S, D = 4, 2, 37, 64
    ends = torch.tensor([0, 15, 30, S - 1])
    positions = ends[:, None] - torch.arange(T).flip(0)
    for G in (1, 4, 8):
        q = torch.randn(B, T, G * H, D).to(dtype).transpose(1, 2)
        check(q, *caches(form, B, H, S, D), positions, None, None, D**-0.5, 0.0, 0)


@each
@pytest.mark.parametrize("D", [16, 64, 80, 96, 128, 256])
def test_head_sizes(form, D):
    form = KVFormat(form.name, form.bits, 16 if D % 32 else form.group_size)
    q = torch.randn(1, 4, 2, D)
    positions = torch.tensor([[20, 21]])
    check(q, *caches(form, 1, 2, 40, D), positions, None, None, 0.1, 0.0, 0)
    check(q, *caches(form, 1, 2, 40, D, 32), positions, None, None, 0.1, 0.0, 0)


def test_keys_and_values_in_formats_of_their_own():
    q = torch.randn(2, 4, 3, 64)
    positions = torch.randint(0, 40, (2, 3))
    for keys, values in itertools.permutations(FORMATS, 2):
        check(q, *caches(keys, 2, 2, 40, 64, values=values), positions, None, None, 0.1, 0.0, 0)


@each
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("window", [0, 1, 9, 1000])
@pytest.mark.parametrize("padded", [False, True])
def test_padding_windows_and_softcap(form, padded, window, softcap):
    B, H, S, D, T = 3, 2, 40, 32, 3
    start = torch.tensor([0, 17, 33]) if padded else None
    positions = torch.tensor([[3, 4, 5], [18, 25, 20], [38, 39, 32]])
    check(torch.randn(B, 2 * H, T, D) * 3, *caches(form, B, H, S, D), positions, start, None, 0.3, softcap, window)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("tokens", [1, 20])
def test_masks(dtype, rows, heads, tokens):
    B, H, Hq, S, D, T = 2, 2, 4, 40, 32, 20
    mask = torch.rand(rows, heads, tokens, S) < 0.3
    mask[:, :, 3:4], mask[:, :, 4:5, 16:32] = False, False
    if dtype is not torch.bool:
        mask = (torch.randn(mask.shape).masked_fill(~mask, -math.inf)).to(dtype)
    q = torch.randn(B, Hq, T, D)
    for positions in (torch.full((B, T), S - 1), torch.randint(-1, S, (B, T))):
        check(q, *caches(INT8, B, H, S, D), positions, torch.tensor([0, 5]), mask, 0.2, 0.0, 25)


@each
@floats
@pytest.mark.parametrize("sinks", [torch.float32, torch.bfloat16])
def test_sinks(form, dtype, sinks):
    """As large as scores, far above and far below them, none at all; tokens that see nothing are zeros."""
    B, H, S, D, T = 3, 2, 40, 32, 3
    logits = torch.tensor([0.5, 3.0, 200.0, -200.0, -math.inf, 0.0]).to(sinks)
    positions = torch.tensor([[3, 4, 5], [18, 25, 20], [38, -1, 32]])
    q = torch.randn(B, 3 * H, T, D).to(dtype)
    mask = torch.rand(B, 1, T, S) < 0.5
    for start, seen, softcap, window in ((None, None, 0.0, 0), (torch.tensor([0, 17, 33]), mask, 2.0, 9)):
        tensors = caches(form, B, H, S, D)
        check(q, *tensors, positions, start, seen, 0.3, softcap, window, None, None, logits)
    by_head, held = by_channel(B, H, S, D, [0, 3, 4])
    check(q, *by_head, positions, None, None, 0.3, 0.0, 0, *held, logits)


def test_nan_in_a_sink_comes_out_in_its_head():
    positions, sinks = torch.tensor([[20]]), torch.tensor([0.0, math.nan, 1.0, 2.0])
    for name in ("reference", "blocks"):
        arguments = torch.randn(1, 4, 1, 32), *caches(INT8, 1, 2, 40, 32), positions, None, None, 0.3, 0.0, 0
        y = op.run(*arguments, None, None, sinks, implementation=name)
        assert y.isnan().all(-1).flatten().tolist() == [False, True, False, False]


def test_the_meaning_is_that_of_scaled_dot_product_attention():
    B, H, S, D = 2, 2, 40, 64
    k, k_scales, v, v_scales = caches(INT4, B, H, S, D)
    q, positions = torch.randn(B, 8, S, D), torch.arange(S).expand(B, -1)
    keys, values = INT4.dequantize(k, k_scales, torch.float32), INT4.dequantize(v, v_scales, torch.float32)
    expected = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(op(q, k, k_scales, v, v_scales, positions, None, None, D**-0.5, 0.0, 0), expected)


@each
def test_what_no_token_sees_does_not_matter(form):
    B, H, S, D = 2, 2, 40, 64
    k, k_scales, v, v_scales = caches(form, B, H, S, D)
    positions, start = torch.tensor([[17], [20]]), torch.tensor([2, 3])
    arguments = torch.randn(B, 4, 1, D), positions, start
    for name in ("reference", "blocks"):
        ys = []
        for bad in (0.0, math.nan, math.inf):
            for each in (k_scales, v_scales):
                each[0, :, 18:], each[0, :, :2], each[1, :, 21:], each[1, :, :3] = bad, bad, bad, bad
            q, *seen = arguments
            ys.append(op.run(q, k, k_scales, v, v_scales, *seen, None, 0.1, 0.0, 0, implementation=name))
        assert ys[0].isfinite().all() and ys[0].equal(ys[1]) and ys[0].equal(ys[2])
        k_scales[0, :, 18:], v_scales[0, :, 18:] = 0, 0
        k_scales[1, :, 21:], v_scales[1, :, 21:] = 0, 0
        k_scales[:, :, :3], v_scales[:, :, :3] = 0, 0


@each
@pytest.mark.parametrize("which", [1, 3])
def test_nan_that_is_seen_comes_out(form, which):
    tensors = list(caches(form, 2, 2, 40, 64))
    tensors[which][0, 1, 5] = math.nan
    for name in ("reference", "blocks"):
        y = op.run(
            torch.randn(2, 4, 1, 64), *tensors, torch.full((2, 1), 30), None, None, 0.1, 0.0, 0, implementation=name
        )
        assert y[0, 2:].isnan().any(-1).all() and y[0, :2].isfinite().all() and y[1].isfinite().all()


@each
def test_scores_that_are_large(form):
    """Softmax over scores far apart: as large as fp32 takes without its maximum taken off."""
    k, k_scales, v, v_scales = caches(form, 1, 2, 40, 64)
    check(torch.randn(1, 4, 2, 64) * 1e3, k, k_scales, v, v_scales, torch.tensor([[30, 39]]), None, None, 1.0, 0.0, 0)


def test_nothing_to_compute():
    for B, T, S in ((0, 1, 8), (2, 0, 8), (2, 1, 0)):
        positions = torch.zeros(B, T, dtype=torch.int64)
        for name in ("reference", "blocks"):
            arguments = torch.randn(B, 4, T, 32), *caches(INT8, B, 2, S, 32), positions, None, None, 0.1, 0.0, 0
            assert op.run(*arguments, implementation=name).equal(torch.zeros(B, 4, T, 32))


def test_no_more_of_the_cache_is_read_than_is_seen(monkeypatch):
    read = []
    dequantize = KVFormat.dequantize
    monkeypatch.setattr(
        KVFormat, "dequantize", lambda self, codes, *_: read.append(codes.shape[2]) or dequantize(self, codes, *_)
    )
    tensors = caches(INT8, 2, 2, 1000, 32)
    positions, start = torch.tensor([[500], [510]]), torch.tensor([480, 490])
    op(torch.randn(2, 4, 1, 32), *tensors, positions, start, None, 0.1, 0.0, 0)
    assert read and max(read) <= 16 and sum(read) == 2 * (511 - 480)
    read.clear()
    op(torch.randn(2, 4, 1, 32), *tensors, positions, None, None, 0.1, 0.0, 5)
    assert sum(read) == 2 * (511 - 496)


def test_arguments_that_do_not_fit():
    B, H, S, D = 2, 2, 8, 32
    k, k_scales, v, v_scales = caches(INT8, B, H, S, D)
    q, positions = torch.randn(B, 4, 3, D), torch.zeros(B, 3, dtype=torch.int64)
    good = {
        "q": q, "k": k, "k_scales": k_scales, "v": v, "v_scales": v_scales, "positions": positions, "start": None,
        "mask": None, "scale": 0.1, "softcap": 0.0, "window": 0, "k_window": None, "k_held": None, "sinks": None,
        "new_k": q[:, :2], "new_v": q[:, :2], "stored": positions,
    }  # fmt: skip
    op(*good.values())
    for change, message in (
        ({"q": q[:, :3]}, "q has 3 heads; expected a multiple of the 2 KV heads"),
        ({"q": q[..., :16]}, r"q is .*\[2, 4, 3, 16\].* expected .*\[2, any, any, 32\]"),
        ({"q": q.double()}, "q is torch.float64"),
        ({"v": v[:, :, 1:], "v_scales": v_scales[:, :, 1:]}, r"v is .*\[2, 2, 7, 32\].* expected .*\[2, 2, 8, any\]"),
        ({"positions": positions[0]}, r"positions is .*\[3\] on cpu; expected torch.int64 \[2, 3\]"),
        ({"start": positions}, r"start is .*\[2, 3\] on cpu; expected torch.int64 \[2\]"),
        ({"mask": torch.zeros(3, S)}, r"mask is .*\[3, 8\] on cpu; expected .*\[2, 4, 3, 8\] or \[2, 1, 3, 8\]"),
        ({"mask": torch.zeros(B, 1, 3, S, dtype=torch.int32)}, "mask is torch.int32"),
        ({"sinks": torch.zeros(2)}, r"sinks is .*\[2\] on cpu; expected .*\[4\]"),
        ({"new_v": None}, "new_v missing; expected new_k, new_v, stored or none of them"),
        ({"new_k": q}, r"new_k is .*\[2, 4, 3, 32\] on cpu; expected .*\[2, 2, 3, 32\]"),
        ({"new_v": q[:, :2, :2]}, r"new_v is .*\[2, 2, 2, 32\] on cpu; expected .*\[2, 2, 3, 32\]"),
        ({"stored": positions[:, 0]}, r"stored is .*\[2\] on cpu; expected torch.int64 \[2, 3\] or \[3\]"),
    ):
        with pytest.raises(ValueError, match=f"kv_attention: {message}"):
            op(*(good | change).values())


@each
def test_the_case_and_the_registration(form):
    tensors = caches(form, 2, 2, 8, 64, 32)
    positions, mask = torch.tensor([[3, 4], [5, 6]]), torch.ones(2, 1, 2, 8, dtype=torch.bool)
    arguments = torch.randn(2, 4, 2, 64).bfloat16(), *tensors, positions, None, mask, 0.1, 2.0, 0
    g = form.group_size
    keys, values = KVFormat(form.name, form.bits, g or 64), KVFormat(form.name, form.bits, g or 32)
    expected = CacheCase(
        "cpu", torch.bfloat16, 2, 32, 64, rows=2, heads=2, queries=2, length=8, keys=keys, values=values, softcap=True,
        mask=torch.bool,
    )  # fmt: skip
    assert op.case_of(*arguments) == expected
    assert op.availability("cpu")[-2:] == [("blocks", True), ("reference", True)]
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks += ["test_schema"] if form is not FP8 else []  # it cannot compare float8
    torch.library.opcheck(op.overload, arguments, test_utils=checks)


CASE = CacheCase("cpu", torch.float32, None, 32, 32)


class Attention(torch.nn.Module):
    """One layer of a decoder that keeps its own packed cache."""

    def __init__(self, form, update, attend):
        super().__init__()
        self.update, self.attend = update, attend
        for of in ("k", "v"):
            for name, tensor in zip((of, f"{of}_scales"), form.empty(2, 2, 24, 32), strict=True):
                self.register_buffer(name, tensor)

    def forward(self, x, positions):
        self.update(self.k, self.k_scales, x[:, :2], positions)
        self.update(self.v, self.v_scales, x[:, 2:], positions)
        cache = self.k, self.k_scales, self.v, self.v_scales
        return self.attend(x, *cache, positions, None, None, 32**-0.5, 0.0, 0)


def steps(layer, x):
    """Four tokens, then one by one."""
    parts = [slice(0, 4), *(slice(t, t + 1) for t in range(4, x.shape[2]))]
    positions = [torch.arange(p.start, p.stop).repeat(2, 1) for p in parts]
    return torch.cat([layer(x[:, :, p].contiguous(), at) for p, at in zip(parts, positions, strict=True)], 2)


class Layers(torch.nn.ModuleList):
    """A layer of each format, all on the same tokens: their outputs along a dimension behind the last."""

    def __init__(self, update, attend):
        super().__init__(Attention(form, update, attend) for form in FORMATS)

    def forward(self, x, positions):
        return torch.stack([layer(x, positions) for layer in self], -1)


def test_decoding_step_by_step_in_graphs(fresh_compiler):
    """The same in eager mode, compiled, exported, and exported as torch's own operators."""
    x = torch.randn(2, 4, 20, 32)
    expected = steps(Layers(kv_update, op), x)
    for form, y in zip(FORMATS, expected.unbind(-1), strict=True):
        k, v = (form.dequantize(*form.quantize(part), torch.float32) for part in (x[:, :2], x[:, 2:]))
        torch.testing.assert_close(y, F.scaled_dot_product_attention(x, k, v, is_causal=True, enable_gqa=True))
    ops = torch.ops.aograph.kv_update, torch.ops.aograph.kv_attention
    torch.testing.assert_close(steps(torch.compile(Layers(*ops), fullgraph=True), x), expected)
    parts = [lambda *args, op=op: op.apply(op.standalone(CASE, 1, 24), *args) for op in (kv_update, op)]
    dim = torch.export.Dim("T", max=24)
    for made in (ops, parts):
        example = x[:, :, :3].contiguous(), torch.arange(3).repeat(2, 1)
        exported = torch.export.export(Layers(*made), example, dynamic_shapes=({2: dim}, {1: dim}), strict=False)
        assert any("aograph" in str(node.target) for node in exported.graph.nodes) == (made is ops)
        torch.testing.assert_close(steps(exported.module(), x), expected)


# --- tokens as they were before they were stored ------------------------------------------------------------


def fresh(B, H, stored, D, Dv=None, dtype=torch.float32):
    """new_k, new_v, stored: tokens unlike what any cache holds of them, neighbours in memory by token."""
    T = stored.shape[-1]
    new = [torch.randn(B, T, H, size).to(dtype).transpose(1, 2) * 2 for size in (D, Dv or D)]
    return *new, stored


@each
@floats
def test_many_tokens_are_read_as_they_were(form, dtype):
    """Over blocks of 16 positions, at the front, in the middle and at the end; 1, 4 and 8 query heads."""
    B, H, S, D = 3, 2, 70, 32
    for T, G in ((17, 1), (17, 8), (33, 4)):
        stored = torch.tensor([0, 20, S - T])[:, None] + torch.arange(T)
        q = torch.randn(B, T, G * H, D).to(dtype).transpose(1, 2)
        arguments = q, *caches(form, B, H, S, D), stored, None, None, D**-0.5, 0.0, 0
        check(*arguments, None, None, None, *fresh(B, H, stored, D, dtype=dtype))
    check(*arguments, None, None, None, *fresh(B, H, torch.randperm(S)[:T], D))


@pytest.mark.parametrize("keys", ["by token", "by channel"])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [None, torch.bool, torch.float32])
def test_what_many_tokens_see(keys, window, softcap, dtype):
    """Padded rows, whose positions are not where they were stored, masks and sinks; a row that sees no token."""
    B, H, S, D, T = 3, 2, 38, 32, 18
    stored = torch.tensor([3, 0, 20])[:, None] + torch.arange(T)
    positions = stored + torch.tensor([4, -2, -100])[:, None]
    mask = None if dtype is None else torch.rand(B, 1, T, S) < 0.6
    if dtype is torch.float32:
        mask = torch.randn(mask.shape).masked_fill(~mask, -math.inf)
    if keys == "by token":
        tensors, held = caches(INT4, B, H, S, D), (None, None)
    else:
        tensors, held = by_channel(B, H, S, D, [2, 2, 4])
    arguments = torch.randn(B, 2 * H, T, D), *tensors, positions, torch.tensor([0, 5, 0]), mask, 0.3, softcap, window
    check(*arguments, *held, None if softcap else torch.randn(2 * H), *fresh(B, H, stored, D))


def test_few_tokens_read_themselves_back():
    stored = torch.arange(3, 20)
    for T, same in ((16, True), (17, False)):
        arguments = torch.randn(2, 4, T, 32), *caches(INT8, 2, 2, 40, 32), stored[:T].expand(2, -1)
        arguments = *arguments, None, None, 0.2, 0.0, 0
        for name in ("reference", "blocks"):
            expected = op.run(*arguments, implementation=name)
            new = fresh(2, 2, stored[:T], 32)
            assert op.run(*arguments, None, None, None, *new, implementation=name).equal(expected) == same


def test_nan_in_tokens_comes_out_where_they_are_seen():
    stored = torch.arange(20, 38)
    q, tensors = torch.randn(2, 4, 18, 32), caches(INT8, 2, 2, 40, 32)
    positions = stored.expand(2, -1).clamp(max=36)
    for name in ("reference", "blocks"):
        for place, seen in ((17, False), (16, True)):
            for which in (0, 1):
                new = fresh(2, 2, stored, 32)
                new[which][0, 1, place] = math.nan
                arguments = q, *tensors, positions, None, None, 0.2, 0.0, 0, None, None, None, *new
                y = op.run(*arguments, implementation=name)
                assert bool(y[0, 2:, -1].isnan().all()) == seen and y[0, :2].isfinite().all() and y[1].isfinite().all()


def test_outliers_of_new_tokens_are_not_rounded():
    """A cache in int4 whose tokens have one channel that is far larger: rounded, all the others suffer."""
    B, H, S, D, T = 1, 2, 40, 32, 39
    x = torch.randn(2, B, H, S, D)
    x[..., 3] *= 100
    packed = [tensor for each in x for tensor in INT4.quantize(each)]
    q, positions = torch.randn(B, H, T, D), torch.arange(S - T, S)
    seen = positions[None], None, None, 0.02, 0.0, 0
    expected = F.scaled_dot_product_attention(q, *x, torch.arange(S) <= positions[:, None], scale=0.02)
    new = *(each[:, :, -T:] for each in x), positions
    found = [op(q, *packed, *seen, None, None, None, *last) for last in ((None,) * 3, new)]
    rounded, exact = ((each - expected)[..., 8:].norm() for each in found)
    assert exact < rounded / 2


class Prompt(torch.nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.attend = attend

    def forward(self, q, new_k, new_v, stored, *tensors):
        seen = stored, None, None, 0.2, 0.0, 0
        packed, held = tensors[:4], tensors[4:] or (None, None)
        return self.attend(q, *packed, *seen, *held, None, new_k, new_v, stored)


def test_in_a_graph_the_number_of_tokens_decides():
    B, H, S, D = 2, 2, 40, 32
    dim = torch.export.Dim("T", max=S)
    for tensors, held in ((caches(INT8, B, H, S, D), ()), by_channel(B, H, S, D, [1, 2])):
        given = *tensors, *held
        shapes = *({2: dim},) * 3, {1: dim}, ({},) * len(given)

        def inputs(T, given=given):
            stored = torch.arange(2, T + 2).repeat(B, 1)
            return torch.randn(B, 4, T, D), *fresh(B, H, stored, D), *given

        example = [each.contiguous() for each in inputs(3)]
        traced = Prompt(lambda *args: op.apply(op.standalone(CASE, 1, S), *args))
        exported = torch.export.export(traced, tuple(example), dynamic_shapes=shapes, strict=False)
        for T in (3, 16, 17, 30):
            call = [each.contiguous() for each in inputs(T)]
            torch.testing.assert_close(exported.module()(*call), Prompt(op)(*call))


# --- keys by channel ---------------------------------------------------------------------------------------


def by_channel(B, H, S, D, held, block=8, values=INT4, dtype=torch.float32):
    """The packed tensors of keys by channel and of values, and then the window and what it holds: random blocks."""
    form = KVFormat("int4", 4, block=block)
    k, k_scales, window, _ = form.pack(torch.randn(B, H, S, D) * 3)
    window = torch.randn_like(window).to(dtype)  # unlike the codes of that block, which say nothing
    return (k, k_scales, *values.quantize(torch.randn(B, H, S, 32))), (window, torch.tensor(held))


@floats
@pytest.mark.parametrize("T", [1, 3, 20])
@pytest.mark.parametrize("S", [8, 37, 40])
@pytest.mark.parametrize("block", [1, 5, 8, 16, 64])
def test_keys_by_channel(block, S, T, dtype):
    """Windows at the front, at the end and behind positions that tokens see; query heads 1 and 4 for a KV head."""
    B, H, D = 4, 2, 32
    last = (S - 1) // block
    positions = torch.tensor([S - 1, S // 2, 2, S - 1])[:, None] - torch.arange(T).flip(0)
    for G in (1, 4):
        tensors, window = by_channel(B, H, S, D, [last, min(1, last), last, 0], block, dtype=dtype)
        q = torch.randn(B, T, G * H, D).to(dtype).transpose(1, 2)
        check(q, *tensors, positions, None, None, D**-0.5, 0.0, 0, *window)


@pytest.mark.parametrize("values", FORMATS)
@pytest.mark.parametrize("window", [0, 1, 9, 1000])
@pytest.mark.parametrize("padded", [False, True])
def test_padding_windows_and_masks_with_keys_by_channel(padded, window, values):
    B, H, S, D, T = 3, 2, 38, 32, 3
    start = torch.tensor([0, 17, 33]) if padded else None
    positions = torch.tensor([[3, 4, 5], [18, 25, 20], [35, 37, 34]])
    for mask in (None, torch.rand(B, 1, T, S) < 0.5):
        tensors, held = by_channel(B, H, S, D, [0, 3, 4], values=values)
        check(torch.randn(B, 2 * H, T, D) * 3, *tensors, positions, start, mask, 0.3, 2.0, window, *held)


@pytest.mark.parametrize("name", ["reference", "blocks"])
def test_blocks_that_no_token_sees_do_not_matter(name):
    (k, k_scales, v, v_scales), (window, held) = by_channel(2, 2, 40, 32, [2, 0])
    q, positions, start = torch.randn(2, 4, 1, 32), torch.tensor([[17], [20]]), torch.tensor([8, 8])
    ys = []
    for bad in (0.0, math.nan):
        k_scales[:, :, 3:], k_scales[:, :, 0], window[0, :, 2:], window[1] = bad, bad, bad, bad
        k_scales[0, :, 2] = bad  # the codes of what is in the window
        arguments = q, k, k_scales, v, v_scales, positions, start, None, 0.1, 0.0, 0, window, held
        ys.append(op.run(*arguments, implementation=name))
    assert ys[0].isfinite().all() and ys[0].equal(ys[1])


@pytest.mark.parametrize("name", ["reference", "blocks"])
def test_nan_in_a_window_comes_out(name):
    tensors, (window, held) = by_channel(2, 2, 40, 32, [2, 2])
    window[0, 1, 1, 5] = math.nan
    arguments = torch.full((2, 1), 30), None, None, 0.1, 0.0, 0
    y = op.run(torch.randn(2, 4, 1, 32), *tensors, *arguments, window, held, implementation=name)
    assert y[0, 2:].isnan().any(-1).all() and y[0, :2].isfinite().all() and y[1].isfinite().all()


def test_nothing_to_compute_by_channel():
    for B, T, S in ((0, 1, 8), (2, 0, 8), (2, 1, 0)):
        k, k_scales, *window = INT4_CHANNEL.empty(B, 2, S, 32)
        positions = torch.zeros(B, T, dtype=torch.int64)
        kv_update(k, k_scales, torch.randn(B, 2, 0, 32), positions[:, :0], *window)
        for name in ("reference", "blocks"):
            arguments = (
                torch.randn(B, 4, T, 32),
                k,
                k_scales,
                *INT8.empty(B, 2, S, 32),
                positions,
                None,
                None,
                0.1,
                0.0,
                0,
            )
            assert op.run(*arguments, *window, implementation=name).equal(torch.zeros(B, 4, T, 32))
    codes, scales, *window = INT4_CHANNEL.empty(0, 2, 8, 32)
    kv_update(codes, scales, torch.randn(0, 2, 3, 32), torch.arange(3), *window)


def test_arguments_by_channel():
    (k, k_scales, v, v_scales), (window, held) = by_channel(2, 2, 37, 32, [0, 4])
    q, positions = torch.randn(2, 4, 3, 32).bfloat16(), torch.zeros(2, 3, dtype=torch.int64)
    rest = positions, None, None, 0.1, 0.0, 0
    good = q, k, k_scales, v, v_scales, *rest, window, held
    keys = KVFormat("int4", 4, block=8)
    case = CacheCase(
        "cpu",
        torch.bfloat16,
        3,
        32,
        32,
        rows=2,
        heads=2,
        queries=2,
        length=37,
        keys=keys,
        values=KVFormat("int4", 4, 32),
    )
    assert op.case_of(*good) == case
    torch.library.opcheck(op.overload, good)
    for wrong, message in (
        (
            (q, k, k_scales, v[:, :, :32], v_scales[:, :, :32], *rest, window, held),
            r"v is .*expected .*\[2, 2, 40, any\]",
        ),
        ((q, k, k_scales, v, v_scales, *rest, window, None), "a window needs held"),
        ((q, k, k_scales, v, v_scales, *rest, window[:, :1], held), r"window is .*expected .*\[2, 2, 8, 32\]"),
    ):
        with pytest.raises(ValueError, match=f"kv_attention: {message}"):
            op(*wrong)


class ByChannel(torch.nn.Module):
    """One layer of a decoder that keeps its keys by channel."""

    def __init__(self, update, attend):
        super().__init__()
        self.update, self.attend = update, attend
        named = zip(("k", "k_scales", "window", "held"), INT4_CHANNEL.empty(2, 2, 140, 32), strict=True)
        for name, tensor in (*named, *zip(("v", "v_scales"), INT8.empty(2, 2, 140, 32), strict=True)):
            self.register_buffer(name, tensor)

    def forward(self, x, positions):
        self.update(self.k, self.k_scales, x[:, :2], positions, self.window, self.held)
        self.update(self.v, self.v_scales, x[:, 2:], positions)
        cache = self.k, self.k_scales, self.v, self.v_scales
        return self.attend(x, *cache, positions, None, None, 32**-0.5, 0.0, 0, self.window, self.held)


def test_decoding_by_channel_in_graphs(fresh_compiler):
    """Over two whole blocks and into a third that is no whole one."""
    x = torch.randn(2, 4, 140, 32)
    expected = steps(ByChannel(kv_update, op), x)
    v = INT8.dequantize(*INT8.quantize(x[:, 2:]), torch.float32)
    blocks = INT4_CHANNEL.dequantize(*INT4_CHANNEL.quantize(x[:, :2, :128]), torch.float32)
    for t in (2, 63, 64, 100, 127, 128, 139):
        whole = t // 64 * 64
        k = torch.cat([blocks[:, :, :whole], x[:, :2, whole : t + 1]], 2)
        y = F.scaled_dot_product_attention(x[:, :, t : t + 1], k, v[:, :, : t + 1], enable_gqa=True)
        torch.testing.assert_close(expected[:, :, t : t + 1], y)
    ops = torch.ops.aograph.kv_update, torch.ops.aograph.kv_attention
    torch.testing.assert_close(steps(torch.compile(ByChannel(*ops), fullgraph=True), x), expected)
    parts = [lambda *args, op=op: op.apply(op.standalone(CASE, 1, 140), *args) for op in (kv_update, op)]
    dim = torch.export.Dim("T", max=140)
    for made in (ops, parts):
        example = x[:, :, :3].contiguous(), torch.arange(3).repeat(2, 1)
        exported = torch.export.export(ByChannel(*made), example, dynamic_shapes=({2: dim}, {1: dim}), strict=False)
        torch.testing.assert_close(steps(exported.module(), x), expected)


def test_a_gpu_is_not_waited_for_by_channel():
    """Tensors on meta have no values that could be asked for."""
    k, k_scales, *window = INT4_CHANNEL.empty(2, 2, 140, 32, "meta")
    q, positions = torch.empty(2, 4, 3, 32, device="meta"), torch.empty(2, 3, dtype=torch.int64, device="meta")
    arguments = q, k, k_scales, *INT8.empty(2, 2, 140, 32, "meta"), positions, positions[:, 0], None, 0.1, 0.0, 0
    assert op["blocks"].function(*arguments, *window).shape == (2, 4, 3, 32)
