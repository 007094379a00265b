"""Weights become 2:4, and linears sparse where that pays."""

import copy

import pytest
import torch
import torch.nn.functional as F
from aograph.kernels import sparse24_linear as kernel
from aograph.kernels.prune24 import prune24
from aograph.kernels.sparse24 import decompress
from aograph.passes import Stage
from torch import nn

import aograph
from aograph import Recipe, Sparse24
from aograph.statistics import LinearStatistics
from tests.artifacts import FAST_BUILD
from tests.programs import apply, operators, program_of, up_to
from tests.small_models import MLP, Tied, untouched

X = torch.randn(5, 64)
pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def sparse(monkeypatch):
    """As where there is a kernel that is faster from 4 tokens on: the linears become sparse, here by decompression."""
    pays = lambda case, op: case.M >= 4 or "slower than dense below M = 4"  # noqa: E731
    monkeypatch.setattr("aograph.passes.sparse24.pays", pays)


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 32), nn.Linear(64, 16)

    def forward(self, x):
        return self.a(x), self.b(x)


def pruned(model, norms=None):
    """A copy whose linears are pruned."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(prune24(module.weight.detach(), norms))
    return model


def calibrated(method="wanda", **norms):
    statistics = {name.replace("_", "."): LinearStatistics(-1.0, 1.0, each, 8) for name, each in norms.items()}
    return Recipe(Recipe.of(Sparse24(method)).rules, statistics)


def optimized(model, recipe="sparse24", x=X, **options):
    return aograph.optimize(model, recipe, x, compile=False, **options)


def text(fast):
    return next(iter(fast._captures.values()))[1].program.text()


def test_without_a_sparse_kernel_the_pruned_weight_stays_dense():
    model = MLP().eval()
    with untouched(model, X):
        fast = optimized(model)
        torch.testing.assert_close(fast(X), pruned(model)(X))
    for row in fast.report.rows:
        assert (row.outcome, row.scheme, row.kernel) == ("rewritten", "sparse24", "dense")
        assert row.notes == ["2:4 by magnitude", "dense: no sparse kernel on cpu"]
        assert row.bytes_after == row.bytes_before and 0.3 < row.error < 0.6
    assert "prune24" not in text(fast)  # nothing is pruned at a call


@pytest.mark.usefixtures("sparse")
def test_sparse_where_it_pays_for_some_number_of_tokens():
    model = MLP().eval()
    for shapes, notes in [(None, ["slower than dense below M = 4"]), (({},), [])]:
        fast = optimized(model, dynamic_shapes=shapes)
        assert text(fast).count("aograph.sparse24_linear") == 2 and "aten.linear" not in text(fast)
        torch.testing.assert_close(fast(X), pruned(model)(X))
        for row in fast.report.rows:
            assert row.kernel == "dequantize" and row.notes == ["2:4 by magnitude", *notes] and 0.3 < row.error < 0.6
            assert row.bytes_after == row.bytes_before * 17 // 32  # in fp32
    few = optimized(model, x=X[:3], dynamic_shapes=({},))
    assert "sparse24_linear" not in text(few)
    assert few.report.rows[0].notes[-1] == "dense: slower than dense below M = 4"


@pytest.mark.usefixtures("sparse")
def test_the_error_is_that_of_pruning_and_product():
    model = MLP().eval()
    row = optimized(model).report.rows[0]
    x = torch.randn(4096, 64)
    dense = F.linear(x, model.up.weight)
    expected = (F.linear(x, prune24(model.up.weight.detach())) - dense).norm() / dense.norm()
    assert row.error == pytest.approx(expected.item(), rel=0.1)


@pytest.mark.parametrize("width", [64, 66])
def test_k_that_four_does_not_divide(width):
    fast = optimized(MLP(width), x=torch.randn(5, width))
    notes = fast.report.rows[0].notes
    assert (notes == ["K = 66 is not a multiple of 4"]) == (width == 66)
    assert fast.report.rows[1].outcome == "rewritten"


@pytest.mark.parametrize("compiled", [False, True])
def test_a_weight_that_is_2_4_already_is_said_to_be(compiled):
    model = MLP().eval()
    model.up.weight = nn.Parameter(prune24(model.up.weight.detach()), requires_grad=False)
    model.down.weight.requires_grad_(False)
    if compiled:
        reports = []
        options = {"recipe": "sparse24", "compile": False, "report": reports.append}
        torch.compile(model, backend="aograph", options=options)(X)
        (report,) = reports
    else:
        fast = optimized(model)
        fast(torch.randn(2, 3, 64))  # another capture, which packs nothing
        report = fast.report
    up, down = report.rows
    assert up.notes == ["2:4 by magnitude", "dense: no sparse kernel on cpu", "2:4 already"] and up.error < 1e-6
    assert "2:4 already" not in down.notes


@pytest.mark.parametrize("disable", [(), ("merge_linears",)])
@pytest.mark.usefixtures("sparse")
def test_siblings(disable):
    model = Siblings().eval()
    fast = optimized(model, disable=disable)
    assert text(fast).count("aograph.sparse24_linear") == (2 if disable else 1)
    torch.testing.assert_close(fast(X), pruned(model)(X))


def test_a_tied_table_stays_whole_where_it_is_looked_up():
    model, ids = Tied().eval(), torch.arange(12).view(2, 6)
    fast = optimized(model, x=ids)
    expected = F.linear(pruned(model).middle(model.embedding(ids)), prune24(model.head.weight.detach()))
    torch.testing.assert_close(fast(ids), expected)


def test_pruning_is_left_out_with_its_pass_and_so_is_the_rest():
    model = MLP().eval()
    with pytest.warns(UserWarning, match="rewrote nothing"):
        fast = optimized(model, disable=["prune24"])
    torch.testing.assert_close(fast(X), model(X))


# --- Wanda -------------------------------------------------------------------------------------------------


def test_wanda_without_statistics_is_skipped():
    with pytest.warns(UserWarning, match="needs calibrated statistics"):
        fast = optimized(MLP().eval(), "sparse24(method=wanda)")
    note = "needs calibrated statistics: aograph.calibrate(model, recipe, batches)"
    assert {(row.outcome, *row.notes) for row in fast.report.rows} == {("skipped", note)}


@pytest.mark.parametrize("disable", [(), ("merge_linears",)])
def test_wanda_takes_the_norms_of_the_inputs(disable, sparse):
    model, norms = Siblings().eval(), torch.rand(64) * 10
    fast = optimized(model, calibrated(a_weight=norms, b_weight=norms), disable=disable)
    torch.testing.assert_close(fast(X), pruned(model, norms)(X))
    assert all(row.notes[0].startswith("merged") or row.notes[0] == "2:4 by Wanda" for row in fast.report.rows)
    assert "norms" not in text(fast) and not any("norms" in name for name in fast.state_dict())


def test_norms_of_other_inputs_are_not_taken():
    recipe = calibrated(up_weight=torch.ones(3), down_weight=torch.ones(128))
    up, down = optimized(MLP().eval(), recipe).report.rows
    assert up.notes == ["its weight was calibrated with other inputs than these 64, too"]
    assert (up.outcome, down.outcome) == ("skipped", "rewritten")


def test_other_statistics_make_other_weights_of_one_model():
    model = MLP().eval().requires_grad_(False)
    for norms in (torch.rand(64) * 10, torch.rand(64) * 10):
        recipe = calibrated(up_weight=norms, down_weight=torch.ones(128))
        expected = pruned(model)
        expected.up.weight = nn.Parameter(prune24(model.up.weight, norms))
        options = {"recipe": recipe, "compile": False}
        torch.testing.assert_close(torch.compile(model, backend="aograph", options=options)(X), expected(X))


def test_hand_over():
    norms = torch.rand(64)
    model = MLP().eval()
    expected = pruned(model)
    expected.up.weight = nn.Parameter(prune24(model.up.weight.detach(), norms))
    fast = optimized(model, calibrated(up_weight=norms, down_weight=torch.ones(128)), hand_over=True)
    assert model.up.weight.is_meta
    torch.testing.assert_close(fast(X), expected(X))


# --- the other door, changed weights, artifacts --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_behind_compile_new_weights_are_pruned_again(kind, request):
    if kind == "sparse":
        request.getfixturevalue("sparse")
    model = MLP().eval().requires_grad_(False)
    run = torch.compile(model, backend="aograph", options={"recipe": "sparse24", "compile": False})
    torch.testing.assert_close(run(X), pruned(model)(X))
    model.up.weight.copy_(torch.randn(128, 64))
    torch.testing.assert_close(run(X), pruned(model)(X))


def test_what_kernels_keep_is_made_ahead_of_calls_and_again_when_weights_are_filled_in(sparse, monkeypatch):
    prepared = []
    monkeypatch.setattr(kernel.sparse24_linear, "prepare", lambda *packed: prepared.append(decompress(*packed)))
    model = MLP().eval().requires_grad_(False)
    optimized(model)
    assert [weight.shape for weight in prepared] == [(128, 64), (64, 128)]
    run = torch.compile(model, backend="aograph", options={"recipe": "sparse24", "compile": False})
    run(X)
    run(X)
    assert len(prepared) == 4
    model.up.weight.mul_(2)
    run(X)
    assert len(prepared) == 5 and torch.equal(prepared[-1], prune24(model.up.weight))


def test_gradients_of_adapters_pass_through(sparse):
    model = MLP().eval().requires_grad_(False)
    x = X.clone().requires_grad_()
    run = torch.compile(model, backend="aograph", options={"recipe": "sparse24", "compile": False})
    (actual,) = torch.autograd.grad(run(x).sum(), x)
    (expected,) = torch.autograd.grad(pruned(model)(x).sum(), x)
    torch.testing.assert_close(actual, expected)


def test_an_artifact_prunes_new_weights_with_the_norms_it_was_saved_with(tmp_path):
    norms = torch.rand(64) * 10
    model = MLP().eval()
    fast = optimized(model, calibrated(up_weight=norms, down_weight=torch.ones(128)), dynamic_shapes=({},))
    fast.save(tmp_path / "model.pt2", options=FAST_BUILD)
    artifact = aograph.load(tmp_path / "model.pt2")
    torch.testing.assert_close(artifact(X), fast(X))
    new = MLP().eval()
    assert artifact.update_weights(new.state_dict()) == 2
    expected = pruned(new)
    expected.up.weight = nn.Parameter(prune24(new.up.weight.detach(), norms))
    torch.testing.assert_close(artifact(X), expected(X))


@pytest.mark.usefixtures("sparse")
def test_the_graph_verifies_after_each_pass_and_on_fake_weights():
    program = program_of(MLP(), X)
    apply(program, *up_to(Stage.SPARSIFY), recipe="sparse24")
    assert operators(program)["aograph.prune24"] == 2
    apply(program, "sparse24", "eliminate_dead_code", recipe="sparse24")
    assert operators(program)["aograph.prune24"] == 0 and operators(program)["aograph.sparse24_linear"] == 2
    report = aograph.explain(MLP().to("meta"), "sparse24", torch.empty(5, 64, device="meta"))
    assert [row.outcome for row in report.rows] == ["rewritten"] * 2
