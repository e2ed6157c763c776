"""Files that are either wholly there or not: write beside, flush to disk, rename."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path


def write(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a crash at any moment leaves the old file or the new one.

    The bytes go to a hidden sibling, `.<name>.<random>.tmp`, that a crash may leave behind.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(draft, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        rename(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def rename(old: Path, new: Path) -> None:
    """Give a file another name in its directory, in place of what had it, and flush the directory to disk."""
    os.replace(old, new)
    sync(new.parent)


def sync(directory: Path) -> None:
    """Flush a directory's list of names to disk, where the operating system has such a thing."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove(directory: Path, pattern: str) -> None:
    """Delete the files of a directory whose names match a glob pattern."""
    for path in directory.glob(pattern):
        path.unlink(missing_ok=True)
