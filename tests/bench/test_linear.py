import json

import pytest
import torch
import torch.nn.functional as F

from bench import contenders, linear
from bench.contenders import Contender, Entry
from bench.device import Ceilings
from bench.dynamic_contenders import plain, recipe
from bench.linear import ENTRIES, Run

CPU = torch.device("cpu")
LIMITS = Ceilings(read=1e12, matmul=1e15)  # so high that a graph would be of many calls: see `run`


@pytest.fixture
def run(monkeypatch):
    """A run whose graphs are short, and whose contenders take as many µs a call as `run.us` says for their name."""
    found = Run(CPU, LIMITS, patience=1e9)
    monkeypatch.setattr(linear, "BUSY", 0)
    monkeypatch.setattr(linear, "cache_bytes", lambda device: 1024)
    monkeypatch.setattr(linear, "record", lambda calls, device: len(calls))
    found.us = {"bf16": 10.0, "int4": 4.0, "tinygemm": 6.0, "int8": 5.0}
    monkeypatch.setattr(linear, "medians", lambda runs, device: {n: found.us[n] * c * 1e-6 for n, c in runs.items()})
    return found


@pytest.fixture
def entries(monkeypatch):
    """The contenders that need nothing but torch."""
    found = {name: ENTRIES[name] for name in ("bf16", "int4", "tinygemm", "int8")}
    monkeypatch.setattr(linear, "ENTRIES", found)
    return found


def rows_of(run, tokens=(1, 4), kinds=("int4",)):
    return list(linear.sweep(run, 128, 256, dict.fromkeys(kinds, tokens), 64))


def test_a_row_has_ratios_and_the_kernel(run, entries):
    (row, _) = rows_of(run)
    assert row["us"] == {"bf16": 10.0, "int4": 4.0, "tinygemm": 6.0}
    assert (row["x bf16"], row["best peer"], row["x best peer"]) == (2.5, "tinygemm", 1.5)
    assert row["kernel"] in [each.name for each in contenders.int4.int4_linear]
    size = 128 * 256 // 2 + 4 * 128 * 4 + 2 * (256 + 128)  # codes, pairs, x and y
    assert row["share"] == pytest.approx(size / LIMITS.read / 4e-6, abs=1e-4)
    assert max(row["errors"].values()) < linear.TOLERANCE
    assert run.errors["int4"] >= row["errors"]["int4"] > 0


def test_a_hopeless_peer_is_skipped_at_more_tokens_only(run, entries):
    run.us["tinygemm"] = 10.0 * linear.HOPELESS + 1
    first, second = rows_of(run)
    assert first["us"]["tinygemm"] == run.us["tinygemm"]
    assert second["us"]["tinygemm"] == "skipped"
    assert "best peer" not in second
    assert rows_of(run, tokens=(1,))[0]["us"]["tinygemm"] == run.us["tinygemm"]  # another shape


def test_a_peer_that_fails_leaves_the_rest(run, entries, capsys):
    def broken(weights):
        return Contender((weights.plain,), lambda x, weight: (_ for _ in ()).throw(RuntimeError("no such kernel")))

    def missing(weights):
        import no_such_package  # noqa: F401

    entries |= {"broken": Entry("int4", broken), "missing": Entry("int4", missing)}
    for row in rows_of(run):
        assert (row["us"]["broken"], row["us"]["missing"]) == ("error", "not installed")
        assert row["us"]["int4"] == 4.0
    told = capsys.readouterr().err
    assert told.count("no such kernel") == told.count("no_such_package") == 1


def test_a_peer_that_compiles_too_long_is_left_out(run, entries):
    run.patience = 0
    first, second = rows_of(run)
    assert first["us"]["tinygemm"] == 6.0
    assert second["us"]["tinygemm"] == "no time"
    assert second["us"]["int4"] == 4.0


def test_a_peer_that_nobody_wants_is_not_even_made(run, entries):
    entries["tinygemm"] = Entry("int4", lambda weights: pytest.fail("made"))
    run.without = ["tinygemm"]
    assert all("tinygemm" not in row["us"] and row["us"]["int4"] == 4.0 for row in rows_of(run))


def test_each_kind_has_its_own_tokens_and_the_part_of_a_product_is_no_peer(run, entries):
    def built(weights, x):
        assert x.shape[0] in (2, 3)
        return Contender((weights.plain,), lambda x, weight: F.linear(x, weight), lambda x: f"M = {len(x)}")

    entries |= {
        "int8dq": Entry("int8dq", built, ours=True, anew=True),
        "whole": Entry("int8dq", built, anew=True),
        "product": Entry("int8dq", built, anew=True, part=True),
    }
    run.us |= {"int8dq": 4.0, "whole": 5.0, "product": 1.0}
    rows = list(linear.sweep(run, 128, 256, {"int4": (1, 3), "int8dq": (2, 3)}, 64))
    assert [(row["op"], row["M"]) for row in rows] == [("int4", 1), ("int8dq", 2), ("int4", 3), ("int8dq", 3)]
    assert (rows[3]["best peer"], rows[3]["x best peer"], rows[3]["kernel"]) == ("whole", 1.25, "M = 3")
    assert rows[3]["us"]["product"] == 1.0


def test_a_recipe_that_there_is_not_is_an_error_of_its_row(run, entries, monkeypatch, capsys):
    def unknown(weights, x):
        return recipe("int8dp", plain, weights, x)

    entries["int8dq"] = Entry("int8dq", unknown, ours=True, anew=True)
    (row,) = rows_of(run, tokens=(2,), kinds=("int8dq",))
    assert row["us"] == {"bf16": 10.0, "int8dq": "error"}
    assert "unknown scheme 'int8dp'" in capsys.readouterr().err


def test_a_wrong_result_of_ours_fails_the_run(run, entries, monkeypatch, tmp_path, capsys):
    entries["int4"] = Entry("int4", lambda w: Contender(w.int4, lambda x, *_: F.linear(x, w.plain) * 1.1), ours=True)
    monkeypatch.setattr(linear, "Run", lambda *_: run)
    monkeypatch.setattr(linear, "ceilings", lambda device: LIMITS)
    arguments = ["--device", "cpu", "--shapes", "128x256", "--m", "1", "--json", str(tmp_path / "out.json")]
    with pytest.raises(SystemExit, match="int4: the error is over"):
        linear.main(arguments)
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["op"] for row in written["rows"]] == ["int4", "int8"]
    assert "128 × 256" in capsys.readouterr().out
