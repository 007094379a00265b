import pytest
import torch
import torch.nn.functional as F
from aograph.passes import Stage
from torch import nn

from tests.programs import apply, find, operators, outputs, program_of, up_to

X = torch.randn(3, 64)


def weights(*shapes):
    return {f"w{i}": torch.randn(shape) / 8 for i, shape in enumerate(shapes)}


def merged(model, *inputs, recipe="int8wo", **parameters):
    """The program after merging; it computes what it did, and merging again changes nothing."""
    inputs = inputs or (X,)
    program = program_of(model, *inputs, **parameters)
    expected = outputs(program, *inputs)
    apply(program, *up_to(Stage.DECIDE), recipe=recipe)
    (program.matches,) = apply(program, "merge_linears", recipe=recipe)
    torch.testing.assert_close(outputs(program, *inputs), expected, rtol=1e-4, atol=1e-4)
    before = program.text()
    assert apply(program, "merge_linears", recipe=recipe) == [0] and program.text() == before
    return program


class QKV(nn.Module):
    def __init__(self, bias=True, widths=(64, 32, 32)):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, width, bias=bias) for width in widths)

    def forward(self, x):
        return self.q(x).sin(), self.k(x), self.v(x).relu()


@pytest.mark.parametrize("bias", [False, True])
def test_siblings(bias):
    program = merged(QKV(bias))
    assert program.matches == 1
    assert operators(program)["aten.linear"] == 1 and operators(program)["aten.cat"] == 1 + bias
    (site,) = program.sites
    assert (site.N, site.K) == (128, 64) and [r.name for r in site.rows] == ["q", "k", "v"]
    assert [r.notes for r in site.rows] == [["merged with k, v"], ["merged with q, v"], ["merged with q, k"]]
    assert [r.shape.N for r in site.rows] == [64, 32, 32]


def test_siblings_with_and_without_a_bias_are_two_groups():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 8), nn.Linear(64, 8)
            self.c, self.d = nn.Linear(64, 8, bias=False), nn.Linear(64, 8, bias=False)

        def forward(self, x):
            return self.a(x), self.c(x), self.b(x), self.d(x)

    program = merged(Mixed())
    assert program.matches == 2
    assert sorted([r.name for r in s.rows] for s in program.sites) == [["a", "b"], ["c", "d"]]


def test_dynamic_shapes():
    program = program_of(QKV(), X, dynamic=True)
    expected = outputs(program, X[:2])
    apply(program, *up_to(Stage.FUSE))
    assert operators(program)["aten.linear"] == 1
    torch.testing.assert_close(outputs(program, X[:2]), expected)


def test_siblings_that_stand_far_apart():
    """The first sibling's output feeds what stands between them."""

    def forward(m, x):
        y = F.linear(x, m.w0).relu()
        return y @ y.T, F.linear(x, m.w1.t())

    program = merged(forward, **weights((64, 64), (64, 64)))
    assert program.matches == 1 and find(program, "aten.linear")


VIEWS = {
    "slices": lambda m, x: (F.linear(x, m.w0[:64]), F.linear(x, m.w0[64:])),
    "chunks": lambda m, x: [F.linear(x, w) for w in m.w0.chunk(2)],
    "splits": lambda m, x: [F.linear(x, w) for w in m.w0.split([96, 32])],
    "transposed": lambda m, x: (x @ m.w0[:64].T, x @ m.w0.T[:, 64:]),
}


@pytest.mark.parametrize("forward", VIEWS.values(), ids=VIEWS.keys())
def test_siblings_whose_weights_are_views(forward):
    program = merged(forward, **weights((128, 64)))
    assert program.matches == 1 and program.sites[0].N == 128


# --- what is not merged ------------------------------------------------------------------------------------


def test_a_linear_alone():
    assert merged(lambda m, x: F.linear(x, m.w0), **weights((64, 64))).matches == 0


def test_other_inputs():
    def forward(m, x):
        return F.linear(x, m.w0), F.linear(x.relu(), m.w1)

    assert merged(forward, **weights((64, 64), (64, 64))).matches == 0


@pytest.mark.parametrize("recipe", ["int8wo+k:int4wo", "int8wo+k:int8wo(algorithm=mse)", "int8wo+k:none"])
def test_other_schemes(recipe):
    program = merged(QKV(), recipe=recipe)
    assert program.matches == 1
    assert [[r.name for r in s.rows] for s in program.sites if s.scheme] in (
        [["q", "v"], ["k"]], [["k"], ["q", "v"]], [["q", "v"]]
    )  # fmt: skip


def test_no_scheme_no_merge():
    program = merged(QKV(), recipe="q:int8wo")
    assert program.matches == 0 and operators(program)["aten.linear"] == 3


def test_a_weight_tied_between_two_groups():
    def forward(m, x):
        y = x.relu()
        return F.linear(x, m.w0), F.linear(x, m.w1), F.linear(y, m.w0), F.linear(y, m.w2)

    assert merged(forward, **weights((64, 64), (64, 64), (64, 64))).matches == 0


def test_a_weight_that_is_used_alone_too():
    def forward(m, x):
        return F.linear(x, m.w0), F.linear(x, m.w1), F.linear(x.relu(), m.w1)

    assert merged(forward, **weights((64, 64), (64, 64))).matches == 0


def test_two_groups_of_the_same_weights():
    """A layer that runs twice: both groups merge, to one weight."""

    def forward(m, x):
        y = x.relu()
        return F.linear(x, m.w0), F.linear(x, m.w1), F.linear(y, m.w0), F.linear(y, m.w1)

    program = merged(forward, **weights((64, 64), (64, 64)))
    assert program.matches == 2
    apply(program, "int8_weight_only")
    assert len(program.packs) == 1


def test_x_written_between_siblings():
    def forward(m, x):
        y = x + 1
        a = F.linear(y, m.w0)
        y.mul_(2)
        return a, F.linear(y, m.w1)

    program = merged(forward, **weights((64, 64), (64, 64)))
    assert program.matches == 0 and operators(program)["aten.linear"] == 2


def test_a_bias_that_is_no_vector():
    def forward(m, x):
        return F.linear(x, m.w0, x[0, 0]), F.linear(x, m.w1, x[0, 1])

    program = program_of(forward, X, **weights((64, 64), (64, 64)))
    apply(program, *up_to(Stage.DECIDE))
    assert apply(program, "merge_linears") == [0]


def test_siblings_that_a_scheme_refuses_stay_apart():
    """A merged linear that nothing packs would join its weights at every call."""
    program = program_of(
        lambda m, x: (x @ m.a, x @ m.b), torch.randn(3, 48), a=torch.randn(48, 64), b=torch.randn(48, 64)
    )
    apply(program, *up_to(Stage.QUANTIZE), recipe="int4wo(group_size=64)")
    assert operators(program)["aten.linear"] == 2 and not operators(program)["aten.cat"]
    assert all("not divisible" in row.notes[0] for row in program.rows)


def test_a_view_that_needs_contiguous_siblings():
    x = torch.randn(3, 5, 64)
    weights = dict(a=torch.randn(32, 64), b=torch.randn(32, 64))
    program = program_of(
        lambda m, x: (F.linear(x, m.a).view(3, -1), F.linear(x, m.b).view(15, 32).view(3, -1)), x, **weights
    )
    expected = outputs(program, x)
    assert apply(program, *up_to(Stage.FUSE))[-1] == 1
    torch.testing.assert_close(outputs(program, x), expected)


def test_a_bias_that_comes_from_another_sibling():
    weights = dict(a=torch.randn(32, 64), b=torch.randn(32, 64))
    program = program_of(lambda m, x: F.linear(x, m.a, F.linear(x, m.b)[0]), torch.randn(3, 64), **weights)
    assert apply(program, *up_to(Stage.FUSE))[-1] == 0
