"""Who is at work on which entry: sessions of one board on one machine keep out of each other's way."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jpeft.cli.board.config import Run
from jpeft.errors import ReportError


@contextlib.contextmanager
def claim(results: Path, run: Run) -> Iterator[bool]:
    """Keep other sessions from the entry of a run, whose seeds share a program; False: one of them is at work on it.

    A claim ends with its process, however that ends.

    Args:
        results: the board's file of results, by which sessions know that they have the same board.
        run: which run is about to begin.

    Raises:
        ReportError: the folder for temporary files cannot be written.
    """
    board = hashlib.sha256(str(results.resolve()).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"jpeft-{os.getuid()}-{board}"
    name = hashlib.sha256(f"{run.task}/{run.entry}".encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ReportError(f"{folder / name} cannot be opened ({error.strerror}); it says that this session is at work "
                          "on an entry: fix the folder, or set TMPDIR") from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(file)
