import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aograph import ArtifactError, InputError, archive
from aograph.archive import ABOUT, INDEX, Archive, Stored

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.arange(5, dtype=torch.int8),
    "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
    "transposed": torch.arange(6).view(2, 3).T,
}


def write(path, weights=None):
    lines, records = archive.index(weights or {"forward": TENSORS})
    text = "".join(f"{line.line()}\n" for line in lines)
    archive.write(path, {ABOUT: b"{}", INDEX: text.encode(), "data/code": b"0123456789"}, records)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("archive") / "whole.pt2")


def test_what_is_written_is_read(whole):
    contents = Archive(whole)
    contents.check(contents.records)
    for entry in contents.index:
        found, expected = contents.tensor(entry), TENSORS[entry.name]
        assert found.dtype == expected.dtype and torch.equal(found, expected), entry.name
        assert contents.records[entry.record][0] % 64 == 0
    assert contents.read("data/code") == b"0123456789"


def test_others_read_it_too(whole):
    with zipfile.ZipFile(whole) as zip:
        assert zip.testzip() is None
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in zip.infolist())


def test_a_tensor_of_several_graphs_is_one_record(tmp_path):
    shared, own = torch.randn(100), torch.randn(100)
    contents = Archive(write(tmp_path / "a.pt2", {"one": {"x": shared}, "two": {"y": shared, "z": own}}))
    records = {(entry.graph, entry.name): entry.record for entry in contents.index}
    assert records["one", "x"] == records["two", "y"] != records["two", "z"]


def test_equal_addresses_are_not_equal_tensors(tmp_path):
    base = torch.arange(6)
    weights = {"g": {"base": base, "view": base.view(2, 3), "part": base[:3], "bytes": base.view(torch.uint8)}}
    contents = Archive(write(tmp_path / "a.pt2", weights))
    for entry in contents.index:
        assert torch.equal(contents.tensor(entry), weights["g"][entry.name])


def test_an_existing_file_stays_when_writing_fails(tmp_path):
    path = write(tmp_path / "a.pt2")
    before = path.read_bytes()

    class Broken(dict):
        def items(self):
            yield "weights/0", torch.ones(3)
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        archive.write(path, {}, Broken())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_line_of_the_index():
    entry = Stored("decode", "model.norm.weight", "weights/3", "bfloat16", (7, 5))
    assert Stored.parse(entry.line()) == entry and entry.nbytes == 70
    assert Stored.parse(Stored("g", "s", "weights/0", "int64", ()).line()).sizes == ()


@pytest.mark.parametrize("keep", [0, 1, 60, 0.2, 0.5, 0.9, 0.99, -1])
def test_truncated(whole, tmp_path, keep):
    content = whole.read_bytes()
    end = int(keep * len(content)) if isinstance(keep, float) else keep
    (tmp_path / "a.pt2").write_bytes(content[:end])
    with pytest.raises(ArtifactError):
        Archive(tmp_path / "a.pt2")


@given(st.data())
def test_one_byte_changed(whole, tmp_path_factory, data):
    """An error, or no difference in what is read: bytes that nobody reads are there, such as padding."""
    content = bytearray(whole.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    content[where] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("broken") / "a.pt2"
    path.write_bytes(content)
    try:
        contents = Archive(path)
        contents.check(contents.records)
    except ArtifactError:
        return
    assert {entry.name for entry in contents.index} == TENSORS.keys()
    assert all(torch.equal(contents.tensor(entry), TENSORS[entry.name]) for entry in contents.index)


def foreign_zip(path):
    with zipfile.ZipFile(path, "w") as zip:
        zip.writestr("archive/data.pkl", b"\x80\x02.")


def compressed(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zip:
        for name in (ABOUT, INDEX):
            zip.writestr(f"archive/{name}", b"{}" * 100)


def escaping(path):
    with zipfile.ZipFile(path, "w") as zip:
        zip.writestr("archive/data/aotinductor/forward/../../../evil.so", b"1")


def twice(path):
    with pytest.warns(UserWarning), zipfile.ZipFile(path, "w") as zip:
        for name in (ABOUT, INDEX, ABOUT):
            zip.writestr(f"archive/{name}", b"")


def index_of(line):
    def make(path):
        with zipfile.ZipFile(path, "w") as zip:
            zip.writestr(f"archive/{ABOUT}", b"{}")
            zip.writestr(f"archive/{INDEX}", line)
            zip.writestr("archive/weights/0", b"1234")

    return make


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"no zip at all" * 99), "no whole zip archive"),
        (lambda path: path.mkdir(), "cannot be read"),
        (lambda path: None, "No such file"),
        (lambda path: torch.save({"a": torch.ones(3)}, path), "no artifact of aograph"),
        (foreign_zip, "no artifact of aograph"),
        (compressed, "compressed"),
        (escaping, "leads out of the archive"),
        (twice, "records of the same name"),
        (index_of("one\ttwo"), "index of weights cannot be read"),
        (index_of("g\tw\tweights/9\tint8\t4"), "index of weights cannot be read"),
        (index_of("g\tw\tweights/0\tint9\t4"), "index of weights cannot be read"),
        (index_of("g\tw\tweights/0\tint8\t-4"), "not of the size of w"),
        (index_of("g\tw\tweights/0\tint32\t4"), "not of the size of w"),
    ],
)
def test_what_is_no_artifact(tmp_path, make, message):
    make(tmp_path / "a.pt2")
    with pytest.raises(ArtifactError, match=message):
        Archive(tmp_path / "a.pt2")
