import json
from dataclasses import dataclass

import pytest
from aograph.kernels import plans


@dataclass(frozen=True)
class Size:
    size: int


@pytest.fixture
def files(monkeypatch, tmp_path):
    """Where plans are looked for: a file as if shipped, and one as if measured here."""
    shipped, tuned = tmp_path / "shipped.json", tmp_path / "tuned.json"
    monkeypatch.setattr(plans, "shipped", lambda: shipped)
    monkeypatch.setattr(plans, "tuned", lambda: tuned)
    plans.table.cache_clear()
    yield shipped, tuned
    plans.table.cache_clear()


def test_what_is_added_is_read_and_says_where_it_is_from(tmp_path):
    path = tmp_path / "folder" / "x.json"
    plans.add(path, "a", (64, 128), [Size(1), None], {"gpu": "one"})
    plans.add(path, "b", (8, 8), [Size(2)], {"gpu": "two"})
    plans.add(path, "a", (8, 8), [Size(3)], {"gpu": "three"})
    plans.add(path, "a", (64, 128), [None, Size(4)], {"gpu": "four"})
    assert plans.read(path, "a", Size) == {(64, 128): [None, Size(4)], (8, 8): [Size(3)]}
    assert plans.read(path, "b", Size) == {(8, 8): [Size(2)]} and plans.read(path, "c", Size) == {}
    measured = json.loads(path.read_text())["measured"]
    assert {kind: {shape: each["gpu"] for shape, each in shapes.items()} for kind, shapes in measured.items()} == {
        "a": {"64x128": "four", "8x8": "three"}, "b": {"8x8": "two"}
    }  # fmt: skip


def test_what_was_measured_here_comes_ahead(files):
    shipped, tuned = files
    assert plans.table("a", Size) == {}
    plans.table.cache_clear()
    plans.add(shipped, "a", (1, 1), [Size(1)], {})
    plans.add(shipped, "a", (2, 2), [Size(2)], {})
    plans.add(tuned, "a", (2, 2), [Size(3)], {})
    assert plans.table("a", Size) == {(1, 1): [Size(1)], (2, 2): [Size(3)]}


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"plans": {}}', '{"measured": {"a": {"1x1": {"plans": [{"weight": 1}]}}}}',
     '{"measured": {"a": {"x": {"plans": []}}}}'],
)  # fmt: skip
def test_what_is_no_file_of_plans_is_ignored_with_a_warning(text, files):
    shipped, tuned = files
    plans.add(shipped, "a", (1, 1), [Size(1)], {})
    tuned.write_text(text)
    with pytest.warns(UserWarning, match=r"tuned\.json is no file of plans and is ignored: .*; delete it"):
        assert plans.table("a", Size) == {(1, 1): [Size(1)]}


def test_the_nearest_that_fits():
    measured = {(1024, 1024): [Size(1)], (4096, 4096): [Size(2)], (8192, 8192): [None]}
    for shape, expected in {(1000, 1000): [Size(1)], (4096, 2048): [Size(2)], (9000, 9000): [None]}.items():
        assert plans.nearest(measured, 0, *shape, lambda plan: True) == expected
    assert plans.nearest(measured, 0, 1000, 1000, lambda plan: plan.size > 1) == [Size(2)]
    assert plans.nearest({(1, 1): [Size(1)]}, 0, 1, 1, lambda plan: False) == []


def test_plans_that_were_measured_for_fewer_numbers_of_tokens():
    measured = {(1024, 1024): [Size(1), Size(2)], (4096, 4096): []}
    assert plans.nearest(measured, 5, 4096, 4096, lambda plan: True) == [Size(2)]
