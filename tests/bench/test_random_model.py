import torch
from torch import nn

from bench.random_model import random_model


def test_weights_are_random_and_norms_are_not():
    def made():
        torch.manual_seed(0)
        return random_model(lambda: nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)), torch.device("cpu"))

    linear, norm = made()
    assert linear.weight.dtype is torch.bfloat16 and not linear.weight.requires_grad
    assert 0.015 < linear.weight.float().std() < 0.025 and 0.01 < linear.bias.float().std() < 0.03
    assert torch.equal(norm.weight, torch.ones_like(norm.weight)) and norm.bias.any()
    assert torch.equal(made()[0].weight, linear.weight)
