"""Resident memory of this process, as both sides of the yardstick measure it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


class Memory:
    """Measures from when it is made, which is before the first step, until `stop`.

    Attributes:
        peak: largest resident set since the process began, in bytes.
        growth: largest resident set since this object was made, minus what there was then; None where the system does
            not let a process forget its high-water mark.
        last: largest resident set since the last `mark`, as far as the mark can be forgotten.
    """

    def __init__(self) -> None:
        self._before, self._top = _high(), 0
        self._start = _status("VmRSS") if _forget() else None
        self.peak, self.last = self._before, self._before
        self.growth = None if self._start is None else 0

    def mark(self) -> None:
        """Begin a new phase."""
        self.stop()
        _forget()

    def stop(self) -> None:
        """Read the high-water mark."""
        self.last = _high()
        self._top = max(self._top, self.last)
        self.peak = max(self._before, self._top)
        self.growth = None if self._start is None else self._top - self._start


def _high() -> int:
    """Return the high-water mark. `ru_maxrss` survives exec, so it may be that of the parent: the second choice."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def _forget() -> bool:
    """Set the high-water mark to what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return _status("VmHWM") is not None
