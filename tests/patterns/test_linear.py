import re

import pytest
import torch
import torch.nn.functional as F
from aograph.patterns.language import Miss, match, rewrite
from aograph.patterns.linear import LINEAR, MATMULS, TO_LINEAR, underlying, weight_operands
from torch import nn

from aograph.verify import agree
from tests.programs import find, operators, outputs, program_of

aten = torch.ops.aten


def t(*shape):
    return torch.randn(shape, dtype=torch.float64)


def einsum(equation):
    return lambda m, x: torch.einsum(equation, x, m.w)


# (rule, function of the module and x, shape of x, shapes of the weights)
CASES = [
    ("mm", lambda m, x: torch.mm(x, m.w), (3, 8), dict(w=(8, 5))),
    ("mm", lambda m, x: torch.mm(x, m.w.t()), (3, 8), dict(w=(5, 8))),
    ("mm", lambda m, x: torch.mm(x, m.w[:, 2:7]), (3, 8), dict(w=(8, 9))),
    ("mm, weight on the left", lambda m, x: torch.mm(m.w, x), (8, 3), dict(w=(5, 8))),
    ("mm, weight on the left", lambda m, x: torch.mm(m.w, x.t()), (3, 8), dict(w=(5, 8))),
    ("addmm, as in GPT-2's Conv1D", lambda m, x: torch.addmm(m.b, x, m.w), (3, 8), dict(w=(8, 5), b=(5,))),
    ("addmm, as in GPT-2's Conv1D", lambda m, x: torch.addmm(m.b, x, m.w), (3, 8), dict(w=(8, 5), b=(3, 5))),
    ("addmm, as in GPT-2's Conv1D", lambda m, x: torch.addmm(m.b, x, m.w), (3, 8), dict(w=(8, 5), b=(1, 5))),
    ("addmm, as in GPT-2's Conv1D", lambda m, x: torch.addmm(m.b, x, m.w), (3, 8), dict(w=(8, 5), b=(1,))),
    ("addmm, as in GPT-2's Conv1D", lambda m, x: torch.addmm(x[0, :5], x, m.w), (3, 8), dict(w=(8, 5))),
    ("addmm, weight on the left", lambda m, x: torch.addmm(m.b, m.w, x), (8, 3), dict(w=(5, 8), b=(5, 1))),
    ("matmul", lambda m, x: x @ m.w, (3, 8), dict(w=(8, 5))),
    ("matmul", lambda m, x: x @ m.w.T, (2, 3, 8), dict(w=(5, 8))),
    ("matmul", lambda m, x: x @ m.w.mT, (2, 3, 8), dict(w=(5, 8))),
    ("matmul", lambda m, x: x @ m.w.permute(-1, 0), (2, 3, 8), dict(w=(5, 8))),
    ("matmul", lambda m, x: x @ m.w.transpose(-1, 0), (8,), dict(w=(5, 8))),
    ("matmul by a vector", lambda m, x: x @ m.w, (2, 3, 8), dict(w=(8,))),
    ("matmul by a vector", lambda m, x: x @ m.w, (8,), dict(w=(8,))),
    ("matmul of a vector, weight on the left", lambda m, x: m.w @ x, (8,), dict(w=(5, 8))),
    ("matmul, weight on the left", lambda m, x: m.w @ x, (8, 3), dict(w=(5, 8))),
    ("matmul, weight on the left", lambda m, x: m.w @ x.mT, (2, 3, 8), dict(w=(5, 8))),
    ("matmul, one matrix for the whole batch", lambda m, x: x @ m.w, (2, 3, 8), dict(w=(1, 8, 5))),
    ("matmul, one matrix for the whole batch", lambda m, x: x @ m.w.expand(2, 8, 5), (2, 3, 8), dict(w=(8, 5))),
    ("bmm, one matrix for the whole batch", lambda m, x: torch.bmm(x, m.w), (1, 3, 8), dict(w=(1, 8, 5))),
    ("bmm, one matrix for the whole batch", lambda m, x: x.bmm(m.w.expand(2, -1, -1)), (2, 3, 8), dict(w=(8, 5))),
    ("aten.bmm, a matrix expanded over the batch",
     lambda m, x: x.bmm(m.w.expand(x.shape[0], -1, -1)), (2, 3, 8), dict(w=(8, 5))),
    ("aten.bmm, a matrix expanded over the batch",
     lambda m, x: x.bmm(m.w.expand(x.shape[0], -1, -1)), (2, 3, 8), dict(w=(1, 8, 5))),
    ("aten.matmul, a matrix expanded over the batch",
     lambda m, x: x @ m.w.t().expand(x.shape[0], 8, 5), (2, 3, 8), dict(w=(5, 8))),
    ("baddbmm, one matrix for the whole batch",
     lambda m, x: torch.baddbmm(m.b, x, m.w), (1, 3, 8), dict(w=(1, 8, 5), b=(5,))),
    ("baddbmm, one matrix for the whole batch",
     lambda m, x: torch.baddbmm(m.b, x, m.w.expand(2, 8, 5)), (2, 3, 8), dict(w=(8, 5), b=(2, 1, 5))),
    ("mv", lambda m, x: torch.mv(m.w, x), (8,), dict(w=(5, 8))),
    ("mv by a constant vector", lambda m, x: torch.mv(x, m.w), (3, 8), dict(w=(8,))),
    ("addmv", lambda m, x: torch.addmv(m.b, m.w, x), (8,), dict(w=(5, 8), b=(5,))),
    ("addmv", lambda m, x: torch.addmv(x[:5], m.w, x), (8,), dict(w=(5, 8))),
    ("inner", lambda m, x: torch.inner(x, m.w), (2, 3, 8), dict(w=(5, 8))),
    ("einsum", einsum("bsd,nd->bsn"), (2, 3, 8), dict(w=(5, 8))),
    ("einsum", einsum("bsd,dn->bns"), (2, 3, 8), dict(w=(8, 5))),
    ("einsum", einsum("bsd, dhe -> bhse"), (2, 3, 8), dict(w=(8, 2, 5))),
    ("einsum", einsum("bshe,dhe->bsd"), (2, 3, 4, 2), dict(w=(5, 4, 2))),
    ("einsum", einsum("bshe,ehd->bsd"), (2, 3, 4, 2), dict(w=(2, 4, 5))),
    ("einsum", einsum("bsd,d->bs"), (2, 3, 8), dict(w=(8,))),
    ("einsum", einsum("d,dn->n"), (8,), dict(w=(8, 5))),
    ("einsum", lambda m, x: torch.einsum("nd,bds->bns", m.w, x), (2, 8, 3), dict(w=(5, 8))),
    ("1×1 aten.conv1d", lambda m, x: F.conv1d(x, m.w, m.b), (2, 8, 6), dict(w=(5, 8, 1), b=(5,))),
    ("1×1 aten.conv1d", lambda m, x: F.conv1d(x, m.w, stride=2), (2, 8, 5), dict(w=(5, 8, 1))),
    ("1×1 aten.conv2d", lambda m, x: F.conv2d(x, m.w, m.b), (2, 8, 6, 5), dict(w=(5, 8, 1, 1), b=(5,))),
    ("1×1 aten.conv2d", lambda m, x: F.conv2d(x, m.w, stride=(2, 3)), (2, 8, 6, 7), dict(w=(5, 8, 1, 1))),
    ("1×1 aten.conv2d", lambda m, x: F.conv2d(x, m.w, stride=2), (8, 6, 7), dict(w=(5, 8, 1, 1))),
    ("1×1 aten.conv2d", lambda m, x: F.conv2d(x, m.w, dilation=3), (2, 8, 6, 7), dict(w=(5, 8, 1, 1))),
    ("1×1 aten.conv3d", lambda m, x: F.conv3d(x, m.w, m.b), (2, 8, 3, 4, 5), dict(w=(5, 8, 1, 1, 1), b=(5,))),
]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("rule, function, x, weights", CASES, ids=[f"{c[0]} {i}" for i, c in enumerate(CASES)])
def test_to_linear(rule, function, x, weights, dynamic):
    if rule.endswith("expanded over the batch") and not dynamic:
        rule = rule.removeprefix("aten.").partition(",")[0] + ", one matrix for the whole batch"
    x, weights = t(*x), {name: t(*shape) for name, shape in weights.items()}
    program = program_of(function, x, dynamic=dynamic, **weights)
    expected, before = outputs(program, x), program.graph.output_node().args[0][0].meta["val"]
    hits, _ = rewrite(program.graph, TO_LINEAR)
    assert hits == {rule: 1} or (dynamic and "batch" in rule and list(hits.values()) == [1])
    program.graph_module.recompile()
    linear = find(program, "aten.linear")
    assert not isinstance(match(LINEAR, linear), Miss)
    assert operators(program).keys().isdisjoint({str(k) for k in MATMULS} - {"aten.linear"})
    (y,) = program.graph.output_node().args[0]
    assert agree(y.meta["val"], before)
    torch.testing.assert_close(outputs(program, x), expected, rtol=1e-12, atol=1e-12)


def test_every_rule_has_a_case():
    assert {rule.name for rule in TO_LINEAR} == {case[0] for case in CASES}


def test_a_transposed_weight_is_used_as_it_is():
    program = program_of(lambda m, x: x @ m.w.T, t(3, 8), w=t(5, 8))
    rewrite(program.graph, TO_LINEAR)
    assert find(program, "aten.linear").args[1].op == "get_attr"


def test_a_bias_for_each_output_goes_into_the_linear():
    program = program_of(lambda m, x: torch.addmm(m.b, x, m.w), t(3, 8), w=t(8, 5), b=t(5))
    rewrite(program.graph, TO_LINEAR)
    assert find(program, "aten.linear").args[2].target == "b" and "aten.add" not in operators(program)


NEAR_MISSES = [
    (lambda m, x: x @ m.w, (2, 3, 8), dict(w=(2, 8, 5)), r"batch of 2 matrices \[2, 8, 5\]"),
    (lambda m, x: torch.bmm(x, m.w), (2, 3, 8), dict(w=(2, 8, 5)), r"batch of 2 matrices \[2, 8, 5\]"),
    (lambda m, x: torch.baddbmm(m.b, x, m.w), (2, 3, 8), dict(w=(2, 8, 5), b=(5,)), "batch of 2 matrices"),
    (lambda m, x: torch.baddbmm(m.b, x, m.w, beta=2), (1, 3, 8), dict(w=(1, 8, 5), b=(5,)), "2 where 1 is needed"),
    (lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5), (3, 8), dict(w=(8, 5), b=(5,)), "0.5 where 1 is needed"),
    (lambda m, x: torch.addmm(m.b, x, m.w, alpha=2), (3, 8), dict(w=(8, 5), b=(5,)), "2 where 1 is needed"),
    (lambda m, x: torch.addmv(m.b, m.w, x, beta=2), (8,), dict(w=(5, 8), b=(5,)), "2 where 1 is needed"),
    (lambda m, x: torch.mm(x, x), (8, 8), dict(), "not a constant"),
    (lambda m, x: (m.w @ m.w) * x.sum(), (3, 8), dict(w=(8, 8)), "both operands are constants"),
    (lambda m, x: F.conv2d(x, m.w, padding=1), (2, 8, 6, 5), dict(w=(5, 8, 1, 1)), r"padding \[1, 1\]"),
    (lambda m, x: F.conv2d(x, m.w, groups=2), (2, 8, 6, 5), dict(w=(4, 4, 1, 1)), "in 2 groups"),
    (lambda m, x: F.conv2d(x, m.w), (2, 8, 6, 5), dict(w=(5, 8, 3, 1)), "a 3×1 convolution is no matmul"),
    (lambda m, x: F.conv1d(x, m.w), (2, 8, 6), dict(w=(5, 8, 2)), "a 2 convolution is no matmul"),
    (einsum("bd,nd"), (3, 8), dict(w=(5, 8)), "implicit or has an ellipsis"),
    (einsum("...d,nd->...n"), (3, 8), dict(w=(5, 8)), "implicit or has an ellipsis"),
    (einsum("bsd,bdn->bsn"), (2, 3, 8), dict(w=(2, 8, 5)), "is a batch of matrices"),
    (einsum("bd,d->bd"), (3, 8), dict(w=(8,)), "is a batch of matrices"),
    (einsum("bd,nd->b"), (3, 8), dict(w=(5, 8)), "no matrix product"),
    (einsum("bd,nm->bdnm"), (3, 8), dict(w=(5, 2)), "no matrix product"),
    (einsum("dd,dn->n"), (8, 8), dict(w=(8, 5)), "an index repeats"),
    (lambda m, x: torch.einsum("bd,nd,n->bn", x, m.w, m.v), (3, 8), dict(w=(5, 8), v=(5,)), "3 operands"),
    (lambda m, x: torch.einsum("bd,nd->bn", x, x), (3, 8), dict(), "no operand is a constant"),
    (lambda m, x: torch.einsum("bd,nd->bn", m.w, m.w) * x, (1,), dict(w=(5, 8)), "both operands are constants"),
]


@pytest.mark.parametrize("function, x, weights, reason", NEAR_MISSES)
def test_near_misses(function, x, weights, reason):
    x, weights = t(*x), {name: t(*shape) for name, shape in weights.items()}
    program = program_of(function, x, **weights)
    before = program.text()
    hits, misses = rewrite(program.graph, TO_LINEAR)
    assert not hits and program.text() == before
    assert len(misses) == 1 and re.search(reason, *misses.values())


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", t(8, 5))

    def forward(self, x):
        self.weight.mul_(2)
        return x @ self.weight


def test_a_weight_that_the_graph_writes_is_no_weight():
    hits, misses = rewrite(program_of(Written(), t(3, 8)).graph, TO_LINEAR)
    assert not hits and "not a constant" in " ".join(misses.values())


# --- what multiplies matrices ------------------------------------------------------------------------------

OPERANDS = {
    "linear": (lambda m, x: F.linear(x, m.w), "aten.linear", ["w"]),
    "left": (lambda m, x: m.w @ x, "aten.matmul", ["w"]),
    "both constant": (lambda m, x: (m.w @ m.w) * x, "aten.matmul", []),
    "none constant": (lambda m, x: x @ x, "aten.matmul", []),
    "einsum": (lambda m, x: torch.einsum("ij,jk", x, m.w), "aten.einsum", ["w"]),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, 1), "aten.tensordot", ["w"]),
    "the bias of addmm is no operand": (lambda m, x: torch.addmm(m.w, x, x), "aten.addmm", []),
    "no product": (lambda m, x: x * m.w, "aten.mul", []),
    "a scaling": (lambda m, x: x[:, :1] @ m.w[:1], "aten.matmul", []),
    "a convolution over more than a point": (
        lambda m, x: F.conv1d(x[None], m.w.view(8, 4, 2)[:, :, :].repeat(1, 2, 1)), "aten.conv1d", []),
    "a pointwise convolution": (lambda m, x: F.conv1d(x[None], m.w[..., None]), "aten.conv1d", ["unsqueeze_1"]),
    "picked by data": (lambda m, x: x @ m.w[x[0].argsort()], "aten.matmul", ["index"]),
}  # fmt: skip


@pytest.mark.parametrize("function, operator, expected", OPERANDS.values(), ids=OPERANDS.keys())
def test_weight_operands(function, operator, expected):
    program = program_of(function, t(8, 8), w=t(8, 8))
    assert [n.name for n in weight_operands(find(program, operator))] == expected


def test_what_lies_under_an_operand():
    program = program_of(lambda m, x, i: (x @ m.w[i], x @ x.mT), t(2, 3, 8), torch.tensor([1, 0]), w=t(4, 8, 5))
    picked, plain = (n for n in program.graph.nodes if n.target is aten.matmul.default)
    assert underlying(picked.args[1]) == "picked by data" and underlying(plain.args[1]) is None
    expanded = program_of(lambda m, x: x.bmm(m.w.expand(x.shape[0], -1, -1)), t(2, 3, 8), dynamic=True, w=t(8, 5))
    assert underlying(find(expanded, "aten.bmm").args[1]) == "expanded"
