"""Linears under the rule become `aograph::float8_linear`."""

import pytest
import torch
import torch.nn.functional as F
from aograph.kernels import float8_linear
from aograph.kernels.float8 import FLOAT8
from aograph.passes import Stage

from aograph.weights import WeightStore
from tests.programs import apply, operators, outputs, program_of, up_to
from tests.small_models import MLP

X, W = torch.randn(3, 64), torch.randn(48, 64)


def rewritten(model, *inputs, dynamic=False, **weights):
    program = program_of(model, *inputs, dynamic=dynamic, **weights)
    apply(program, *up_to(Stage.QUANTIZE), "eliminate_dead_code", recipe="float8wo")
    return program


def materialized(program):
    WeightStore(torch.nn.Module(), torch.device("cpu"), hand_over=False).materialize(program)
    program.graph_module.recompile()
    return program


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_every_shape_of_x(shape, bias, dynamic):
    def forward(m, x):
        return F.linear(x, m.w, m.b if bias else None)

    x, b = torch.randn(shape), torch.randn(48)
    program = materialized(rewritten(forward, x, dynamic=dynamic, w=W, b=b))
    assert operators(program) == {"aograph.float8_linear": 1}
    expected = F.linear(x, float8_linear.unpack(*float8_linear.pack(W)), b if bias else None)
    torch.testing.assert_close(outputs(program, x)[0], expected, rtol=1e-4, atol=1e-4)


def test_the_row():
    for row, (N, K) in zip(rewritten(MLP(), X).rows, [(128, 64), (64, 128)], strict=True):
        assert row.outcome == "rewritten" and row.scheme == "float8wo" and row.kernel == "dequantize" and not row.notes
        assert row.bytes_after == N * K + 4 * N and row.bytes_before == 4 * N * K


def test_fake_weights_are_all_that_a_pass_needs():
    program = rewritten(MLP(), X)
    call = next(n for n in program.graph.nodes if "float8_linear" in str(n.target))
    q, scale = call.args[1:3]
    assert q.meta["val"].shape == (128, 64) and q.meta["val"].dtype is FLOAT8
    assert q.target == "up.weight_q" and scale.target == "up.weight_scale"


def test_merged_siblings_share_one_pack():
    v = torch.randn(80, 64)
    both = rewritten(lambda m, x: (F.linear(x, m.w), F.linear(x, m.v)), X, w=W, v=v)
    assert operators(both)["aograph.float8_linear"] == 1
    (pack,) = both.packs.values()
    assert pack.names == ("w_v_q", "w_v_scale")
    for y, weight in zip(outputs(materialized(both), X), (W, v), strict=True):
        expected = F.linear(X, float8_linear.unpack(*float8_linear.pack(weight)))
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
