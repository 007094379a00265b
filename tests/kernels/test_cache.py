"""Where builds are kept, what they are called, and that a reader never finds half of one."""

from pathlib import Path

import pytest
from aograph.kernels import cache


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("AOGRAPH_CACHE", str(tmp_path))
    assert cache.folder() == tmp_path
    monkeypatch.setenv("AOGRAPH_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "aograph"


def test_an_entry_is_named_by_its_whole_key(monkeypatch, tmp_path):
    monkeypatch.setenv("AOGRAPH_CACHE", str(tmp_path))
    path = cache.entry("linear.so", "source", ["-O3"], (13, 0))
    assert path == cache.entry("linear.so", "source", ["-O3"], (13, 0))
    assert path.parent == tmp_path and path.stem.startswith("linear-") and path.suffix == ".so"
    others = [("", ["-O3"], (13, 0)), ("source", ["-O2"], (13, 0)), ("source", ["-O3"], (13, 1)), ("source-O3",)]
    assert len({path, *(cache.entry("linear.so", *key) for key in others)}) == 5


def test_what_is_written_appears_at_the_end(tmp_path):
    path = tmp_path / "new" / "a.so"
    with cache.written_whole(path) as partial:
        partial.write_text("first")
        assert not path.exists() and partial.suffix == ".so"
    with cache.written_whole(path) as partial:
        partial.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path):
    path: Path = tmp_path / "a.so"
    path.write_text("first")
    with pytest.raises(ZeroDivisionError), cache.written_whole(path) as partial:
        partial.write_text("half of the sec")
        raise ZeroDivisionError
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
