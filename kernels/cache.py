"""Where what is compiled at run time stays between processes: ``$AOGRAPH_CACHE``, else ``~/.cache/aograph``.

A file is named by all that decides what is in it, so that one folder may serve several machines and versions, and
nothing in it ever needs to be brought up to date.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["entry", "folder", "written_whole"]


def folder() -> Path:
    """The folder; it need not exist yet."""
    return Path(os.environ.get("AOGRAPH_CACHE") or Path.home() / ".cache" / "aograph")


def entry(name: str, *key: object) -> Path:
    """The path in the folder of what `key` decides: "linear.so" becomes "linear-0123456789abcdef.so"."""
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return folder() / f"{Path(name).stem}-{digest}{Path(name).suffix}"


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives an empty file to write, which takes the place of `path` at the end, or goes where the block fails.

    Another process finds at `path` the old file, the new one or none, never half of one.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=path.suffix, dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
