import pytest
import torch
from aograph.patterns.attention import ATTENTIONS, scale_of, softcap_of
from aograph.patterns.language import Match, match
from torch import nn

from tests.programs import program_of

B, H, S, D = 2, 2, 32, 16


class Reading(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(B, H, S, D))

    def forward(self, q):
        self.keys.add_(1), self.values.add_(1)
        return self.attention(q, self.keys, self.values)


def attention(how, heads=H):
    program = program_of(Reading(how), torch.randn(B, heads, 3, D))
    found = [m for n in program.graph.nodes for p in ATTENTIONS if isinstance(m := match(p, n), Match)]
    return found[0] if found else None


@pytest.mark.parametrize(
    "how, scale, softcap",
    [
        (lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v), D**-0.5, 0),
        (lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5), 0.5, 0),
        (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, 1, 0),
        (lambda q, k, v: (q @ k.mT * 0.5).softmax(-1) @ v, 0.5, 0),
        (lambda q, k, v: (q @ k.mT / 8).softmax(-1) @ v, 0.125, 0),
        (lambda q, k, v: (((q @ k.permute(0, 1, 3, 2)) / 8 / 5).tanh() * 5).softmax(-1) @ v, 0.125, 5),
    ],
)
def test_attention(how, scale, softcap):
    found = attention(how)
    assert (found.key.target, found.value.target) == ("keys", "values")
    assert scale_of(found) == scale and softcap_of(found) == softcap


@pytest.mark.parametrize(
    "how",
    [
        lambda q, k, v: (q @ k.mT).sigmoid() @ v,
        lambda q, k, v: (q @ k.mT).softmax(1) @ v,
        lambda q, k, v: ((q @ k.mT / 5).tanh() * 4).softmax(-1) @ v,
        lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v * 2),
        lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k.flip(1), v),
        lambda q, k, v: (q @ k.mT).softmax(-1) @ v.transpose(0, 1),
    ],
)
def test_no_attention(how):
    assert attention(how) is None
