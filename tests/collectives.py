"""What a compiled program moves between devices: kind, shapes and bytes, read from its optimised HLO.

The bytes of a move are those of its result on one device; a loop body counts once for each trip.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jpeft.errors import UncountedError
from jpeft.train import hlo

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")
BITS = {"pred": 8, "bf16": 16}


class Array(NamedTuple):
    """One array of an HLO shape."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        bits = BITS.get(self.dtype) or int(re.search(r"\d+", self.dtype)[0])  # type: ignore[index]
        return math.prod(self.dims) * bits // 8


class Move(NamedTuple):
    """One collective operation.

    Attributes:
        kind: one of `KINDS`.
        arrays: its results on one device.
        times: how often it runs in one call.
        looped: whether it stands in a loop.
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


def walk(module: hlo.Module, name: str, times: int = 1, looped: bool = False
         ) -> Iterator[tuple[hlo.Instruction, int, bool]]:
    """Yield every instruction that a computation runs, how often, and whether in a loop."""
    computation = module.computations[name]
    for one in computation.values():
        yield one, times, looped
        if one.op == "while":
            found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', one.attributes)
            trips = int(found[1]) if found else hlo.derive_trips(module, computation, one)
            if trips is None:
                raise UncountedError(f"the trips of the loop {one.name!r} depend on data")
            yield from walk(module, one.called("body")[0], times * trips, True)
        elif one.op not in hlo.PER_ELEMENT:
            for inner in one.called():
                yield from walk(module, inner, times, looped)


def moves(text: str) -> list[Move]:
    """Return every collective operation of a module given as text (`compiled.as_text()`)."""
    module, found = hlo.parse(text), []
    for one, times, looped in walk(module, module.entry):
        if one.op.removesuffix("-start") in KINDS:
            if one.op.endswith("-start") and one.op != "all-reduce-start":
                raise UncountedError(f"{one.op} is asynchronous: its shape holds more than its result")
            found.append(Move(one.op.removesuffix("-start"), arrays_of(one.shape), times, looped))
    return found


def copied(text: str) -> list[tuple[int, ...]]:
    """Return the dims of every array that is copied whole, wherever in the module."""
    module = hlo.parse(text)
    return [one.dims for one, _, _ in walk(module, module.entry) if one.op == "copy" and not one.shape.startswith("(")]


def total(text: str, *kinds: str) -> int:
    """Return the bytes that one device receives in one call, of some kinds or of all."""
    return sum(move.nbytes for move in moves(text) if move.kind in (kinds or KINDS))


def summary(compiled: Any) -> dict[str, int]:
    """Return the bytes of each kind that occurs."""
    text = compiled.as_text()
    return {kind: total(text, kind) for kind in KINDS if total(text, kind)}
