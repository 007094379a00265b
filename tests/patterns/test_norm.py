import pytest
import torch
import torch.nn.functional as F
from aograph.patterns.language import Match, Miss, match
from aograph.patterns.norm import RMS_NORMS, epsilon
from torch import nn

from tests.programs import apply, operators, program_of

X, W = torch.randn(3, 64).bfloat16(), torch.rand(64).bfloat16()


def of_transformers(x, w, eps=1e-5, dtype=torch.bfloat16, power=2):
    wide = x.to(torch.float32)
    return w * (wide * torch.rsqrt(wide.pow(power).mean(-1, keepdim=True) + eps)).to(dtype)


def swapped(x, w):
    wide = x.to(torch.float32)
    return (torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * wide).to(x.dtype) * w


def matches(function, *inputs, w=W, dynamic=False):
    """The program, and the matches of the patterns at the norm's last node."""
    program = program_of(lambda m, x: function(x, m.w), *(inputs or (X,)), w=w, dynamic=dynamic)
    apply(program, "remove_noops")
    (root,) = program.graph.output_node().args[0]
    return program, [found for pattern in RMS_NORMS if isinstance(found := match(pattern, root), Match)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", [lambda x, w: F.rms_norm(x, (64,), w, 1e-5), of_transformers, swapped])
def test_forms(form, dynamic):
    program, (found,) = matches(form, dynamic=dynamic)
    assert (found.x, found.weight.target, epsilon(found)) == (program.inputs[0], "w", 1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_eps_that_is_left_out_is_that_of_torch(dtype, device):
    x, w = torch.full((1, 64), 1e-3, dtype=dtype, device=device), torch.ones(64, dtype=dtype, device=device)
    _, (found,) = matches(lambda x, w: F.rms_norm(x, (64,), w), x, w=w)
    torch.testing.assert_close(F.rms_norm(x, (64,), w), F.rms_norm(x, (64,), w, epsilon(found)))


OTHERS = {
    "another norm": lambda x, w: F.layer_norm(x, (64,), w),
    "without a weight": lambda x, w: F.rms_norm(x, (64,)),
    "over all dimensions": lambda x, w: F.rms_norm(x, (3, 64), w.expand(3, 64)),
    "a weight that is computed from x": lambda x, w: F.rms_norm(x, (64,), w * x[0]),
    "another dtype at the end": lambda x, w: of_transformers(x, w, dtype=torch.float16),
    "another power": lambda x, w: of_transformers(x, w, power=4),
    "eps that is computed": lambda x, w: of_transformers(x, w, eps=x.float().abs().amin()),
}


@pytest.mark.parametrize("form", OTHERS.values(), ids=OTHERS)
def test_others(form):
    assert not matches(form)[1]


@pytest.mark.parametrize("w", [torch.rand(1).bfloat16(), torch.rand(64)], ids=["one number", "another dtype"])
def test_other_weights(w):
    assert not matches(of_transformers, w=w)[1]


class Written(nn.Module):
    """The mean is written in place before eps is added."""

    def forward(self, x):
        wide = x.to(torch.float32)
        mean = wide.pow(2).mean(-1, keepdim=True)
        mean.clamp_(min=0.1)
        return W * (wide * torch.rsqrt(mean + 1e-5)).to(x.dtype)


def test_what_is_computed_on_the_way_has_no_other_user():
    program = program_of(Written(), X)
    apply(program, "remove_noops")
    (root,) = program.graph.output_node().args[0]
    assert operators(program)["aten.clamp_"] == 1
    assert all(isinstance(match(pattern, root), Miss) for pattern in RMS_NORMS)
