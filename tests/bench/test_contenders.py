import torch
import torch.nn.functional as F

from bench.contenders import Contender, Weights

CPU = torch.device("cpu")


def test_codes_are_those_of_the_packed_weight():
    weights = Weights(96, 256, 64, CPU)
    pairs = weights.scale_zero().float().repeat_interleave(64, 0).permute(2, 1, 0)
    assert torch.equal((weights.codes().float() - 8) * pairs[0] + pairs[1], weights.exact("int4"))


def test_copies_are_too_many_for_the_caches():
    weight = torch.randn(4, 4)
    few, many = (Contender((weight,), F.linear).copied(least).copies for least in (1, 10 * weight.nbytes))
    assert (len(few), len(many)) == (2, 10)
    assert len({each[0].data_ptr() for each in many}) == 10
