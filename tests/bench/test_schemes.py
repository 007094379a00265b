import pytest
import torch

from bench.schemes import KINDS, Weights, decoded, float8_codes, int8_codes

CPU = torch.device("cpu")


def test_codes_of_int4_are_those_of_the_packed_weight():
    weights = Weights(96, 256, 64, CPU)
    pairs = weights.scale_zero().float().repeat_interleave(64, 0).permute(2, 1, 0)
    assert torch.equal((weights.codes().float() - 8) * pairs[0] + pairs[1], weights.unpacked_int4())


@pytest.mark.parametrize("quantize, largest, step", [(int8_codes, 127, 1 / 127), (float8_codes, 448, 1 / 14)])
def test_codes_reach_the_largest_and_stay_near(quantize, largest, step):
    x = torch.randn(5, 64).bfloat16()
    x[1] = 0
    x[2, 7] = 1e4
    codes, scale = quantize(x)
    found = decoded(codes, scale)
    assert codes.float().abs().amax(-1)[[0, 2, 3, 4]].tolist() == [largest] * 4
    assert torch.equal(found[1], torch.zeros(64))
    most = x.float().abs().amax(-1, keepdim=True)
    assert ((found - x.float()).abs() <= step * most * 0.5 + 1e-6).all()


def test_what_is_pruned_keeps_the_two_largest_of_four():
    weights = Weights(16, 64, 64, CPU)
    weights.plain[0, :4] = torch.tensor([1.0, -1, 1, 1])
    groups, kept = weights.plain.view(-1, 4), weights.pruned.view(-1, 4)
    assert weights.pruned[0, :4].tolist() == [1, -1, 0, 0]  # of equal ones the first
    assert ((kept != 0).sum(1) == 2).all()
    assert torch.equal(kept[kept != 0], groups[kept != 0])
    assert torch.equal(kept.abs().sum(1), groups.abs().sort(1).values[:, 2:].sum(1))


@pytest.mark.parametrize("kind, most", [("int8", 0.01), ("int8dq", 0.01), ("float8wo", 0.04), ("float8dq", 0.04)])
def test_weights_of_8_bits_are_near(kind, most):
    weights = Weights(64, 256, 64, CPU)
    plain = weights.plain.float()
    assert 0 < (KINDS[kind].weight(weights) - plain).norm() / plain.norm() < most


def test_sparse_kinds_compute_with_the_pruned_weight():
    weights = Weights(64, 256, 64, CPU)
    for kind in ("sparse24", "int8dq-sparse24", "float8dq-sparse24"):
        found = KINDS[kind].weight(weights)
        assert not found[weights.pruned == 0].any()
        assert (found - weights.pruned.float()).norm() / weights.pruned.float().norm() < 0.04
