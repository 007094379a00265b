import argparse

import torch

from bench.dit import DitWorker

OPTIONS = argparse.Namespace(device="cpu", autotune=[], width=128, double=1, single=2, text=3)


@torch.no_grad()
def test_a_case_has_its_tokens():
    model, inputs = DitWorker("bf16", OPTIONS).made(2)
    assert [tuple(each.shape) for each in inputs] == [(1, 4, 128), (1, 3, 128), (1, 128), (7, 64), (7, 64)]
    assert (len(model.double_blocks), len(model.single_blocks)) == (1, 2)
    y = model(*inputs)
    assert y.shape == (1, 4, 128) and y.dtype is torch.bfloat16 and y.isfinite().all()
