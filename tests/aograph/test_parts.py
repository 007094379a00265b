"""Models that export cannot take whole run in parts, and the report says so."""

import gc

import pytest
import torch

import aograph
from aograph import CaptureError, RecipeError
from aograph.frozen import can_release
from tests.small_models import Branching

pytestmark = pytest.mark.usefixtures("fresh_compiler")
X = torch.rand(3, 64)  # its sum is positive
told = pytest.warns(UserWarning, match=r"Branching runs in parts.*small_models\.py:\d+ in forward.* no artifact")


def optimized(*args, **kwargs):
    with told:
        return aograph.optimize(*args, compile=False, **kwargs)


@pytest.mark.parametrize("given", [X, None], ids=["at once", "at the first call"])
def test_it_falls_back_and_says_why_where_and_what_it_costs(given):
    model = Branching().train()
    if given is None:
        fast = aograph.optimize(model, "int8wo", compile=False)
        with told:
            y = fast(X)
    else:
        fast = optimized(model, "int8wo", given)
        y = fast(X)
    assert torch.equal(fast(-X), -X) and model.training
    error = (y - model(X)).norm() / model(X).norm()
    assert 0 < error < 0.02 and not y.requires_grad
    (row,) = fast.report.rewritten
    assert row.name == "linear" and 0 < row.error < 0.02
    assert fast.report.bytes_after < fast.report.bytes_before
    why, cost, graphs = fast.report.notes
    assert "data-dependent" in why and "no artifact" in cost and graphs.startswith("2 graphs")
    assert all(note in str(fast.report) for note in fast.report.notes)
    assert fast.report.as_dict()["notes"] == fast.report.notes


def test_compiled():
    with told:
        fast = aograph.optimize(Branching(), "int8wo", X, compile_options={"dynamic": False})
    model = fast._model[0]
    assert (fast(X) - model(X)).norm() < 0.02 * model(X).norm()


def test_names_are_the_models_own_and_rules_hold_for_the_graphs_that_have_them():
    model = torch.nn.Sequential(Branching(), Branching())
    with pytest.warns(UserWarning, match="Sequential runs in parts"):
        fast = aograph.optimize(model, "int8wo + 1.linear:none", X, compile=False)
    fast(X.abs() + 10 * torch.ones(64))
    outcomes = {row.name: row.outcome for row in fast.report.rows}
    assert outcomes.get("0.linear") == "rewritten" and outcomes.get("1.linear", "excluded") == "excluded"


def test_handing_over():
    model = Branching()
    fast = optimized(model, "int8wo", X, hand_over=True)
    expected = model(X)
    y = fast(X)
    gc.collect()
    assert (y - expected).norm() < 0.02 * expected.norm()
    kept = model.linear.weight.untyped_storage().nbytes()
    assert bool(kept) != can_release()
    assert any("released" if can_release() else "originals are kept" in note for note in fast.report.notes)


def test_what_needs_a_whole_graph_is_refused():
    with pytest.raises(CaptureError, match="small_models"):
        aograph.optimize(Branching(), "int8wo", X, dynamic_shapes={"x": None})
    with pytest.raises(CaptureError, match="small_models"):
        aograph.explain(Branching(), "int8wo", X)
    with pytest.raises(aograph.AographError, match=r"parts|whole"):
        optimized(Branching(), "int8wo", X).save("model.pt2")


def test_a_recipe_is_read_at_once():
    with pytest.raises(RecipeError):
        aograph.optimize(Branching(), "int5wo", X)
