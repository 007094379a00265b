"""One quantized form of an activation for all that read it, behind what computes it, never across a write."""

import pytest
import torch
import torch.nn.functional as F
from aograph.kernels.quantized_activation import (
    Int8PerTensor,
    float8_per_block,
    float8_per_tensor,
    float8_per_token,
    int8_per_token,
    int8_per_token_asymmetric,
)
from aograph.passes import Stage
from aograph.passes.activation import quantized, traced

from aograph.verify import verify
from tests.programs import apply, operators, outputs, program_of, up_to

X = torch.randn(3, 128)
WEIGHTS = {name: torch.randn(128, 128) for name in "abc"}
NORMALIZED = [*up_to(Stage.NORMALIZE), "find_sites"]
ALL = (
    int8_per_token, int8_per_token_asymmetric, Int8PerTensor(0.1, 3), float8_per_token, float8_per_tensor,
    float8_per_block,
)  # fmt: skip


def sited(model, *inputs, dynamic=False, **weights):
    program = program_of(model, *inputs, dynamic=dynamic, **weights)
    apply(program, *NORMALIZED, recipe="int8dq")
    return program


def pair(m, x):
    x = F.rms_norm(x, (128,))
    return F.linear(x, m.a), F.linear(x, m.b)


@pytest.mark.parametrize("quantize", ALL, ids=lambda f: getattr(f, "__name__", "static"))
@pytest.mark.parametrize(
    "shape, dtype", [((128,), torch.float32), ((3, 128), torch.bfloat16), ((2, 3, 128), torch.float32)]
)
def test_the_nodes_compute_what_the_function_computes(quantize, shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    program = sited(lambda m, x: F.linear(x.relu(), m.a), x, dynamic=True, a=WEIGHTS["a"].to(dtype))
    nodes = quantized(program.sites[0], quantize)
    program.graph.output_node().args = (tuple(node for node in nodes if node is not None),)
    program.graph_module.recompile()
    expected = [each for each in quantize(x.relu()) if each is not None]
    for y, value in zip(outputs(program, x), expected, strict=True):
        assert torch.equal(y, value)
    assert not any("sym_size" in str(node.target) for node in program.graph.nodes)


def test_siblings_share_it():
    program = sited(pair, X, a=WEIGHTS["a"], b=WEIGHTS["b"])
    first, second = (quantized(site, int8_per_token) for site in program.sites)
    assert first == second and operators(program)["aten.amax"] == 1
    verify(program)
    names = [node.name for node in program.graph.nodes]
    assert names.index(program.sites[0].x.name) + 1 == names.index("to_dtype")  # right behind the norm


def test_other_quantizations_share_what_is_the_same():
    program = sited(pair, X, a=WEIGHTS["a"], b=WEIGHTS["b"])
    eight, floating = quantized(program.sites[0], int8_per_token), quantized(program.sites[1], float8_per_token)
    assert eight.x is not floating.x and eight.x_scale is not floating.x_scale
    assert operators(program)["aten.amax"] == 1  # of the magnitudes
    one, other = (quantized(program.sites[0], Int8PerTensor(scale)) for scale in (0.1, 0.2))
    assert one.x is not other.x and quantized(program.sites[1], Int8PerTensor(0.1)).x is one.x
    verify(program)


def test_it_is_found_again_when_x_has_become_another_node():
    program = sited(lambda m, x: (F.linear(F.linear(x, m.a), m.b), F.linear(F.linear(x, m.a), m.c)), X, **WEIGHTS)
    inner = next(site for site in program.sites if site.x.op == "placeholder")
    readers = [site for site in program.sites if site.x is inner.node]
    made = quantized(readers[0], int8_per_token)
    with program.graph.inserting_before(inner.node):
        new = program.graph.call_function(torch.ops.aten.linear.default, inner.node.args)
    new.meta = dict(inner.node.meta)
    inner.node.replace_all_uses_with(new)
    program.graph.erase_node(inner.node)
    assert quantized(readers[0], int8_per_token) == made


def test_what_the_model_computes_itself_is_left_alone():
    def forward(m, x):
        x = x.relu()
        return x.float().abs().amax(-1, keepdim=True), F.linear(x, m.a), F.linear(x, m.b)

    program = sited(forward, X.bfloat16(), a=WEIGHTS["a"].bfloat16(), b=WEIGHTS["b"].bfloat16())
    before = list(program.graph.nodes)
    made = quantized(program.sites[0], int8_per_token)
    assert not set(before) & {made.x, made.x_scale} and operators(program)["aten.amax"] == 2
    verify(program)


@pytest.mark.parametrize("through_a_view", [False, True])
def test_it_does_not_cross_a_write(through_a_view):
    def forward(m, x):
        x = x.relu()
        first = F.linear(x, m.a)
        (x.view(-1) if through_a_view else x).add_(1)
        return first, F.linear(x, m.b)

    program = sited(forward, X, a=WEIGHTS["a"], b=WEIGHTS["b"])
    made = [quantized(site, int8_per_token) for site in program.sites]
    assert made[0].x is not made[1].x
    verify(program)
    found = {node.name: node for node in program.graph.nodes}
    order = list(found)
    write = next(name for name, node in found.items() if "add_" in str(node.target))
    assert order.index(made[0].x.name) < order.index(write) < order.index(made[1].x.name)


def test_an_x_that_is_an_input_is_quantized_behind_all_inputs():
    program = sited(lambda m, x, y: F.linear(x, m.a) + y, X, X, a=WEIGHTS["a"])
    quantized(program.sites[0], int8_per_token)
    kinds = [node.op for node in program.graph.nodes if node.op in ("placeholder", "call_function")]
    assert kinds[:2] == ["placeholder"] * 2 and "placeholder" not in kinds[2:]
    verify(program)


def test_tracing_is_done_once_for_each_kind():
    traced.cache_clear()
    for scale in (0.1, 0.1, 0.2):
        traced(Int8PerTensor(scale), torch.float32, 2, "cpu")
    assert traced.cache_info().misses == 2


@pytest.mark.parametrize("quantize", [int8_per_token, float8_per_token])
def test_graphs_have_what_suits_the_device_of_x(quantize):
    """On a GPU no comparison that minds NaN for each number, and no conversion to round it."""
    slow = {torch.ops.aten.abs.default, torch.ops.aten.round.default}
    for device, found in (("cpu", True), ("cuda", False)):
        targets = {node.target for node in traced(quantize, torch.bfloat16, 2, device).nodes}
        assert bool(targets & slow) is found and (torch.ops.aten.view.dtype in targets) is not found


def test_provenance_is_that_of_x():
    program = sited(pair, X, a=WEIGHTS["a"], b=WEIGHTS["b"])
    made, x = quantized(program.sites[0], int8_per_token), program.sites[0].x
    assert made.x.meta["val"].dtype is torch.int8 and made.x.meta["origin"] == x.meta["origin"]
