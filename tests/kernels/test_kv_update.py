"""kv_update: what is written where, in every format, and what is not."""

import pytest
import torch
from aograph.kernels.kv_cache import FP8, INT4, INT8, CacheCase, KVFormat
from aograph.kernels.kv_update import kv_update

FORMATS = [INT8, FP8, INT4, KVFormat("int8", 8, 32)]
each = pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.name}-{form.group_size}")
B, H, S, D = 2, 3, 21, 64


def written(form, new, positions, cache=None):
    """A cache after the update, and what a loop over its tokens makes of the same."""
    caches = [form.empty(B, H, S, D) if cache is None else [each.clone() for each in cache] for _ in range(2)]
    kv_update(*caches[0], new, positions)
    for b in range(B):
        for t in range(new.shape[2]):
            p = (positions if positions.dim() == 1 else positions[b])[t]
            for target, packed in zip(caches[1], form.quantize(new[b, :, t]), strict=True):
                target[b, :, p] = packed
    return caches


def same(left, right):
    return all(a.float().equal(b.float()) for a, b in zip(left, right, strict=True))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_go_to_their_positions(form, dtype):
    full = form.quantize(torch.randn(B, H, S, D))
    for T in (0, 1, 5, S):
        new = torch.randn(B, T, H, D).to(dtype).transpose(1, 2)
        rows = torch.stack([torch.randperm(S)[:T] for _ in range(B)])
        for positions in (rows, rows[0], torch.arange(S - T, S)):
            found, expected = written(form, new, positions, full)
            assert same(found, expected)
            untouched = [p for p in range(S) if p not in positions]
            assert same([each[:, :, untouched] for each in found], [each[:, :, untouched] for each in full])


@each
def test_a_cache_may_be_part_of_another(form):
    whole = form.empty(B, S, 2 * H, D)
    part = [each.transpose(1, 2)[:, ::2] for each in whole]
    new, positions = torch.randn(B, H, 4, D), torch.tensor([[3, 1, 20, 0]]).expand(B, -1)
    kv_update(*part, new, positions)
    assert same([each.contiguous() for each in part], written(form, new, positions)[1])
    assert not form.dequantize(*[each.transpose(1, 2)[:, 1::2] for each in whole], torch.float32).any()


@each
@pytest.mark.parametrize("wrong", [-1, S, 1 << 40])
def test_past_the_end_is_an_error_and_nothing_is_written(form, wrong):
    cache = form.empty(B, H, S, D)
    positions = torch.tensor([[0, 1], [2, wrong]])
    with pytest.raises(RuntimeError, match=f"kv_update: a position is outside of the cache, which holds 0 … {S - 1}"):
        kv_update(*cache, torch.ones(B, H, 2, D), positions)
    assert same(cache, form.empty(B, H, S, D))


@each
def test_writing_counts_as_a_change(form):
    cache = form.empty(B, H, S, D)
    versions = [each._version for each in cache]
    kv_update(*cache, torch.ones(B, H, 1, D), torch.tensor([3]))
    assert all(each._version > before for each, before in zip(cache, versions, strict=True))


def test_arguments_that_do_not_fit():
    codes, scales = INT8.empty(B, H, S, D)
    new, positions = torch.ones(B, H, 2, D), torch.zeros(B, 2, dtype=torch.int64)
    for arguments, message in (
        ((codes, scales, new[:1], positions), r"new is .*\[1, 3, 2, 64\] on cpu; expected .* \[2, 3, any, 64\] on cpu"),
        ((codes, scales, new.double(), positions), r"new is torch.float64"),
        (
            (codes, scales, new, positions[:, :1]),
            r"positions is torch.int64 \[2, 1\] on cpu; expected .*\[2, 2\] or \[2\]",
        ),
        ((codes, scales, new, positions.int()), r"positions is torch.int32"),
        ((codes, scales[:, :, 1:], new, positions), r"scales is .* expected torch.float32 \[2, 3, 21, 1\]"),
    ):
        with pytest.raises(ValueError, match=f"kv_update: {message}"):
            kv_update(*arguments)


@each
def test_the_case_and_the_registration(form):
    cache, new, positions = form.empty(B, H, S, D), torch.randn(B, H, 2, D).bfloat16(), torch.tensor([4, 7])
    known = KVFormat(form.name, form.bits, form.group_size or D)
    expected = CacheCase("cpu", torch.bfloat16, 2, D, D, rows=B, heads=H, length=S, keys=known, values=known)
    assert kv_update.case_of(*cache, new, positions) == expected
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks += ["test_schema"] if form is not FP8 else []  # it cannot compare float8
    torch.library.opcheck(kv_update.overload, (*cache, new, positions), test_utils=checks)


class Cache(torch.nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form
        for name, tensor in zip(("codes", "scales"), form.empty(B, H, S, D), strict=True):
            self.register_buffer(name, tensor)

    def forward(self, new, positions):
        torch.ops.aograph.kv_update(self.codes, self.scales, new, positions)
        return self.scales.float().abs().sum()


class Caches(torch.nn.ModuleList):
    """A cache of each format."""

    def __init__(self):
        super().__init__(map(Cache, FORMATS))

    def forward(self, new, positions):
        return [cache(new, positions) for cache in self]


def test_behind_torch_compile_and_export(fresh_compiler):
    new, positions = torch.randn(B, H, 2, D), torch.tensor([4, 7])
    compiled, tokens = Caches(), torch.export.Dim("T", max=S)
    totals = torch.compile(compiled, fullgraph=True)(new, positions)
    exported = torch.export.export(
        Caches(), (new, positions), dynamic_shapes=({2: tokens}, {0: tokens}), strict=False
    ).module()
    exported(new[:, :, :1], positions[:1])
    exported(new[:, :, 1:], positions[1:])
    for i, form in enumerate(FORMATS):
        expected = written(form, new, positions)[1]
        for cache in (compiled[i], exported.get_submodule(str(i))):
            assert same((cache.codes, cache.scales), expected), form
        assert totals[i] > 0


@each
def test_its_parts_in_a_graph(form):
    """What an artifact holds: torch's own operators, the check of positions among them."""

    class Parts(Cache):
        def forward(self, new, positions):
            kv_update.apply(kv_update.standalone(CASE, 1, None), self.codes, self.scales, new, positions)

    new, positions = torch.randn(B, H, 2, D), torch.tensor([4, 7])
    exported = torch.export.export(Parts(form), (new, positions), strict=False)
    assert not any("aograph" in str(node.target) for node in exported.graph.nodes)
    module = exported.module()
    module(new, positions)
    assert same((module.codes, module.scales), written(form, new, positions)[1])
    with pytest.raises(RuntimeError, match="outside of the cache"):
        module(new, positions + S)


CASE = CacheCase("cpu", torch.float32, None, D, D)


# --- by channel --------------------------------------------------------------------------------------------

CHANNEL = KVFormat("int4", 4, block=8)
both = pytest.mark.parametrize("asks", [True, False], ids=["asks", "as on a GPU"])


def state(dtype=torch.float32, filled=False, length=S):
    x = torch.randn(B, H, length, D) if filled else torch.zeros(B, H, length, D)
    return CHANNEL.pack(x.to(dtype))


def expected_of(cache, new, positions):
    """The cache after the update: token by token, each into its block as it is; all blocks but the last are rounded."""
    codes, scales, window, held = (each.clone() for each in cache)
    for b in range(B if new.shape[2] else 0):
        blocks = {int(held[b]): window[b].clone()}
        for t, p in enumerate((positions if positions.dim() == 1 else positions[b]).tolist()):
            block = last = p // 8
            if block not in blocks:
                stored = codes[b, :, block * 8 : block * 8 + 8], scales[b, :, block : block + 1]
                blocks[block] = CHANNEL.dequantize(*stored, torch.float32).to(window.dtype)
            blocks[block][:, p % 8] = new[b, :, t].to(window.dtype)
        window[b], held[b] = blocks.pop(last), last
        for block, values in blocks.items():
            codes[b, :, block * 8 : block * 8 + 8], scales[b, :, block : block + 1] = CHANNEL.quantize(values)
    return codes, scales, window, held


def values_of(cache):
    """[B, H, P, D] float64: what a cache by channel stands for."""
    codes, scales, window, held = cache
    values = CHANNEL.dequantize(codes, scales, torch.float64)
    for b, block in enumerate(held.tolist()):
        values[b, :, block * 8 : block * 8 + 8] = window[b].double()
    return values


def check(cache, steps):
    """Runs the steps (first position of each row, T) and compares the cache after each."""
    for first, T in steps:
        new = torch.randn(B, T, H, D).transpose(1, 2).to(cache[2].dtype)
        new[0, 0] *= 100
        first = torch.tensor(first).expand(B)
        positions = first[:, None] + torch.arange(T)
        expected = expected_of(cache, new, positions)
        codes, scales, window, held = cache
        kv_update(codes, scales, new, positions, window, held)
        assert held.equal(expected[3]) and window.equal(expected[2])
        assert values_of(cache).equal(values_of(expected))


@pytest.fixture
def as_asked(asks, monkeypatch):
    if not asks:
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)


STEPS = {
    "one by one": [([0, 0], 1), *(([t, t], 1) for t in range(1, S))],
    "all at once": [(0, S)],
    "whole blocks": [(0, 8), (8, 16)],
    "a prefill, then one by one": [(0, 13), *((t, 1) for t in range(13, S))],
    "in chunks": [(0, 3), (3, 3), (6, 9), (15, 2), (17, 4)],
    "ragged": [([0, 5], 6), ([6, 11], 1), ([7, 12], 1), ([8, 13], 5), ([13, 18], 3)],
    "back within a block": [(0, 6), (3, 2), (5, 1), (6, 1)],
    "back to earlier blocks": [(0, 18), ([14, 2], 1), ([15, 3], 1), ([16, 4], 3), ([19, 7], 2)],
    "back and over what was held": [(0, 18), ([6, 15], 6), ([12, 3], 9)],
    "a new beginning": [(0, 20), (0, 1), (1, 1), (2, 8), (10, 1)],
    "after padding": [([3, 14], 2), ([5, 16], 5)],
    "nothing": [(0, 3), (3, 0)],
}


@both
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_are_rounded_when_the_row_leaves_them(steps, dtype, asks, as_asked):
    for filled in (False, True):
        check(state(dtype, filled), steps)


@both
def test_random_steps(asks, as_asked):
    cache = state(filled=True)
    for _ in range(100):
        T = int(torch.randint(0, S, ()))
        check(cache, [(torch.randint(0, S - T + 1, (B,)).tolist(), T)])


@both
def test_tokens_are_exact_in_the_newest_block_and_near_in_those_before(asks, as_asked):
    cache, tokens = state(), torch.randn(B, H, S, D)
    for p in range(S):
        codes, scales, window, held = cache
        kv_update(codes, scales, tokens[:, :, p : p + 1], torch.tensor([p]), window, held)
        values, first = values_of(cache), p // 8 * 8
        assert values[:, :, first : p + 1].equal(tokens[:, :, first : p + 1].double())
        blocks = tokens[:, :, :first].unflatten(2, (-1, 8)) if first else tokens[:, :, None, :0]
        near = (blocks.amax(3) - blocks.amin(3)) / 30 * 1.1 + 0.03 if first else 0
        off = (values[:, :, :first] - tokens[:, :, :first]).abs()
        assert not first or (off.unflatten(2, (-1, 8)).amax(3) <= near).all()


@both
def test_nan_by_channel_goes_when_it_is_overwritten(asks, as_asked):
    codes, scales, window, held = cache = state()
    tokens = torch.randn(B, H, S, D)
    bad = tokens.clone()
    bad[0, 1, 4, 3] = float("nan")
    kv_update(codes, scales, bad, torch.arange(S), window, held)
    lost = values_of(cache)[:, :, :S].isnan()
    assert lost[0, 1, :8, 3].all() and lost.sum() == 8
    kv_update(codes, scales, tokens, torch.arange(S), window, held)
    assert values_of(cache).isfinite().all()


@pytest.mark.parametrize("wrong", [-1, 24, 1 << 40])
def test_past_the_end_by_channel(wrong):
    codes, scales, window, held = cache = state(filled=True)
    before = [each.clone() for each in cache]
    with pytest.raises(RuntimeError, match="kv_update: a position is outside of the cache, which holds 0 … 23"):
        kv_update(codes, scales, torch.ones(B, H, 1, D), torch.tensor([[0], [wrong]]), window, held)
    assert same(cache, before)


def test_positions_that_do_not_count_up():
    codes, scales, window, held = cache = state(filled=True)
    before = [each.clone() for each in cache]
    for positions in ([[0, 1], [2, 4]], [[1, 0], [2, 3]], [[1, 1], [1, 2]]):
        with pytest.raises(RuntimeError, match=r"do not count up by one.*keys=token"):
            kv_update(codes, scales, torch.ones(B, H, 2, D), torch.tensor(positions), window, held)
    assert same(cache, before)


def test_rows_of_a_larger_cache_by_channel():
    """A prefill of one row, as of a view of the whole."""
    codes, scales, window, held = cache = state(filled=True)
    new, before = torch.randn(1, H, 11, D), [each.clone() for each in cache]
    kv_update(codes[1:], scales[1:], new, torch.arange(11), window[1:], held[1:])
    assert same([each[:1] for each in cache], [each[:1] for each in before])
    expected = expected_of(before, new.expand(B, -1, -1, -1), torch.arange(11))
    assert values_of(cache)[1].equal(values_of(expected)[1])


def test_the_registration_by_channel():
    codes, scales, window, held = state(filled=True)
    new = torch.randn(B, H, 2, D).bfloat16()
    arguments = codes, scales, new, torch.tensor([7, 8]), window, held
    assert kv_update.case_of(*arguments).keys == CHANNEL
    torch.library.opcheck(kv_update.overload, arguments)


class ByChannel(torch.nn.Module):
    def __init__(self, update):
        super().__init__()
        self.update = update
        for name, tensor in zip(("codes", "scales", "window", "held"), state(), strict=True):
            self.register_buffer(name, tensor)

    def forward(self, new, positions):
        self.update(self.codes, self.scales, new, positions, self.window, self.held)
        return self.window.sum()

    @property
    def cache(self):
        return self.codes, self.scales, self.window, self.held


def test_by_channel_in_graphs(fresh_compiler):
    def parts(*arguments):
        kv_update.apply(kv_update.standalone(CASE, 1, None), *arguments)

    new = torch.randn(B, H, S, D)
    tokens = torch.export.Dim("T", max=S)
    for update in (torch.ops.aograph.kv_update, parts):
        exported = torch.export.export(
            ByChannel(update), (new[:, :, :3].contiguous(), torch.arange(3)), strict=False,
            dynamic_shapes=({2: tokens}, {0: tokens}),
        )  # fmt: skip
        assert any("aograph" in str(node.target) for node in exported.graph.nodes) == (update is not parts)
        modules = [exported.module()]
        if update is not parts:
            modules.append(ByChannel(update))
            modules[1].forward = torch.compile(modules[1].forward, fullgraph=True)
        for module in modules:
            expected = state()
            for first, last in ((0, 1), (1, 2), (2, 9), (9, 12), (6, 21)):
                call = new[:, :, first:last].contiguous(), torch.arange(first, last)
                module(*call)
                expected = expected_of(expected, *call)
            cache = module.codes, module.scales, module.window, module.held
            assert values_of(cache).equal(values_of(expected))


@pytest.mark.parametrize("T", [1, 5, S])
def test_a_gpu_is_not_waited_for(T):
    """Tensors on meta have no values that could be asked for."""
    codes, scales, window, held = CHANNEL.empty(B, H, S, D, "meta")
    new, positions = torch.empty(B, H, T, D, device="meta"), torch.empty(B, T, dtype=torch.int64, device="meta")
    kv_update(codes, scales, new, positions, window, held)
    kv_update.oracle.function(codes, scales, new, positions, window, held)
