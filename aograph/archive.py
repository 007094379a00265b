"""The file of an artifact: a PT2 archive, which is a zip without compression whose records can be mapped.

    archive/data/aotinductor/GRAPH/…    the code of each named graph, as AOTInductor packages it
    archive/extra/aograph.json          all that is said about the artifact (see `artifact.py`)
    archive/extra/weights.tsv           one line for each weight of each graph: graph, name, record, dtype, sizes
    archive/extra/tokenizer/…           files of a tokenizer
    archive/weights/NUMBER              the bytes of one tensor, contiguous, at a multiple of 64 bytes

A tensor that several graphs use, or one graph under several names, is one record. Nothing in here is a pickle.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ArtifactError, InputError

ROOT = "archive"
FORMAT = 2  # raised when what is in the file, or what is said about it, changes
INDEX, ABOUT, TOKENIZER, CODE = "extra/weights.tsv", "extra/aograph.json", "extra/tokenizer/", "data/aotinductor/"
ALIGNMENT = 64  # bytes
MARKS = {"archive_format": b"pt2", "archive_version": b"0", "byteorder": b"little", "version": b"3\n"}
PADDING = struct.Struct("<2sH")  # as torch's own archives mark it; its length
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature; lengths of the name and of the extra field behind it
DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


@dataclass(frozen=True)
class Stored:
    """One weight of one graph: a line of the index. `sizes` is the shape."""

    graph: str
    name: str
    record: str
    dtype: str
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.sizes) * DTYPES[self.dtype].itemsize

    def line(self) -> str:
        return "\t".join([self.graph, self.name, self.record, self.dtype, ",".join(map(str, self.sizes))])

    @classmethod
    def parse(cls, line: str) -> Stored:
        graph, name, record, dtype, sizes = line.split("\t")
        return cls(graph, name, record, dtype, tuple(int(size) for size in sizes.split(",") if size))


# --- writing -----------------------------------------------------------------------------------------------


def index(weights: Mapping[str, Mapping[str, Tensor]]) -> tuple[list[Stored], dict[str, Tensor]]:
    """The index of the weights of each graph by name, and the tensors of the records, each storage once."""
    lines: list[Stored] = []
    records: dict[str, Tensor] = {}
    known: dict[tuple, str] = {}
    for graph, named in weights.items():
        for name, tensor in sorted(named.items()):
            identity = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device
            record = known.setdefault(identity, f"weights/{len(known)}")
            records[record] = tensor
            sizes = tuple(tensor.shape)
            lines.append(Stored(graph, name, record, str(tensor.dtype).removeprefix("torch."), sizes))
    return lines, records


def write(path: Path, files: Mapping[str, bytes], tensors: Mapping[str, Tensor]) -> None:
    """Writes an archive of files and tensors by record name; an existing file is replaced by a whole one or not at all.

    Raises `InputError` where the file cannot be written.
    """
    try:
        with replacing(path) as file, zipfile.ZipFile(file, "w") as zip:
            for name, content in {**MARKS, **files}.items():
                put(zip, name, content)
            for name, tensor in tensors.items():
                here = tensor.detach().cpu().contiguous()
                put(zip, name, (ctypes.c_char * here.nbytes).from_address(here.data_ptr()) if here.nbytes else b"")
    except OSError as error:
        raise InputError(f"the artifact {path} cannot be written: {error.strerror}; give another path") from error


def put(zip: zipfile.ZipFile, name: str, content: Any) -> None:
    """Adds a record at a multiple of `ALIGNMENT`, by a padding in the extra field of its header."""
    entry = zipfile.ZipInfo(f"{ROOT}/{name}")
    size = memoryview(content).nbytes
    large = size * 1.05 > zipfile.ZIP64_LIMIT  # as zipfile asks; the sizes then take 20 bytes more
    assert zip.fp is not None, "open for writing"
    start = zip.fp.tell() + LOCAL_HEADER.size + len(entry.filename.encode()) + PADDING.size + 20 * large
    entry.extra = PADDING.pack(b"FB", -start % ALIGNMENT) + bytes(-start % ALIGNMENT)
    with zip.open(entry, "w", force_zip64=large) as record:
        record.write(content)


@contextmanager
def replacing(path: Path) -> Iterator:
    """A file to write, which takes the place of `path` once it is whole."""
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~umask())
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- reading -----------------------------------------------------------------------------------------------


class Archive:
    """A file of `write`, mapped. Records are read without copying; writes to them stay in this process.

    Raises `ArtifactError` for what is no such file, and from `check` for records that are not as they were written.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError:
            raise ArtifactError(f"{path} is empty: save the artifact again") from None
        try:
            with zipfile.ZipFile(path) as zip:
                entries = zip.infolist()
            self.records = {e.filename.removeprefix(f"{ROOT}/"): self.locate(e) for e in entries}
        except Exception as error:  # zipfile raises many kinds for damaged directories
            raise ArtifactError(
                f"{path} is no whole zip archive ({error or type(error).__name__}): it is damaged or was not "
                "written by aograph; save the artifact again"
            ) from error
        if len(self.records) != len(entries) or ABOUT not in self.records or INDEX not in self.records:
            raise ArtifactError(f"{path} is no artifact of aograph: it has no {ABOUT}, or records of the same name")
        self.check([ABOUT, INDEX])
        try:
            self.index = [Stored.parse(line) for line in self.read(INDEX).decode().splitlines()]
            wrong = [e for e in self.index if self.records[e.record][1] != e.nbytes]
        except (ValueError, KeyError) as error:
            raise ArtifactError(f"{path}: the index of weights cannot be read: {error!r}") from error
        if wrong:
            raise ArtifactError(f"{path}: the record {wrong[0].record} is not of the size of {wrong[0].name}")

    def locate(self, entry: zipfile.ZipInfo) -> tuple[int, int, int]:
        """Offset, size and CRC-32 of a record."""
        header = self.bytes[entry.header_offset : entry.header_offset + LOCAL_HEADER.size]
        signature, name, extra = LOCAL_HEADER.unpack(header)
        start = entry.header_offset + LOCAL_HEADER.size + name
        if entry.compress_type or signature != b"PK\3\4" or entry.flag_bits & 1:
            raise ValueError(f"{entry.filename} is compressed, encrypted or not where it should be")
        if self.bytes[start - name : start] != entry.filename.encode():
            raise ValueError(f"{entry.filename} has another name in its own header")
        if ".." in Path(entry.filename).parts or entry.filename.startswith("/"):
            raise ValueError(f"{entry.filename} leads out of the archive")
        if start + extra + entry.file_size > len(self.bytes):
            raise ValueError(f"{entry.filename} ends behind the end of the file")
        return start + extra, entry.file_size, entry.CRC

    def check(self, names: Iterable[str]) -> None:
        """Raises `ArtifactError` for the first record whose checksum is not that of what was written."""
        for name in names:
            offset, size, crc = self.records[name]
            with memoryview(self.bytes) as whole, whole[offset : offset + size] as part:
                if zlib.crc32(part) != crc:
                    raise ArtifactError(
                        f"{self.path} is damaged: the record {name} has another checksum; copy it again"
                    )

    def read(self, name: str) -> bytes:
        offset, size, _ = self.records[name]
        return self.bytes[offset : offset + size]

    def tensor(self, entry: Stored) -> Tensor:
        """The tensor of a line of the index, on the CPU, in the mapped memory."""
        dtype = DTYPES[entry.dtype]
        if not entry.nbytes:
            return torch.empty(entry.sizes, dtype=dtype)
        offset, size, _ = self.records[entry.record]
        return torch.frombuffer(self.bytes, dtype=dtype, count=size // dtype.itemsize, offset=offset).view(entry.sizes)
