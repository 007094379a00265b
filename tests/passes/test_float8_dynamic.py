"""Linears under the rule become `aograph::float8_scaled_linear` on activations that are quantized once."""

import pytest
import torch
import torch.nn.functional as F
from aograph.kernels import float8_scaled_linear
from aograph.kernels.float8 import FLOAT8
from aograph.kernels.quantized_activation import (
    Float8PerTensor,
    float8_per_block,
    float8_per_tensor,
    float8_per_token,
)
from aograph.passes import Stage, find_sites

import aograph
from aograph.statistics import LinearStatistics
from aograph.weights import WeightStore
from tests.programs import apply, operators, outputs, program_of, up_to
from tests.small_models import MLP

QUANTIZE = {"row": float8_per_token, "tensor": float8_per_tensor, "block": float8_per_block}
X, W = torch.randn(3, 128), torch.randn(48, 128)

each_granularity = pytest.mark.parametrize("granularity", QUANTIZE)


def rewritten(model, *inputs, recipe="float8dq", dynamic=False, passes=None, **weights):
    program = program_of(model, *inputs, dynamic=dynamic, **weights)
    apply(program, *(passes or up_to(Stage.QUANTIZE)), "eliminate_dead_code", recipe=recipe)
    return program


def materialized(program):
    WeightStore(torch.nn.Module(), torch.device("cpu"), hand_over=False).materialize(program)
    program.graph_module.recompile()
    return program


def linear(x, weight, bias=None, granularity="row"):
    activation = QUANTIZE[granularity](x)
    packed = float8_scaled_linear.pack(weight, granularity)
    return float8_scaled_linear.float8_scaled_linear(activation.x, activation.x_scale, *packed, bias, x.dtype)


@each_granularity
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", [(128,), (3, 128), (2, 5, 128)])
def test_every_shape_of_x(shape, dynamic, granularity):
    x, b = torch.randn(shape), torch.randn(48)
    forward = lambda m, x: F.linear(x, m.w, m.b)  # noqa: E731
    recipe = f"float8dq(granularity={granularity})"
    program = materialized(rewritten(forward, x, recipe=recipe, dynamic=dynamic, w=W, b=b))
    assert operators(program)["aograph.float8_scaled_linear"] == 1
    torch.testing.assert_close(outputs(program, x)[0], linear(x, W, b, granularity), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("granularity, scale_bytes", [("row", 48 * 4), ("tensor", 4), ("block", 4)])
def test_the_row(granularity, scale_bytes):
    recipe = f"float8dq(granularity={granularity})"
    program = rewritten(lambda m, x: F.linear(x, m.w), X, recipe=recipe.replace("(granularity=row)", ""), w=W)
    (row,) = program.rows
    assert row.outcome == "rewritten" and row.kernel == "dequantize" and not row.notes
    assert row.bytes_after == 48 * 128 + scale_bytes
    materialized(program)
    assert 0.01 < row.error < 0.06


@each_granularity
def test_query_key_and_value_share_one_quantized_x(granularity):
    weights = {name: torch.randn(64, 128) for name in "qkv"}

    def attention(m, x):
        x = F.rms_norm(x, (128,))
        return F.linear(x, m.q), F.linear(x, m.k), F.linear(x, m.v)

    recipe = f"float8dq(granularity={granularity})"
    alone = [name for name in up_to(Stage.QUANTIZE) if name != "merge_linears"]
    for passes, linears in ((None, 1), (alone, 3)):
        program = materialized(rewritten(attention, X, recipe=recipe, passes=passes, **weights))
        assert operators(program)["aograph.float8_scaled_linear"] == linears
        calls = [n for n in program.graph.nodes if "float8_scaled_linear" in str(n.target)]
        assert len({(n.args[0], n.args[1]) for n in calls}) == 1
        if linears == 3:
            x = F.rms_norm(X, (128,))
            for y, weight in zip(outputs(program, X), weights.values(), strict=True):
                torch.testing.assert_close(y, linear(x, weight, granularity=granularity), rtol=1e-4, atol=1e-4)


def test_static_scales_come_from_statistics():
    statistics = {"w": LinearStatistics(-2.0, 1.0, torch.ones(128), 3)}
    recipe = aograph.Recipe(aograph.Recipe.of("float8dq(activation=static)").rules, statistics)
    program = materialized(rewritten(lambda m, x: F.linear(x, m.w), X, recipe=recipe, w=W))
    x_scale = program.graph_module.w_x_scale
    assert torch.equal(x_scale, torch.tensor([2 / 448]))
    packed = float8_scaled_linear.pack(W, "row")
    x = Float8PerTensor(2 / 448)(X).x
    expected = float8_scaled_linear.float8_scaled_linear(x, x_scale, *packed, None, torch.float32)
    torch.testing.assert_close(outputs(program, X)[0], expected)
    assert outputs(program, 100 * X)[0].isfinite().all()  # saturated


def test_static_scales_need_statistics():
    program = rewritten(lambda m, x: F.linear(x, m.w), X, recipe="float8dq(activation=static)", w=W)
    (row,) = program.rows
    assert row.outcome == "skipped" and "aograph.calibrate" in row.notes[0]


def test_blocks_need_whole_ones():
    program = rewritten(MLP(64, 128), torch.randn(3, 64), recipe="float8dq(granularity=block)")
    assert operators(program)["aograph.float8_scaled_linear"] == 1
    up, down = program.rows
    assert (up.outcome, down.outcome) == ("near miss", "rewritten")
    assert up.notes == ["K = 64 is not divisible by the block size 128"]


def test_an_old_gpu_is_reported_and_nothing_is_rewritten(monkeypatch):
    monkeypatch.setattr(find_sites, "capability", lambda device: (8, 0))
    program = rewritten(MLP(), torch.randn(3, 64))
    assert operators(program) == {"aten.linear": 2, "aten.relu": 1} and not program.packs
    for row in program.rows:
        assert row.outcome == "skipped" and row.bytes_after == row.bytes_before
        assert row.notes == [
            "products of float8 need compute capability 8.9; this GPU has 8.0: float8wo or int8dq run on it"
        ]
    program = rewritten(MLP(), torch.randn(3, 64), recipe="float8wo")
    assert operators(program)["aograph.float8_linear"] == 2


def test_both_doors_agree():
    model, x = MLP(128, 256).eval(), torch.randn(3, 128)
    with torch.no_grad():
        expected = aograph.optimize(model, "float8dq", x, compile=False)(x)
        seen = []
        options = {"recipe": "float8dq", "report": seen.append, "compile": False}
        torch.testing.assert_close(torch.compile(model, backend="aograph", options=options)(x), expected)
    assert [row.scheme for row in seen[0].rows] == ["float8dq"] * 2
    assert (expected - model(x)).norm() <= 0.06 * model(x).norm()


def test_no_dequantized_weight_is_in_the_graph():
    program = rewritten(MLP(128, 256), X)
    shapes = {(256, 128), (128, 256)}
    values = [value for n in program.graph.nodes if isinstance(value := n.meta.get("val"), torch.Tensor)]
    assert [value.dtype for value in values if tuple(value.shape) in shapes] == [FLOAT8] * 2


@pytest.mark.cuda
@each_granularity
def test_on_a_gpu(granularity):
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no GPU of compute capability 9")
    model = MLP(512, 768).eval().to("cuda", torch.bfloat16)
    x = torch.randn(33, 512, device="cuda", dtype=torch.bfloat16)
    fast = aograph.optimize(model, f"float8dq(granularity={granularity})", x, compile=False)
    kernels = [row.kernel for row in fast.report.rows]
    assert kernels and not any("dequantize" in kernel for kernel in kernels)
    with torch.no_grad():
        for M in (1, 16, 33):
            exact = model(x[:M])
            assert (fast(x[:M]) - exact).norm() <= 0.08 * exact.norm()
