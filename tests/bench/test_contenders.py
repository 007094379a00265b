import torch
import torch.nn.functional as F

from bench.contenders import Contender, stored_bytes


def test_copies_are_too_many_for_the_caches():
    weight = torch.randn(4, 4)
    few, many = (Contender((weight,), F.linear).copied(least).copies for least in (1, 10 * weight.nbytes))
    assert (len(few), len(many)) == (2, 10)
    assert len({each[0].data_ptr() for each in many}) == 10


def test_bytes_of_a_tensor_made_of_others_are_theirs():
    class Halves(torch.Tensor):
        def __tensor_flatten__(self):
            return ["left", "right"], None

    halves = torch.zeros(8).as_subclass(Halves)
    halves.left, halves.right = torch.zeros(3, dtype=torch.int8), torch.zeros(2)
    assert stored_bytes(halves) == 3 + 8
    assert stored_bytes(torch.zeros(8)) == 32
