from dataclasses import dataclass

import pytest
from aograph.kernels import plans


@dataclass(frozen=True)
class Size:
    size: int


def test_what_is_written_is_read(tmp_path):
    found = {"a": {(64, 128): [Size(1), None]}, "b": {(8, 8): [Size(2)]}}
    plans.write(tmp_path / "x.json", found, {"gpu": "none"})
    assert plans.read(tmp_path / "x.json", Size) == found


def test_later_files_come_ahead(tmp_path):
    plans.write(tmp_path / "x.json", {"a": {(1, 1): [Size(1)], (2, 2): [Size(2)]}}, {})
    plans.write(tmp_path / "y.json", {"a": {(2, 2): [Size(3)]}}, {})
    files = [tmp_path / "x.json", tmp_path / "none.json", tmp_path / "y.json"]
    assert plans.known(files, Size) == {"a": {(1, 1): [Size(1)], (2, 2): [Size(3)]}}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"plans": {"a": {"1x1": [{"weight": 1}]}}}', '{"plans": {"a": {"x": []}}}']
)
def test_what_is_no_file_of_plans_is_ignored_with_a_warning(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.warns(UserWarning, match=r"x\.json is no file of plans and is ignored: .*; delete it"):
        assert plans.known([tmp_path / "x.json"], Size) == {}


def test_the_nearest_that_fits():
    measured = {(1024, 1024): [Size(1)], (4096, 4096): [Size(2)], (8192, 8192): [None]}
    for shape, expected in {(1000, 1000): [Size(1)], (4096, 2048): [Size(2)], (9000, 9000): [None]}.items():
        assert plans.nearest(measured, 0, *shape, lambda plan: True) == expected
    assert plans.nearest(measured, 0, 1000, 1000, lambda plan: plan.size > 1) == [Size(2)]
    assert plans.nearest({(1, 1): [Size(1)]}, 0, 1, 1, lambda plan: False) == []
