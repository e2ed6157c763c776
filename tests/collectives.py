"""What a compiled program moves between devices: kind, shapes and bytes, read from its optimised HLO.

The bytes of a move are those of its result on one device; a loop body counts once for each trip.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from jpeft.errors import UncountedError
from jpeft.train import hlo, traffic

KINDS = (*traffic.COLLECTIVES, "ragged-all-to-all", "collective-broadcast")


class Array(NamedTuple):
    """One array of an HLO shape."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return traffic.size(f"{self.dtype}[{','.join(map(str, self.dims))}]")


class Move(NamedTuple):
    """One collective operation.

    Attributes:
        kind: one of `KINDS`.
        arrays: its results on one device.
        times: how often it runs in one call.
        looped: whether it stands in a loop of more than one trip.
    """

    kind: str
    arrays: tuple[Array, ...]
    times: int
    looped: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all its runs."""
        return self.times * sum(array.nbytes for array in self.arrays)


def arrays_of(shape: str) -> tuple[Array, ...]:
    """Return the arrays of an HLO shape, `f32[2,3]{1,0}` or a tuple of such."""
    return tuple(Array(dtype, tuple(int(d) for d in dims.split(",") if d))
                 for dtype, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shape))


def moves(text: str) -> list[Move]:
    """Return every collective operation of a module given as text (`compiled.as_text()`)."""
    found = []
    for one, _, times, trips in hlo.runs(hlo.parse(text)):
        kind = next((kind for kind in KINDS if one.op.startswith(kind)), None)
        if kind is not None and one.op != kind:
            raise UncountedError(f"{one.op} is asynchronous: its shape holds more than its result")
        if kind is not None:
            found.append(Move(kind, arrays_of(one.shape), times, trips > 1))
    return found


def copied(text: str) -> list[tuple[int, ...]]:
    """Return the dims of every array that is copied whole, wherever in the module."""
    return [one.dims for one, *_ in hlo.runs(hlo.parse(text)) if one.op == "copy" and not one.shape.startswith("(")]


def total(text: str, *kinds: str) -> int:
    """Return the bytes that one device receives in one call, of some kinds or of all."""
    return sum(move.nbytes for move in moves(text) if move.kind in (kinds or KINDS))


def summary(compiled: Any) -> dict[str, int]:
    """Return the bytes of each kind that occurs."""
    text = compiled.as_text()
    return {kind: total(text, kind) for kind in KINDS if total(text, kind)}
