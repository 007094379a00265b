import pytest
import torch
from aograph.patterns.language import (
    Any,
    Builder,
    Either,
    Match,
    Maybe,
    Miss,
    P,
    Rule,
    Weight,
    alike,
    arguments,
    constant,
    match,
    mutates,
    packet,
    propagate,
    rewrite,
    stays,
    written,
)
from torch import nn

from tests.programs import find, outputs, program_of

aten = torch.ops.aten
x, w, b = Any("x"), Weight("w", ndim=2), Any("b")
X, W = torch.randn(4, 8), torch.randn(8, 8)


def node_of(function, operator, *inputs, **weights):
    return find(program_of(function, *(inputs or (X,)), **(weights or {"w": W})), operator)


# --- reading nodes -----------------------------------------------------------------------------------------


def test_packet():
    assert packet(aten.mm.default) is aten.mm and packet(aten.mm) is aten.mm and packet(len) is len


@pytest.mark.parametrize(
    "call, expected",
    [
        (lambda m, x: torch.addmm(m.b, x, m.w), [1, 1]),
        (lambda m, x: torch.addmm(m.b, x, m.w, alpha=2), [1, 2]),
        (lambda m, x: torch.addmm(m.b, x, m.w, beta=3, alpha=2), [3, 2]),
    ],
)
def test_arguments_come_in_schema_order_with_defaults(call, expected):
    node = node_of(call, "aten.addmm", X, w=W, b=torch.randn(8))
    given = arguments(node)
    assert [n.op for n in given[:3]] == ["get_attr", "placeholder", "get_attr"]
    assert given[3:] == expected


class Buffers(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("weight", torch.ones(8, 8))
        self.register_buffer("other", torch.ones(8, 8))

    def forward(self, x):
        return self.function(self, x)


WRITES = {
    "in place": lambda m, x: m.weight.add_(1),
    "through a view": lambda m, x: m.weight[:2].add_(1),
    "through two views": lambda m, x: m.weight.t()[0].mul_(2),
    "through a reshape": lambda m, x: m.weight.reshape(64).mul_(2),
    "through a chunk": lambda m, x: m.weight.chunk(2)[1].zero_(),
    "with a value": lambda m, x: m.weight.copy_(x.t() @ x),
    "by index": lambda m, x: m.weight.index_copy_(0, torch.tensor([1]), x[:1]),
    "by item": lambda m, x: m.weight.__setitem__((slice(0, 2),), 0.0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_written_weight_is_no_constant(write):
    def forward(m, x):
        write(m, x)
        return x @ m.weight + x @ m.other

    program = program_of(Buffers(forward), X)
    weight, other = program.weights["weight"], program.weights["other"]
    writer = written(weight)
    assert writer is not None and mutates(writer)
    assert not constant(weight) and constant(other) and written(other) is None


def test_what_stays_is_written_through_no_view():
    def forward(m, x):
        x = x.relu()
        view, other = x.t(), x.exp()
        view.add_(1)
        return view + 1, other

    program = program_of(Buffers(forward), X)
    assert not stays(find(program, "aten.t")) and not stays(find(program, "aten.relu"))
    assert stays(find(program, "aten.exp"))


def test_what_is_alike_is_computed_alike_of_what_stays():
    def forward(m, x, y):
        z = x.relu()
        pairs = [(x.exp() + 1, x.exp() + 1), (y.expand_as(x + 1), y.expand_as(x + 2)), (x.neg(), x.neg())]
        pairs += [(x.exp() + 1, x.exp() + 2), (x.cos(), y.cos()), (torch.rand_like(x), torch.rand_like(x))]
        before = z.sin()
        z.add_(1)
        pairs += [(before, z.sin()), (x.abs(), x.abs())]
        pairs[-1][0][0].add_(1)
        return [value for pair in pairs for value in pair]

    program = program_of(forward, X, torch.randn(4, 8))
    found = program.graph.output_node().args[0]
    assert [alike(*pair) for pair in zip(found[::2], found[1::2], strict=True)] == [True] * 3 + [False] * 5


def test_a_view_of_a_written_weight_is_no_constant():
    def forward(m, x):
        view = m.weight.t()
        y = x @ view
        m.weight.add_(1)
        return y

    program = program_of(Buffers(forward), X)
    assert not constant(find(program, "aten.t"))


CONSTANTS = {
    "a weight": (lambda m, x: m.w, True),
    "a view": (lambda m, x: m.w.t()[:4].t(), True),
    "a cast": (lambda m, x: m.w.double().float(), True),
    "a concatenation": (lambda m, x: torch.cat([m.w, m.w]).t(), True),
    "a chunk": (lambda m, x: m.w.chunk(2, 1)[0].t().reshape(8, 4)[:, :4], True),
    "arithmetic": (lambda m, x: m.w * 2 + 1, True),
    "depends on x": (lambda m, x: m.w * x.sum(), False),
    "random": (lambda m, x: torch.rand_like(m.w), False),
    "x": (lambda m, x: x.t(), False),
    "a new tensor": (lambda m, x: torch.ones(8, 8), False),
}


@pytest.mark.parametrize("function, expected", CONSTANTS.values(), ids=CONSTANTS.keys())
def test_constant(function, expected):
    node = node_of(lambda m, x: torch.mm(x, function(m, x)), "aten.mm")
    assert constant(node.args[1]) is expected
    assert not constant(None) and not constant(3)


# --- fitting -----------------------------------------------------------------------------------------------


def fits(pattern, node):
    return isinstance(match(pattern, node), Match)


def test_bindings():
    node = node_of(lambda m, x: torch.mm(x, m.w), "aten.mm")
    found = match(P(aten.mm, x, w, name="product"), node)
    assert found.x is node.args[0] and found.w is node.args[1]
    assert found.root is node and found.product is node
    with pytest.raises(AttributeError, match="nothing"):
        _ = found.nothing


def test_a_packet_stands_for_all_overloads():
    node = node_of(lambda m, x: torch.sum(x, dim=0), "aten.sum")
    assert fits(P(aten.sum, x, Any()), node) and fits(P(aten.sum.dim_IntList, x, Any()), node)
    assert not fits(P(aten.sum.default, x), node)
    assert not fits(P(aten.mean, x, Any()), node)


@pytest.mark.parametrize(
    "call, pattern, expected",
    [
        (lambda x: x.transpose(0, 1), P(aten.transpose, x, 0, 1), True),
        (lambda x: x.transpose(0, 1), P(aten.transpose, x, 1, 0), False),
        (lambda x: x.transpose(0, 1), P(aten.transpose, x, Any(), Any()), True),
        (lambda x: x.transpose(0, 1), P(aten.transpose, x, False, True), False),  # a bool is no number
        (lambda x: x.transpose(0, 1), P(aten.transpose, x, 0.0, 1), True),  # but 0.0 is 0
        (lambda x: x.permute(1, 0), P(aten.permute, x, [1, 0]), True),
        (lambda x: x.permute(1, 0), P(aten.permute, x, (1, 0)), True),
        (lambda x: x.permute(1, 0), P(aten.permute, x, [0, 1]), False),
        (lambda x: x.permute(1, 0), P(aten.permute, x, [1]), False),
        (lambda x: x.permute(1, 0), P(aten.permute, x, [1, Any("d")]), True),
        (lambda x: x.sum(0, keepdim=True), P(aten.sum, x, [0], True), True),
        (lambda x: x.sum(0, keepdim=True), P(aten.sum, x, [0]), False),  # what is left out has its default
        (lambda x: x.sum(0), P(aten.sum, x, [0]), True),
        (lambda x: x.sum(0), P(aten.sum, x, [0], False, None, Any()), False),  # more than it takes
    ],
)
def test_literals(call, pattern, expected):
    program = program_of(lambda m, x: call(x), X)
    node = find(program, str(pattern.target))
    assert fits(pattern, node) is expected


@pytest.mark.parametrize("beta, alpha, exact, wild", [(1, 1, True, True), (2, 1, False, True), (1, 0.5, False, True)])
def test_exact_and_wildcarded_literals(beta, alpha, exact, wild):
    def call(m, x):
        return torch.addmm(m.b, x, m.w, beta=beta, alpha=alpha)

    node = node_of(call, "aten.addmm", X, w=W, b=torch.randn(8))
    assert fits(P(aten.addmm, b, x, w), node) is exact
    assert fits(P(aten.addmm, b, x, w, 1, 1), node) is exact
    assert fits(P(aten.addmm, b, x, w, Any(), Any()), node) is wild
    if not exact:
        assert "where 1 is needed" in match(P(aten.addmm, b, x, w), node).reason


def test_one_name_is_one_node():
    same = node_of(lambda m, x: torch.mul(x, x), "aten.mul")
    other = node_of(lambda m, x: torch.mul(x, m.w), "aten.mul", torch.randn(8, 8))
    pattern = P(aten.mul, x, x)
    assert fits(pattern, same)
    assert "in one place and" in match(pattern, other).reason


@pytest.mark.parametrize("users", [1, 2])
def test_users(users):
    def forward(m, x):
        y = x.relu()
        return (y.exp(), y.sin()) if users == 2 else y.exp()

    node = node_of(forward, "aten.exp")
    assert fits(P(aten.exp, P(aten.relu, x, users=users)), node)
    assert fits(P(aten.exp, P(aten.relu, x)), node)
    reason = match(P(aten.exp, P(aten.relu, x, users=3 - users)), node).reason
    assert f"has {users} users where {3 - users} is needed" in reason


def test_users_are_not_asked_of_the_root():
    node = node_of(lambda m, x: x.relu(), "aten.relu")
    assert fits(P(aten.relu, x, users=7), node)


def test_maybe():
    def linear(bias):
        def forward(m, x):
            return torch.nn.functional.linear(x, m.w, m.b if bias else None)

        return node_of(forward, "aten.linear", X, w=W, b=torch.randn(8))

    pattern = P(aten.linear, x, w, Maybe(Weight("b", ndim=1)))
    assert match(pattern, linear(False)).b is None
    assert match(pattern, linear(True)).b.target == "b"
    assert not fits(P(aten.linear, x, w, Maybe(Weight("b", ndim=2))), linear(True))


def test_weight_says_what_is_wrong():
    node = node_of(lambda m, x: torch.mm(x, m.w), "aten.mm")
    assert match(P(aten.mm, w, x), node).reason == "w is not a constant"
    assert match(P(aten.mm, x, Weight(ndim=3)), node).reason == (
        "the weight has 2 dimensions [8, 8] where 3 are needed"
    )
    assert match(P(aten.mm, Weight(), x), node).reason == "an operand is not a constant"
    assert fits(P(aten.mm, x, Weight()), node)


def test_guards():
    node = node_of(lambda m, x: torch.mm(x, m.w), "aten.mm")
    assert fits(P(aten.mm, x, w, where=lambda m: m.w.target == "w"), node)
    assert match(P(aten.mm, x, w, where=lambda m: "too small"), node) == Miss("too small")
    assert match(P(aten.mm, x, w, where=lambda m: False), node) == Miss("a guard of the pattern said no")
    both = (lambda m: True, lambda m: "the second says no")
    assert match(P(aten.mm, x, w, where=both), node) == Miss("the second says no")


def test_what_is_no_call():
    node = node_of(lambda m, x: torch.mm(x, m.w), "aten.mm")
    assert "is no call of" in match(P(aten.mm, x, w), node.args[0]).reason
    assert "is no call of aten.t" in match(P(aten.mm, P(aten.t, x), w), node).reason
    assert match(P(aten.t, x), node).reason == "mm calls aten.mm.default, not aten.t"


# --- rewriting ---------------------------------------------------------------------------------------------


def test_builder_gives_value_and_provenance():
    model = nn.Sequential(nn.Linear(8, 8))
    program = program_of(model, X, dynamic=True)
    linear = find(program, "aten.linear")
    new = Builder(linear).call(aten.relu.default, linear.args[0])
    assert new.meta["val"].shape == linear.args[0].meta["val"].shape
    assert new.meta["origin"] == linear.meta["origin"] == ("0", "torch.nn.modules.linear.Linear")
    assert new.meta["operator"] == "linear"
    assert new.next is linear


def test_propagate_follows_symbols():
    program = program_of(lambda m, x: x.t(), X, dynamic=True)
    node = find(program, "aten.t")
    assert str(propagate(node).shape) == str(node.meta["val"].shape)
    assert "s" in str(node.meta["val"].shape)


TO_RELU = Rule("square to relu", P(aten.mul, x, x), lambda m, g: g.call(aten.relu.default, m.x))
TO_EXP = Rule("product to exp", P(aten.mul, x, Any()), lambda m, g: g.call(aten.exp.default, m.x))


def test_the_first_rule_that_fits_wins():
    program = program_of(lambda m, x: (x * x, x * 2.0), X)
    hits, misses = rewrite(program.graph, [TO_RELU, TO_EXP])
    assert hits == {"square to relu": 1, "product to exp": 1} and not misses
    program.graph_module.recompile()
    relu, exp = outputs(program, X)
    assert torch.equal(relu, X.relu()) and torch.equal(exp, X.exp())


def test_misses_are_of_operators_that_rules_name():
    program = program_of(lambda m, x: (x * x, x * 2.0, x.sin()), X)
    hits, misses = rewrite(program.graph, [TO_RELU])
    assert hits == {"square to relu": 1}
    ((node, reason),) = misses.items()
    assert packet(node.target) is aten.mul and "x is" in reason


def test_rewriting_reaches_what_it_feeds():
    """A match sees what earlier nodes were rewritten to."""
    program = program_of(lambda m, x: (x * x) * 2.0, X)
    hits, _ = rewrite(program.graph, [TO_RELU, TO_EXP])
    assert hits == {"square to relu": 1, "product to exp": 1}
    program.graph_module.recompile()
    assert torch.equal(outputs(program, X)[0], X.relu().exp())


def test_either_takes_the_first_that_fits_and_forgets_the_others():
    node = find(program_of(lambda m, x: (x + 1) * 2, X), "aten.mul")
    plus = P(aten.add.Tensor, Any("y"), 1, name="plus")
    wrong = P(aten.mul.Tensor, P(aten.add.Tensor, Any("wrong"), 1), 3)
    found = match(P(aten.mul.Tensor, Either(wrong, P(aten.add.Tensor, Any("wrong"), 2), plus, Any("rest")), 2), node)
    assert set(found.bindings) == {"y", "plus"} and found.nodes == [found.plus, node]
    assert match(P(aten.mul.Tensor, Either(wrong, Any("rest")), 2), node).nodes == [node]


def test_the_reason_of_either_is_the_nearest():
    node = find(program_of(lambda m, x: (x + 1) * 2, X), "aten.mul")
    near, far = P(aten.add.Tensor, Any(), 5), P(aten.sub.Tensor, Any(), 1)
    for patterns in ((near, far), (far, near)):
        assert match(P(aten.mul.Tensor, Either(*patterns), 2), node) == Miss("argument 1 where 5 is needed")
    assert "not aten.sub" in match(P(aten.mul.Tensor, Either(P(aten.div.Tensor), far), 2), node).reason
