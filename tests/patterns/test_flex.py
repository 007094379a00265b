"""FlexAttention over caches: what its two functions say, as a rewrite of a model that uses it."""

import copy
from collections import Counter

import pytest
import torch
from aograph.kernels.kv_cache import INT8
from aograph.kernels.kv_dequantize import kv_dequantize
from aograph.kernels.kv_update import kv_update
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import aograph
from tests.programs import operators

B, H, S, D, T = 2, 2, 32, 16, 3


def capped(score, b, h, q, kv):
    return torch.tanh(score / 2.0) * 2.0


class Flex(nn.Module):
    """A layer with a cache; `visible(positions, start)` gives mask_mod, None: there is no block mask."""

    def __init__(self, visible, score_mod=None):
        super().__init__()
        self.visible, self.score_mod = visible, score_mod
        self.x = nn.Linear(64, 8 * D)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(B, H, S, D))
        self.register_buffer("num_blocks", torch.ones(1, 1, 1, dtype=torch.int32))
        self.register_buffer("blocks", torch.zeros(1, 1, 1, 1, dtype=torch.int32))

    def forward(self, x, positions, start):
        q, k, v = self.x(x).view(B, -1, 8, D).transpose(1, 2).split([4, H, H], 1)
        self.keys.index_copy_(2, positions, k)
        self.values.index_copy_(2, positions, v)
        return self.attention(q, self.keys, self.values, positions, start)

    def attention(self, q, keys, values, positions, start):
        mask = None
        if self.visible is not None:
            lengths, mask_mod = (q.shape[2], S), self.visible(positions, start)
            mask = BlockMask.from_kv_blocks(self.num_blocks, self.blocks, mask_mod=mask_mod, seq_lengths=lengths)
        return flex_attention(q, keys, values, self.score_mod, mask, scale=0.3, enable_gqa=True)


def example(tokens=T, first=8):
    return torch.randn(B, tokens, 64), torch.arange(first, first + tokens), torch.tensor([2, 5])


def causal(p, start):
    return lambda b, h, q, kv: p[q] >= kv


def by_row(p, start):
    rows = torch.stack([p, p - 3])
    return lambda b, h, q, kv: kv < rows[b, q] + 1


def offset(p, start):
    first = p[0]
    return lambda b, h, q, kv: q + first >= kv


def window(p, start):
    return lambda b, h, q, kv: (kv <= p[q]) & (p[q] - kv < 4)


def window_of_sums(p, start):
    first = p[0]
    return lambda b, h, q, kv: (q + first >= kv) & (kv > q + first - 5)


def padded(p, start):
    return lambda b, h, q, kv: (kv <= p[q]) & (kv >= start[b])


def padded_window(p, start):
    return lambda b, h, q, kv: ((kv <= p[q]) & (start[b] <= kv)) & (p[q] - 7 <= kv)


def from_a_number(p, start):
    return lambda b, h, q, kv: (kv <= p[q]) & (kv >= 3)


def row_of_rows(p, start):
    rows = torch.stack([p, p - 1]).to(torch.int32)
    return lambda b, h, q, kv: kv <= rows[b][q]


def triangle(p, start):
    return lambda b, h, q, kv: q >= kv


def by_row_alone(p, start):
    return lambda b, h, q, kv: kv <= start[b]


def unpadded(p, start):
    shown = torch.arange(S) >= start[:, None]
    return lambda b, h, q, kv: (kv <= p[q]) & shown[b, kv] & shown[b, kv - 1]


def everything(p, start):
    return lambda b, h, q, kv: b.new_ones((), dtype=torch.bool)


KNOWN = [
    causal, by_row, offset, window, window_of_sums, padded, padded_window, from_a_number, row_of_rows, triangle,
    by_row_alone, unpadded, everything, None,
]  # fmt: skip


class Layers(nn.ModuleList):
    """A layer for each mask, all on the same tokens."""

    def forward(self, *inputs):
        return [layer(*inputs) for layer in self]


def test_masks_that_are_known():
    """The same as flex_attention, for several tokens and for one; only booleans that are read are a mask."""
    model = Layers(Flex(visible, capped if visible in (causal, None) else None) for visible in KNOWN)
    fast = aograph.optimize(model, "kv8", example(), compile=False)
    assert [row.outcome for row in fast.report.caches] == ["rewritten"] * 2 * len(KNOWN), fast.report
    notes = [note for row in fast.report.caches for note in row.notes]
    assert Counter(notes) == {"the mask is a length": 2 * len(KNOWN) - 2, "its mask is passed on": 2}
    left = operators(fast._captures[0][1].program)
    assert left["aograph.kv_attention"] == len(KNOWN)
    assert not any(name in each for each in left for name in ("flex", "vmap", "batch_dim", "index_put_", "predispatch"))
    ones = Layers(copy.deepcopy(layer) for layer in model if layer.visible in (by_row, window, unpadded, triangle))
    one = aograph.optimize(ones, "kv8", compile=False)
    for layers, optimized, arguments in ((model, fast, example(5, 11)), (ones, one, example(1, 16))):
        with torch.no_grad():
            results = layers(*arguments), optimized(*arguments)
        for layer, expected, found in zip(layers, *results, strict=True):
            assert 0 < (found - expected).norm() / expected.norm() < 0.03, layer.visible


class Packed(Flex):
    """The same on caches that came packed."""

    def forward(self, x, positions, start, keys, values):
        q, k, v = self.x(x).view(B, -1, 8, D).transpose(1, 2).split([4, H, H], 1)
        read = []
        for packed, new in ((keys, k), (values, v)):
            kv_update.overload(*packed, new, positions)
            read.append(kv_dequantize.overload(*packed, x.dtype))
        return self.attention(q, *read, positions, start)


class PackedLayers(nn.ModuleList):
    def forward(self, x, positions, start, caches):
        return [layer(x, positions, start, *cache) for layer, cache in zip(self, caches, strict=True)]


def test_packed_caches_behind_torch_compile(fresh_compiler):
    """What flex_attention of the unpacked caches gives; a mask that is not known has its reason."""
    masks = [causal, padded_window, unpadded, None, documents]
    model = PackedLayers(Packed(each, capped if each in (causal, None) else None) for each in masks).eval()
    (inputs, caches), reports = (example(5, 11), [[INT8.empty(B, H, S, D) for _ in "kv"] for _ in masks]), []
    options = {"recipe": "kv8", "compile": False, "report": reports.append}
    fast = torch.compile(model, backend="aograph", fullgraph=True, options=options)
    with torch.no_grad():
        found, expected = fast(*inputs, copy.deepcopy(caches)), model(*inputs, caches)
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-4, atol=1e-5)
    rows = reports[0].caches
    assert [row.outcome for row in rows] == ["rewritten"] * 2 * len(masks[:-1]) + ["near miss"] * 2
    assert all("read by flex_attention: its mask_mod has aten.eq" in note for row in rows[-2:] for note in row.notes)


def test_a_mask_that_is_not_known_still_runs():
    """Levels of vmap stay where something is in them."""
    model = Flex(documents)
    with pytest.warns(UserWarning, match="rewrote nothing"):
        fast = aograph.optimize(model, "kv8", example(), compile=False)
    arguments = example()
    with torch.no_grad():
        torch.testing.assert_close(fast(*arguments), model(*arguments))


def documents(p, start):
    ids = torch.arange(S) // 10
    return lambda b, h, q, kv: (kv <= p[q]) & (ids[kv] == ids[p[q]])


def by_head(p, start):
    return lambda b, h, q, kv: kv <= p[q] - h


def either(p, start):
    return lambda b, h, q, kv: (kv <= p[q]) | (kv < 4)


def two(p, start):
    return lambda b, h, q, kv: (kv <= p[q]) & (kv <= start[b])


def doubled(p, start):
    return lambda b, h, q, kv: 2 * kv <= p[q]


def window_of_its_own(p, start):
    return lambda b, h, q, kv: (kv <= p[q]) & (kv > q - 4)


def floats(p, start):
    ends = p.float()
    return lambda b, h, q, kv: kv <= ends[q]


def alibi(score, b, h, q, kv):
    return score + (kv - q) * 0.1


def otherwise_capped(score, b, h, q, kv):
    return torch.tanh(score / 2.0) * 3.0


UNKNOWN = [
    (documents, None, "its mask_mod has aten.eq.Tensor"),
    (by_head, None, "not kv_idx with what depends on b and q_idx alone"),
    (either, None, "and booleans, joined by &"),
    (two, None, "has 2 bounds on how far a token sees"),
    (doubled, None, "its mask_mod has aten.mul.Tensor"),
    (window_of_its_own, None, "no window of a constant size, nor by row"),
    (floats, None, "reads torch.float32, not a tensor of integers"),
    (causal, alibi, "its score_mod does more than to cap scores by tanh: it ends in aten.add.Tensor"),
    (causal, otherwise_capped, "its score_mod does more than to cap scores by tanh"),
]


def test_functions_that_are_not_known_are_named():
    layers = Layers(Flex(visible, score_mod) for visible, score_mod, _ in UNKNOWN)
    report = aograph.explain(layers, "kv8", example())
    notes = {row.name: row.notes for row in report.caches}
    assert [row.outcome for row in report.caches] == ["near miss"] * 2 * len(UNKNOWN)
    for i, (_, _, why) in enumerate(UNKNOWN):
        assert any("read by flex_attention" in note and why in note for note in notes[f"{i}.keys"]), (notes, why)


def test_a_logsumexp_that_is_read_keeps_the_cache():
    class Two(Flex):
        def forward(self, x, positions, start):
            k = self.x(x).view(B, -1, 8, D).transpose(1, 2)[:, :H]
            self.keys.index_copy_(2, positions, k)
            self.values.index_copy_(2, positions, k)
            y, lse = flex_attention(k, self.keys, self.values, return_lse=True)
            return y * lse[..., None]

    report = aograph.explain(Two(None), "kv8", example())
    assert [row.outcome for row in report.caches] == ["near miss"] * 2, report
    assert any("getitem" in note and "1 where 0 is needed" in note for row in report.caches for note in row.notes), [
        r.notes for r in report.caches
    ]
