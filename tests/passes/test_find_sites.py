import pytest
import torch
import torch.nn.functional as F
from aograph.passes import Stage
from torch import nn

from aograph import RecipeError
from tests.programs import apply, program_of, up_to
from tests.small_models import MLP, Tied

X, W = torch.randn(3, 64), torch.randn(64, 64)


def rows_of(model, *inputs, recipe="int8wo", dynamic=False, **weights):
    program = program_of(model, *(inputs or (X,)), dynamic=dynamic, **weights)
    apply(program, *up_to(Stage.DECIDE), recipe=recipe)
    return program, program.rows


def test_a_row_says_where_and_what():
    program, (up, down) = rows_of(MLP())
    assert (up.name, up.operator, up.module) == ("up", "linear", "torch.nn.modules.linear.Linear")
    assert (int(up.shape.M), up.shape.N, up.shape.K, up.shape.bounds) == (3, 128, 64, (3, 3))
    assert up.dtype == torch.float32 and up.bytes_before == 128 * 64 * 4
    assert [s.rows for s in program.sites] == [[up], [down]]
    assert {str(s.scheme) for s in program.sites} == {"int8wo"}


def test_m_in_symbols():
    program, (up, _) = rows_of(MLP(), torch.randn(2, 3, 64), dynamic=True)
    a, b = (s.node.expr for s in program.inputs[0].meta["val"].shape[:2])
    assert a * b == up.shape.M and up.shape.bounds[1] is None


def test_the_operator_is_the_one_that_the_model_wrote():
    def forward(m, x):
        return F.linear(x, m.w), x @ m.w, torch.einsum("md,dn->mn", x, m.w), torch.addmm(x, x, m.w)

    _, rows = rows_of(forward, w=W)
    assert [row.operator for row in rows] == ["linear", "matmul", "einsum", "addmm"]


NAMES = {
    "a module": (lambda m, x: m.up(x), ["up"]),
    "a slice": (lambda m, x: F.linear(x, m.up.weight[:64]), ["up[0:64]"]),
    "an open slice": (lambda m, x: F.linear(x, m.up.weight[64:]), ["up[64:128]"]),
    "a column slice": (lambda m, x: F.linear(x[:, :32], m.up.weight[:, 32:]), ["up[:, 32:64]"]),
    "a transposed slice": (lambda m, x: x @ m.up.weight[16:].T, ["up[16:128]"]),
    "chunks": (lambda m, x: [F.linear(x, w) for w in m.up.weight.chunk(2)], ["up[chunk 0]", "up[chunk 1]"]),
    "an index": (lambda m, x: F.linear(x, m.bank[1]), ["bank[1]"]),
}


class Named(MLP):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.bank = nn.Parameter(torch.randn(2, 8, 64))

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize("function, names", NAMES.values(), ids=NAMES.keys())
def test_names(function, names):
    _, rows = rows_of(Named(function))
    assert [row.name for row in rows] == names


def test_a_tied_weight_goes_by_the_module_that_multiplies():
    _, rows = rows_of(Tied(), torch.arange(3)[None])
    assert [row.name for row in rows] == ["middle", "head"]


RECIPES = [
    ("int8wo", "rewritten later", None),
    ("int8wo+up:none", "excluded", "excluded by rule 2"),
    ("down:int8wo", "skipped", "no rule of the recipe matches"),
]


@pytest.mark.parametrize("recipe, outcome, note", RECIPES)
def test_decisions(recipe, outcome, note):
    program, (up, _) = rows_of(MLP(), recipe=recipe)
    taken = [site.scheme is not None for site in program.sites]
    assert taken[1] and taken[0] == (note is None)
    if note is not None:
        assert up.outcome == outcome and up.notes == [note] and up.bytes_after == up.bytes_before


class Bank(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 64, 64))

    def forward(self, x):
        return torch.bmm(x[:, None], self.experts[x.argmax(-1) % 4])


REASONS = {
    "no linear": (lambda m, x: torch.einsum("md,nd", x, m.w), dict(w=W), "near miss", "implicit"),
    "float64": (lambda m, x: x.double() @ m.w, dict(w=W.double()), "near miss", "unsupported dtype torch.float64"),
    "another role": (lambda m, x: F.linear(x, m.w) + m.w[0], dict(w=W), "skipped", "another role (add)"),
    "an output": (lambda m, x: (F.linear(x, m.w), m.w.t()), dict(w=W), "skipped", "another role (an output)"),
    "empty": (lambda m, x: F.linear(x, m.w), dict(w=torch.empty(0, 64)), "skipped", "the weight is empty"),
}


@pytest.mark.parametrize("function, weights, outcome, reason", REASONS.values(), ids=REASONS.keys())
def test_reasons(function, weights, outcome, reason):
    program, (row,) = rows_of(function, **weights)
    assert row.outcome == outcome and len(row.notes) == 1 and reason in row.notes[0]
    assert not any(site.scheme for site in program.sites)


def test_an_expert_bank_is_a_near_miss():
    _, (row,) = rows_of(Bank())
    assert row.outcome == "near miss" and row.shape is None
    assert row.notes == ["the weight is picked by data (an expert bank)"]


def test_one_weight_in_two_linears_is_no_other_role():
    program, rows = rows_of(lambda m, x: F.linear(F.linear(x, m.w), m.w), w=W)
    assert len(rows) == 2 and all(site.scheme for site in program.sites)


def test_products_inside_a_subgraph_are_near_misses():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: self.linear(x), lambda x: x.clone(), (x,))

    _, (row,) = rows_of(Conditional())
    assert row.outcome == "near miss" and "passes do not enter" in row.notes[0]


@pytest.mark.parametrize("low, high, taken", [(2, 16, True), (17, 64, False), (2, 64, None)])
def test_a_predicate_on_a_dynamic_m(low, high, taken):
    from aograph import Int8WeightOnly, Rule
    from aograph.capture import capture

    shapes = ({0: torch.export.Dim("m", min=low, max=high)},)
    program = capture(MLP().eval(), (torch.randn(low + 1, 64),), {}, shapes).program
    apply(program, *up_to(Stage.DECIDE), recipe=[Rule(Int8WeightOnly(), shape="M <= 16", optional=True)])
    assert all((site.scheme is not None) == bool(taken) for site in program.sites)
    undecided = any("rule [1] is undecided for M" in note for row in program.rows for note in row.notes)
    assert undecided == (taken is None)


def test_a_selector_that_matches_nothing():
    with pytest.raises(RecipeError, match="did you mean 'down'"):
        rows_of(MLP(), recipe="dwn:int8wo")


class Writing(torch.nn.Module):
    """Writes buffers of several shapes."""

    def __init__(self):
        super().__init__()
        for name, shape in {"count": [], "mean": [4], "table": [2, 4], "cache": [2, 3, 8, 16]}.items():
            self.register_buffer(name, torch.zeros(shape))

    def forward(self, x):
        for buffer in (self.count, self.mean, self.table, self.cache):
            buffer.add_(1)
        return x + self.cache.sum()


def test_caches_are_candidates_of_rules_for_caches():
    def caches(recipe):
        program = program_of(Writing(), torch.randn(3))
        apply(program, "find_sites", recipe=recipe)
        return [(site.node.target, site.scheme and str(site.scheme)) for site in program.caches], program.rows

    (found, (row,)) = caches("kv8")
    assert found == [("cache", "kv8")] and (row.name, row.kind, row.tokens) == ("cache", "cache", 16)
    assert (row.operator, row.shape, row.bytes_before) == ("add_", None, 2 * 3 * 8 * 16 * 4)
    assert caches("int8wo") == ([], [])
    found, (row,) = caches("kv8 + cache:none")
    assert found == [("cache", None)] and (row.outcome, row.notes) == ("excluded", ["excluded by rule 2"])
    assert caches("int8wo + c*e:kv4")[0] == [("cache", "kv4")]
