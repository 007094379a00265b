import pytest
import torch
from aograph.kernels.op import OPS
from torch import nn

import aograph
from aograph.inline import inline
from tests.models.zoo import build
from tests.small_models import MLP, Counting

HALVES = {torch.bfloat16: 3e-2, torch.float16: 3e-3, torch.float32: 1e-4}


def program_of(model, recipe, *inputs, dynamic_shapes=None):
    fast = aograph.optimize(model, recipe, inputs, dynamic_shapes=dynamic_shapes, compile=False)
    _, captured, _ = next(iter(fast._captures.values()))
    return captured.program


RECIPES = [  # and K
    ("int8wo", 33), ("int8wo", 64), ("int8wo(group_size=32)", 96), ("int4wo(group_size=32)", 96),
    ("int8dq", 33), ("int8dq(mapping=asymmetric)", 64),
    ("float8wo", 33), ("float8dq", 33), ("float8dq(granularity=tensor)", 64), ("float8dq(granularity=block)", 128),
]  # fmt: skip


def oracle(program, x):
    """What the graph computes in float64, by the references of our ops."""

    def wide(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    class References(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            op = next((op for op in OPS.values() if op.overload is target), None)
            return op.oracle.function(*map(wide, args)) if op else super().call_function(target, args, kwargs)

    return References(program.graph_module).run(x.double())[0]


@pytest.mark.parametrize("N, dtype", [(1, torch.bfloat16), (65, torch.float32), (128, torch.float16)])
@pytest.mark.parametrize("recipe, K", RECIPES)
def test_the_traced_graph_computes_what_the_op_means(recipe, N, K, dtype):
    program = program_of(nn.Linear(K, N).to(dtype), recipe, torch.randn(5, K, dtype=dtype))
    inlined = inline(program)
    assert not inlined.outside and "aograph" not in str(inlined.exported.graph)
    for M in (2, 40, 300):
        x = torch.randn(M, K, dtype=dtype)
        found = inlined.exported.module()(x)[0]
        expected = oracle(program, x)
        assert found.dtype is dtype
        assert (found - expected).norm() <= HALVES[dtype] * expected.norm()


def test_the_kernel_is_that_for_all_sizes():
    linear = nn.Linear(64, 64).to(torch.bfloat16)
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    assert inline(program_of(linear, "int8wo", x, dynamic_shapes=({},))).kernels == {("int8_linear", "aten"): 1}
    few = {0: torch.export.Dim("M", min=2, max=12)}
    assert inline(program_of(linear, "int8wo", x, dynamic_shapes=(few,))).kernels == {("int8_linear", "aten"): 1}
    assert inline(program_of(linear, "int8wo", x)).kernels == {("int8_linear", "dequantize"): 1}


def test_bodies_know_how_large_a_dynamic_size_can_be(monkeypatch):
    seen = []

    def apply(choice, x, *rest):
        seen.append(int(x.shape[0].node.shape_env.bound_sympy(x.shape[0].node.expr).upper))
        return choice.function(x, *rest)

    tokens = {0: torch.export.Dim("M", min=2, max=77)}
    program = program_of(MLP(), "int8wo", torch.randn(5, 64), dynamic_shapes=(tokens,))
    monkeypatch.setattr(OPS["int8_linear"], "apply", apply)
    inline(program)
    assert set(seen) == {77}


def test_ranges_are_kept():
    tokens = torch.export.Dim("T", min=3, max=77)
    inlined = inline(program_of(MLP(), "int8wo", torch.randn(5, 64), dynamic_shapes=({0: tokens},)))
    ((_, found),) = inlined.exported.range_constraints.items()
    assert (found.lower, found.upper) == (3, 77)


def test_weights_keep_their_names_and_memory():
    program = program_of(MLP(), "int8wo", torch.randn(5, 64))
    state = inline(program).exported.state_dict
    for name, tensor in program.graph_module.state_dict().items():
        if name in program.weights:
            assert state[name].data_ptr() == tensor.data_ptr(), name


def test_a_large_weight_is_traced_in_few_blocks():
    program = program_of(nn.Linear(2048, 4096, bias=False), "int8wo", torch.randn(5, 2048))
    graph = inline(program).exported.graph
    assert len(graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)) == 1


def test_an_op_without_a_standalone_kernel_stays(monkeypatch):
    op = OPS["int8_linear"]
    monkeypatch.setattr(op, "implementations", [])
    monkeypatch.setattr(type(op), "standalone", lambda *_: None)
    inlined = inline(program_of(nn.Linear(64, 64), "int8wo", torch.randn(5, 64)))
    assert inlined.outside == ["int8_linear"] and inlined.kernels == {}
    assert inlined.exported.graph.find_nodes(op="call_function", target=op.overload)


@pytest.mark.parametrize("name", ["gpt2", "mixture", "functional", "convnet"])
def test_whole_models(name):
    model, inputs = build(name)
    fast = aograph.optimize(model, "int8wo", ((), inputs), compile=False)
    _, captured, run = next(iter(fast._captures.values()))
    tensors = [v for v in inputs.values() if isinstance(v, torch.Tensor)]
    found = inline(captured.program).exported.module()(*tensors)
    expected = [v for v in run(*inputs.values()) if isinstance(v, torch.Tensor)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_buffers_that_the_graph_writes():
    program = program_of(Counting(), "int8wo", torch.randn(5, 64))
    module = inline(program).exported.module()
    x = torch.randn(3, 64)
    first, second = (module(x)[0].clone() for _ in range(2))
    torch.testing.assert_close(second - first, torch.ones(3, 64), rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("recipe", ["int8wo", "int8wo(group_size=32)", "int4wo"])
def test_triton_kernels_become_parts_of_the_graph(recipe):
    linear = nn.Linear(256, 192).to("cuda", torch.bfloat16)
    few = {0: torch.export.Dim("M", min=2, max=100)}
    program = program_of(linear, recipe, torch.randn(4, 256).to(linear.weight), dynamic_shapes=(few,))
    inlined = inline(program)
    assert {kernel for _, kernel in inlined.kernels} == {"triton"}
    assert "triton_kernel_wrapper" in str(inlined.exported.graph)
    for M in (2, 17, 100):
        x = torch.randn(M, 256).to(linear.weight)
        expected = oracle(program, x)
        found = inlined.exported.module()(x)[0]
        assert (found - expected).norm() <= 3e-2 * expected.norm()
