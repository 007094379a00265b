"""packed_attention: attention on caches that came packed."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from aograph.kernels.kv_attention import kv_attention
from aograph.kernels.kv_cache import INT4, INT4_CHANNEL, INT8
from aograph.kernels.kv_dequantize import kv_dequantize
from aograph.kernels.kv_update import kv_update
from torch import nn

from aograph import pipeline
from aograph.recipe import Recipe
from tests.programs import find, operators, program_of

B, H, HQ, S, D, T = 2, 2, 4, 128, 64, 3


class Given(nn.Module):
    """Attention on a packed cache: `read(q, keys, values, mask)`."""

    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, q, new, positions, mask, *caches):
        found = []
        for codes, scales, *window in (caches[:-2], caches[-2:]):
            kv_update.overload(codes, scales, new, positions, *window)
            found.append(kv_dequantize.overload(codes, scales, new.dtype, *window))
        return self.read(q, *found, mask)


def sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def inputs(form, first=0, mask=None, tokens=T):
    positions = torch.arange(first, first + tokens)
    mask = torch.arange(S) <= positions[:, None] if mask is None else mask
    caches = [*form.empty(B, H, S, D), *replace(form, block=None).empty(B, H, S, D)]
    return torch.randn(B, HQ, tokens, D), torch.randn(B, H, tokens, D), positions, mask, *caches


def rewritten(model, values):
    program = program_of(model, *values)
    report = pipeline.run(program, Recipe.of("none"))
    program.graph_module.recompile()
    return program, report


@pytest.mark.parametrize("form", [INT8, INT4, INT4_CHANNEL], ids=["int8", "int4", "channel"])
def test_attention_reads_what_is_packed(form):
    model, values = Given(sdpa), inputs(form, 5)
    program, report = rewritten(model, values)
    assert operators(program)["aograph.kv_attention"] == 1 and not operators(program)["aograph.kv_dequantize"]
    expected = model(*(each.clone() for each in values))
    (found,) = program.graph_module(*values)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    packed = sum(each.nbytes for each in values[4:])
    assert report.cache_bytes == (2 * B * H * S * D * 4, packed)
    assert [(row.outcome, row.scheme) for row in report.caches] == [("rewritten", {8: "kv8", 4: "kv4"}[form.bits])] * 2


@pytest.mark.parametrize("first", [20, (20, 50)], ids=["all rows", "each row"])
def test_a_mask_is_read_up_to_the_newest_token(first):
    values = list(inputs(INT8, 20))
    if first != 20:
        positions = values[2] + torch.tensor([[0], [first[1] - first[0]]])
        values[2:4] = positions, (torch.arange(S) <= positions[..., None])[:, None]
    program, report = rewritten(Given(sdpa), values)
    assert [row.notes for row in report.caches] == [["its mask is passed on"]] * 2
    seen = []
    program.graph_module.graph.set_codegen(torch.fx.graph.CodeGen())
    node = find(program, "aograph.kv_attention")
    node.target = lambda *args: seen.append(args[5]) or kv_attention(*args)
    program.graph_module.recompile()
    program.graph_module(*values)
    assert torch.equal(seen[0], values[2].expand(B, T)[:, -1:].expand(B, T))


@pytest.mark.parametrize("form", [INT4, INT4_CHANNEL], ids=["int4", "channel"])
@pytest.mark.parametrize("tokens", [16, 17])
def test_many_tokens_are_read_as_they_were_stored(form, tokens):
    """Of a prompt there are none that are rounded, and few tokens are told nothing."""
    values = inputs(form, tokens=tokens)
    program, _ = rewritten(Given(sdpa), values)
    q, new, _, mask, *_ = values
    expected = sdpa(q, *[F.pad(new, (0, 0, 0, S - tokens))] * 2, mask)
    found = program.graph_module(*values)[0] - expected
    fresh = find(program, "aograph.kv_attention").args[14:]
    assert len(fresh) == (3 if tokens > 16 else 0)
    assert (found.norm() < 1e-5 * expected.norm()) == (tokens > 16)


def test_a_mask_that_is_a_length():
    def read(q, k, v, positions):
        return sdpa(q, k, v, torch.arange(S) <= positions[:, None])

    values = inputs(INT8, 7, mask=torch.arange(7, 7 + T))
    program, report = rewritten(Given(read), values)
    assert [row.notes for row in report.caches] == [["the mask is a length"]] * 2
    assert find(program, "aograph.kv_attention").args[7] is None


def summed(q, k, v, mask):
    return sdpa(q, k, v, mask) + k.sum()


def biased(q, k, v, mask):
    return (q @ k.repeat_interleave(2, 1).mT + mask.double()).softmax(-1).to(v.dtype) @ v.repeat_interleave(2, 1)


@pytest.mark.parametrize(
    "read, why",
    [(summed, "read by sum"), (biased, "read by repeat_interleave: what is added to its scores is no mask")],
    ids=["another reader", "another attention"],
)
def test_what_else_reads_it_gets_it_unpacked(read, why):
    model, values = Given(read), inputs(INT8)
    program, report = rewritten(model, values)
    assert operators(program)["aograph.kv_dequantize"]
    notes = [note for row in report.caches if row.outcome == "near miss" for note in row.notes]
    assert any(why in note and "unpacked as a whole" in note for note in notes), report
    expected = model(*(each.clone() for each in values))
    torch.testing.assert_close(program.graph_module(*values)[0], expected, rtol=1e-4, atol=1e-4)


def test_it_may_not_be_written_before_the_attention():
    class Late(Given):
        def forward(self, q, new, positions, mask, *caches):
            super().forward(q, new, positions, mask, *caches)
            keys, values = (kv_dequantize.overload(*part, new.dtype) for part in (caches[:2], caches[2:]))
            kv_update.overload(*caches[:2], 2 * new, positions)
            return self.read(q, keys, values, mask)

    model, values = Late(sdpa), inputs(INT8)
    program, report = rewritten(model, values)
    assert [row.outcome for row in report.caches] == ["near miss"] * 2
    expected = model(*(each.clone() for each in values))
    torch.testing.assert_close(program.graph_module(*values)[0], expected)
