import json

import pytest
import sympy
import torch

from aograph import Report, Row, explain, optimize
from aograph.predicate import Shape
from aograph.report import NEAR_MISS, REWRITTEN, megabytes
from tests.small_models import MLP, Tied

X = torch.randn(3, 64)


@pytest.fixture
def report():
    return optimize(MLP().eval(), "int8wo+up:none", X, compile=False).report


def test_as_dict(report):
    document = json.loads(json.dumps(report.as_dict()))
    up, down = document["rows"]
    assert (up["name"], up["outcome"], up["notes"]) == ("up", "excluded", "excluded by rule 2")
    assert (down["scheme"], down["N"], down["K"], down["dtype"]) == ("int8wo", 64, 128, "float32")
    assert 0 < down["error"] < 0.02 and up["error"] is None
    assert [h["name"] for h in document["history"]] == [h.name for h in report.history]


def test_totals_count_each_weight_once(report):
    model = MLP()
    before = sum(p.nbytes for p in model.parameters())
    assert report.bytes_before == before
    assert report.bytes_after == before - model.down.weight.nbytes + 64 * 128 + 64 * 4
    tied = explain(Tied().eval(), "int8wo", torch.arange(3)[None])
    assert tied.bytes_before == sum(p.nbytes for p in Tied().parameters())  # the shared table once
    head = 96 * 64 + 96 * 4
    assert tied.bytes_after == 96 * 64 * 4 + head + 64 * 64 + 64 * 4 + 64 * 4  # kept for the embedding, and packed


def test_summary(report):
    assert report.summary() == "2 candidates: 1 rewritten, 1 excluded; weights 66.3 KB → 42 KB"
    assert Report().summary() == "0 candidates: nothing to rewrite; weights 0 B → 0 B"
    assert [row.name for row in report.rewritten] == ["down"]


def test_table(report):
    text = str(report)
    assert text.endswith(report.summary())
    for word in ("up", "down", "linear", "excluded by rule 2", "int8wo", "M×N×K", "×64×128"):
        assert word in text
    assert f"{report.rows[1].error:.2%}" in text


def test_passes(report):
    text = report.passes()
    assert all(h.name in text and h.stage in text for h in report.history)


def test_costs_leave_out_what_is_no_linear():
    row = Row("bank", "bmm", "", None, torch.float32)
    row.close(NEAR_MISS, "an expert bank")
    linear = Row("a", "linear", "", Shape(sympy.Integer(3), 64, 64, (3, 3)), torch.float32, bytes_before=16384)
    report = explain(MLP().eval(), "int8wo", X)
    report.rows = [row, linear]
    assert "bank" not in report.costs() and "a " in report.costs()
    assert "bank" in str(report)


def test_closing_a_row():
    row = Row("a", "linear", "", None, torch.float32, bytes_before=8)
    row.close(NEAR_MISS, "why not")
    assert (row.outcome, row.notes, row.bytes_after) == (NEAR_MISS, ["why not"], 8)
    assert row.as_dict()["notes"] == "why not" and row.as_dict()["M"] is None


def test_a_rewritten_row_has_all_fields():
    for row in explain(MLP().eval(), "int4wo", torch.randn(2, 3, 64)).rows:
        assert row.outcome == REWRITTEN and row.scheme == "int4wo" and row.kernel
        assert row.bytes_after < row.bytes_before / 5 and row.operator == "linear"


@pytest.mark.parametrize(
    "size, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (66304, "66.3 KB"), (2e6, "2 MB"), (3.5e12, "3.5e+03 GB")],
)
def test_sizes_for_people(size, text):
    assert megabytes(size) == text
