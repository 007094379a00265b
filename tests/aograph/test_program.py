import pytest
import sympy
import torch
from aograph.passes import Stage
from aograph.patterns.language import Builder
from torch import nn

from aograph.program import Program, Site, describe, expression, name_of, nbytes, set_attribute
from tests.programs import apply, find, operators, program_of, up_to
from tests.small_models import MLP, Counting

aten = torch.ops.aten
s, u = sympy.symbols("s u", integer=True, positive=True)


def bare(ranges):
    return Program(torch.fx.GraphModule(nn.Module(), torch.fx.Graph()), {}, frozenset(), ranges=ranges)


@pytest.mark.parametrize(
    "size, bounds",
    [
        (sympy.Integer(7), (7, 7)),
        (sympy.Integer(1), (1, 1)),
        (s, (2, 16)),
        (3 * s + 1, (7, 49)),
        (s * s, (4, 256)),
        (s * u, (2, None)),
        (s - 1, (0, None)),
        (sympy.Symbol("unknown"), (0, None)),
    ],
)
def test_bounds(size, bounds):
    assert bare({s: (2, 16), u: (1, None)}).bounds(size) == bounds


def test_bounds_hold_every_size():
    program = bare({s: (2, 5), u: (1, 3)})
    for size in (s * u + 2 * s, (s + u) * u, s * (u + 4)):
        low, high = program.bounds(size)
        values = [size.subs({s: a, u: b}) for a in range(2, 6) for b in range(1, 4)]
        assert (low, high) == (min(values), max(values))


def test_weights_and_inputs():
    program = program_of(MLP(), torch.randn(3, 64))
    assert sorted(program.weights) == sorted(program.constants) == ["down.bias", "down.weight", "up.bias", "up.weight"]
    assert [n.op for n in program.inputs] == ["placeholder"]
    assert program.constants["up.weight"].shape == (128, 64) and program.mutated == frozenset()
    assert program_of(Counting(), torch.randn(3, 64)).mutated == {"calls"}


@pytest.mark.parametrize("shape, M", [((64,), 1), ((3, 64), 3), ((2, 3, 64), 6), ((0, 64), 0)])
def test_the_size_of_a_site(shape, M):
    program = program_of(MLP(), torch.randn(shape))
    node = next(n for n in program.graph.nodes if n.target is aten.linear.default)
    site = Site(node, [])
    assert (site.M, site.N, site.K, site.dtype) == (M, 128, 64, torch.float32)
    assert isinstance(site.M, sympy.Expr) and program.bounds(site.M) == (M, M)
    assert site.weight.target == "up.weight" and site.bias.target == "up.bias" and site.x.op == "placeholder"


def test_text():
    program = program_of(lambda m, x: (x @ m.w).relu(), torch.randn(3, 4), w=torch.randn(4, 5))
    lines = [
        "%w = weight w : f32[4, 5]",
        "%x = input : f32[3, 4]",
        "%matmul = aten.matmul.default(%x, %w) : f32[3, 5]",
        "%relu = aten.relu.default(%matmul) : f32[3, 5]",
        "return [%relu]",
    ]
    assert program.text().replace(program.inputs[0].name, "x") == "\n".join(lines)
    numbers = {"%x": "%0", "%w": "%1", "%matmul": "%2", "%relu": "%3"}
    canonical = "\n".join([lines[1], lines[0], *lines[2:]])
    for name, number in numbers.items():
        canonical = canonical.replace(name, number)
    assert program.canonical() == canonical


def test_canonical_text_does_not_see_order_and_names():
    def forward(m, x):
        return x @ m.w + m.v, x @ m.v

    program = program_of(forward, torch.randn(4, 4), w=torch.eye(4), v=torch.eye(4))
    text, canonical = program.text(), program.canonical()
    nodes = [n for n in program.graph.nodes if n.op == "get_attr"]
    nodes[-1].append(nodes[0])
    for node in program.graph.nodes:
        if node.op == "call_function":
            node._rename(f"renamed_{node.name}")
    program.graph.lint()
    assert program.canonical() == canonical and program.text() != text


@pytest.mark.parametrize("kind", ["text", "canonical"])
def test_text_sees_every_change(kind):
    def fresh():
        return program_of(lambda m, x: (x @ m.w).sum(0), torch.randn(3, 4), w=torch.eye(4))

    def argument(program):
        find(program, "aten.sum").args = (find(program, "aten.matmul"), [1])

    def value(program):
        find(program, "aten.matmul").meta["val"] = None

    def target(program):
        find(program, "aten.sum").target = aten.mean.dim

    texts = {getattr(fresh(), kind)()}
    for change in (argument, value, target):
        program = fresh()
        change(program)
        texts.add(getattr(program, kind)())
    assert len(texts) == 4


def test_text_shows_writes_that_nothing_reads():
    program = program_of(Counting(), torch.randn(3, 64))
    assert "aten.add_.Tensor" in program.text() and "aten.add_.Tensor" in program.canonical()


@pytest.mark.parametrize(
    "value, text",
    [
        (torch.empty(2, 3), "f32[2, 3]"),
        (torch.empty(2, dtype=torch.bfloat16), "bf16[2]"),
        (torch.empty((), dtype=torch.int64), "i64[]"),
        (torch.empty(1, dtype=torch.uint8), "ui8[1]"),
        ([torch.empty(1), 3, None], "[f32[1], 3, None]"),
        (True, "True"),
    ],
)
def test_describe(value, text):
    assert describe(value) == text


def test_sizes():
    assert expression(3) == sympy.Integer(3) and isinstance(expression(True), sympy.Integer)
    assert nbytes(torch.empty(3, 4, dtype=torch.half, device="meta")) == 24
    assert name_of(aten.mm.default) == "aten.mm.default" and name_of(len) == "len"


def test_set_attribute_makes_what_is_missing_and_replaces_what_is_there():
    module = nn.Module()
    set_attribute(module, "a.b.c", torch.ones(2))
    set_attribute(module, "a.b.c", torch.zeros(3))
    set_attribute(module, "top", torch.ones(1))
    assert [name for name, _ in module.named_buffers()] == ["top", "a.b.c"]
    assert module.a.b.c.shape == (3,)


def test_a_builder_keeps_a_program_whole():
    program = program_of(MLP(), torch.randn(3, 64))
    relu = find(program, "aten.relu")
    relu.replace_all_uses_with(Builder(relu).call(aten.tanh.default, relu.args[0]))
    apply(program, *up_to(Stage.NORMALIZE))  # verifies
    assert operators(program) == {"aten.linear": 2, "aten.tanh": 1}
