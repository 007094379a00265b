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


@each
def test_behind_torch_compile_and_export(form, fresh_compiler):
    new, positions = torch.randn(B, H, 2, D), torch.tensor([4, 7])
    expected = written(form, new, positions)[1]
    compiled = Cache(form)
    total = torch.compile(compiled, fullgraph=True)(new, positions)
    assert same((compiled.codes, compiled.scales), expected) and total > 0
    tokens = torch.export.Dim("T", max=S)
    exported = torch.export.export(
        Cache(form), (new, positions), dynamic_shapes=({2: tokens}, {0: tokens}), strict=False
    ).module()
    exported(new[:, :, :1], positions[:1])
    exported(new[:, :, 1:], positions[1:])
    assert same((exported.codes, exported.scales), expected)


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
