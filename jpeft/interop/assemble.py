"""A leaf out of stored tensors: those parts of it that are wanted here, each in an array of its own.

Every stored tensor is read once, some megabytes of rows at a time, and what is read goes where it belongs in all parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jpeft.interop.tensors import Tensors, empty

if TYPE_CHECKING:
    from jpeft.interop.checkpoint import Row

Box = tuple[tuple[int, int], ...]
"""A part of an array: where it starts and stops in each dim."""


def box(index: Sequence[slice] | None, shape: Sequence[int]) -> Box:
    """Turn the slices of an array into a box; None: all of it.

    Example:
        >>> box((slice(None), slice(2, 4)), (3, 8))
        ((0, 3), (2, 4))
    """
    slices = [slice(None)] * len(shape) if index is None else index
    return tuple(s.indices(n)[:2] for s, n in zip(slices, shape, strict=True))


def parts(array: np.ndarray, boxes: Sequence[Box]) -> list[np.ndarray]:
    """Return parts of an array as arrays of their own.

    Example:
        >>> parts(np.arange(6).reshape(2, 3), [((0, 2), (1, 2))])[0].tolist()
        [[1], [4]]
    """
    return [np.ascontiguousarray(array[tuple(slice(*ends) for ends in one)]) for one in boxes]


def assemble(tensors: Tensors, row: Row, files: Mapping[str, str], shape: Sequence[int], dtype: np.dtype,
             boxes: Sequence[Box]) -> list[np.ndarray]:
    """Read the parts of one leaf.

    Args:
        tensors: the checkpoint.
        row: how the leaf is stored.
        files: the name in `tensors` of each name that `row` makes.
        shape: of the leaf.
        dtype: of the parts.
        boxes: the parts.

    Raises:
        CheckpointError: a file has become shorter.
    """
    found = [empty(tuple(stop - start for start, stop in one), dtype) for one in boxes]
    for index, name in row.names(shape):
        views = []
        for one, array in zip(boxes, found, strict=True):
            at = tuple(i - start for i, (start, _) in zip(index, one, strict=False))
            if all(0 <= i < n for i, n in zip(at, array.shape, strict=False)):
                slot: Any = (*at, ...)
                views.append((one[len(index):], array[slot]))
        if views:
            _fill(tensors, row, files[name], tuple(shape), views)
    return found


def _fill(tensors: Tensors, row: Row, name: str, shape: tuple[int, ...],
          views: Sequence[tuple[Box, np.ndarray]]) -> None:
    """Read one stored tensor into what is wanted of its slice of the leaf: boxes in that slice, and where they go."""
    lead, rest = shape[:row.stacked], shape[row.stacked:]
    over = row.over(shape)
    if over is None:
        whole = row.to_leaf(tensors.read(name), shape)
        for one, view in views:
            view[...] = whole[tuple(slice(*ends) for ends in one)]
        return
    dim, step = over
    start, stop = min(one[dim][0] for one, _ in views), max(one[dim][1] for one, _ in views)
    for first, block in tensors.blocks(name, start * step, stop * step, step):
        low, high = first // step, first // step + len(block) // step
        some = row.to_leaf(block, (*lead, *rest[:dim], high - low, *rest[dim + 1:]))
        for one, view in views:
            a, b = max(low, one[dim][0]), min(high, one[dim][1])
            if a < b:
                source = [slice(*ends) for ends in one]
                target = [slice(None)] * len(one)
                source[dim], target[dim] = slice(a - low, b - low), slice(a - one[dim][0], b - one[dim][0])
                view[tuple(target)] = some[tuple(source)]
