"""Between stored tensors and a tree of params, by a name table: read into stacked leaves, write back out of them.

A family is three tables (`Family`): which key of `config.json` says what, which stored name is which leaf, and what may
be in the file without being read. The code here serves every family and every file format.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.paths import flatten
from jpeft.errors import CheckpointError, nearest
from jpeft.interop.assemble import Box, assemble, box, parts
from jpeft.interop.tensors import Info, Tensors, listing


class Row(NamedTuple):
    """One line of a name table.

    Attributes:
        leaf: path in params.
        stored: name in the file; each `{}` is an index into a leading, stacked axis of the leaf.
        layout: how one slice of the leaf is stored: "same"; "flat", as a vector; "in", the transposed matrix of a
            kernel whose first dim is the input; "out", that of a kernel whose last dim is the output; "rows" and
            "columns", these two matrices as they are.
    """

    leaf: str
    stored: str
    layout: str = "same"

    @property
    def stacked(self) -> int:
        """Number of leading axes that the stored tensors are stacked on."""
        return self.stored.count("{}")

    def names(self, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], str]]:
        """Yield the index of every slice of the leaf and its stored name."""
        for index in itertools.product(*(range(n) for n in shape[: self.stacked])):
            yield index, self.stored.format(*index)

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of one stored tensor of a leaf of this shape."""
        rest = tuple(shape[self.stacked:])
        if self.layout == "flat":
            return (math.prod(rest),)
        if self.layout == "in":
            return (math.prod(rest[1:]), rest[0])
        if self.layout == "out":
            return (rest[-1], math.prod(rest[:-1]))
        if self.layout == "rows":
            return (rest[0], math.prod(rest[1:]))
        return (math.prod(rest[:-1]), rest[-1]) if self.layout == "columns" else rest

    def to_leaf(self, tensor: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Arrange a stored tensor as one slice of a leaf of this shape."""
        return (tensor.T if self.layout in ("in", "out") else tensor).reshape(tuple(shape[self.stacked:]))

    def over(self, shape: Sequence[int]) -> tuple[int, int] | None:
        """Return the dim of a slice that stored rows run over, and the number of rows of each of its entries.

        None: rows are not of one dim.
        """
        rest = tuple(shape[self.stacked:])
        if not rest or (len(rest) == 1 and self.layout not in ("same", "flat")):
            return None
        if self.layout == "in":
            return 1, math.prod(rest[2:])
        if self.layout == "out":
            return len(rest) - 1, 1
        return 0, {"flat": math.prod(rest[1:]), "columns": math.prod(rest[1:-1])}.get(self.layout, 1)

    def to_stored(self, part: np.ndarray) -> np.ndarray:
        """Arrange one slice of a leaf as it is stored."""
        if self.layout in ("in", "rows"):
            part = part.reshape(part.shape[0], -1)
        elif self.layout in ("out", "columns"):
            part = part.reshape(-1, part.shape[-1])
        elif self.layout == "flat":
            part = part.reshape(-1)
        return part.T if self.layout in ("in", "out") else part


@dataclasses.dataclass(frozen=True)
class Names:
    """What a checkpoint of one family and task holds.

    Attributes:
        rows: the name table.
        prefixes: what may come before every name that has no `!` in front; the first is written.
        renamed: `(pattern, replacement)` for old spellings, tried on stored names.
        unread: patterns of stored names that are no parameters (buffers), passed over.
        heads: patterns of stored names of heads for other tasks, passed over with a note.
    """

    rows: tuple[Row, ...]
    prefixes: tuple[str, ...] = ("",)
    renamed: tuple[tuple[str, str], ...] = ()
    unread: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    def resolved(self, prefix: str) -> dict[str, Row]:
        """Return the rows by leaf, stored names in full."""
        full = (r._replace(stored=r.stored[1:] if r.stored.startswith("!") else prefix + r.stored) for r in self.rows)
        return {row.leaf: row for row in full}


class Match(NamedTuple):
    """A checkpoint and a model brought together: which stored tensors make up each leaf."""

    rows: dict[str, Row]
    files: dict[str, str]
    missing: frozenset[str]
    notes: tuple[str, ...]


def match(tensors: Tensors, names: Names, shapes: Any, optional: Sequence[str] = (),
          fresh: Sequence[str] = ()) -> Match:
    """Compare a checkpoint's names and shapes with a model's, and report every difference at once.

    Args:
        tensors: the checkpoint.
        names: the name table.
        shapes: the model's params, as `jax.ShapeDtypeStruct`.
        optional: top-level names of params that the checkpoint may lack altogether (new heads).
        fresh: those that are not to be read even if they are there.

    Returns:
        What `load` needs. `missing` are the optional leaves that are not there.

    Raises:
        CheckpointError: names are missing or unexpected, or shapes are wrong; all of them in one message.
    """
    renamed = {_rename(name, names.renamed): name for name in tensors.infos}
    prefix = max(names.prefixes, key=lambda p: sum(
        r.stored.format(*[0] * r.stacked) in renamed for r in names.resolved(p).values()))
    rows, (paths, leaves, _) = names.resolved(prefix), flatten(shapes)
    lines, used, missing, absent = [], set(), set(), []
    unmapped = sorted(set(paths) - set(rows))
    if unmapped:
        lines.append(f"no row of the name table for {listing(unmapped)}")
    for path, leaf in ((p, x) for p, x in zip(paths, leaves, strict=True) if p in rows):
        stored, top = [name for _, name in rows[path].names(leaf.shape)], path.split("/")[0]
        gone = [name for name in stored if name not in renamed]
        whole = [p for p in paths if p.split("/")[0] == top and p in rows]
        if top in fresh or (top in optional and not any(n in renamed for p in whole for _, n in rows[p].names(
                leaves[paths.index(p)].shape))):
            missing.add(path)
            continue
        absent += gone
        used |= set(stored) - set(gone)
        want = rows[path].stored_shape(leaf.shape)
        lines += [f"{name} has shape {tensors.infos[renamed[name]].shape}, must be {want}" for name in stored
                  if name not in gone and tensors.infos[renamed[name]].shape != want]
    rest = sorted(n for n in renamed if n not in used and not _any(names.unread, n))
    heads = [n for n in rest if _any(names.heads, n)]
    strange = [n for n in rest if n not in heads]
    lines += [f"missing: {listing(absent)}"] if absent else []
    lines += [f"unexpected: {listing(strange)}"] if strange else []
    if absent and strange:
        lines.append(nearest(absent[0], strange, 1))
    if lines:
        raise CheckpointError(f"the tensors in {tensors.where} are not those of this model: {'; '.join(lines)}; is the "
                              "config.json beside them that of another model?")
    notes = (f"not read, heads of other tasks: {listing(heads)}",) if heads else ()
    return Match({p: rows[p] for p in paths}, renamed, frozenset(missing), notes)


def _rename(name: str, renamed: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in renamed:
        name = re.sub(pattern, replacement, name)
    return name


def _any(patterns: Iterable[str], name: str) -> bool:
    return any(re.fullmatch(p, name) for p in patterns)


def load(tensors: Tensors, matched: Match, shapes: Any, new: Callable[[str, tuple[int, ...]], Any], dtype: Any = None,
         put: Callable[[str, np.ndarray], jax.Array] | None = None,
         shardings: Mapping[str, jax.sharding.Sharding] | None = None) -> Any:
    """Read a checkpoint leaf by leaf: some megabytes and at most one leaf exist beside what is already in place.

    Args:
        tensors: the checkpoint.
        matched: from `match`.
        shapes: the model's params, as `jax.ShapeDtypeStruct`.
        new: makes a leaf that the checkpoint lacks, from its path and shape.
        dtype: dtype of all floating leaves; None: as stored.
        put: moves a leaf from the host to where it lives; called once for each, in order.
        shardings: where each leaf lives, by path, instead of `put`: each device gets its own part, and of a leaf only
            the parts of this process' devices are read.

    Returns:
        Params.
    """
    paths, leaves, treedef = flatten(shapes)

    def placed(path: str, shape: tuple[int, ...], target: Any,
               make: Callable[[Sequence[Box]], list[np.ndarray]]) -> jax.Array:
        if shardings is None:
            whole = make([tuple((0, n) for n in shape)])[0]
            return jax.block_until_ready(put(path, whole) if put else jax.device_put(whole))
        wanted = {box(index, shape) for index in shardings[path].addressable_devices_indices_map(shape).values()}
        boxes = sorted(wanted)
        each = dict(zip(boxes, make(boxes), strict=True))
        return jax.block_until_ready(jax.make_array_from_callback(
            shape, shardings[path], lambda index: each[box(index, shape)], dtype=target))

    done: list[Any] = []
    dtypes = []
    for path, leaf in zip(paths, leaves, strict=True):
        if path in matched.missing:
            done.append(None)
            continue
        row, shape = matched.rows[path], tuple(leaf.shape)
        target = _target({tensors.infos[matched.files[name]].dtype for _, name in row.names(shape)}, dtype)
        dtypes.append(target)
        done.append(placed(path, shape, target, functools.partial(
            assemble, tensors, row, matched.files, shape, target)))
    common = jnp.result_type(*dtypes) if dtypes else jnp.float32
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if done[i] is None:
            made = np.asarray(new(path, leaf.shape)).astype(dtype or common)
            done[i] = placed(path, tuple(leaf.shape), made.dtype, functools.partial(parts, made))
    return jax.tree_util.tree_unflatten(treedef, done)


def _target(stored: Iterable[np.dtype], dtype: Any) -> np.dtype:
    common = jnp.result_type(*stored)
    wanted = dtype if dtype is not None and jnp.issubdtype(common, jnp.floating) else common
    return np.dtype(jax.dtypes.canonicalize_dtype(wanted))


def unload(params: Any, names: Names, shapes: Any) -> tuple[dict[str, Info], Callable[[str], np.ndarray]]:
    """Prepare params to be written: the stored tensors' dtypes and shapes, and a function that makes one of them.

    Raises:
        CheckpointError: the params are not those of the model; every difference in one message.
    """
    paths, leaves, _ = flatten(params)
    want = dict(zip(*flatten(shapes)[:2], strict=True))
    lines = [f"missing: {listing(sorted(set(want) - set(paths)))}"] if set(want) - set(paths) else []
    lines += [f"unexpected: {listing(sorted(set(paths) - set(want)))}"] if set(paths) - set(want) else []
    lines += [f"{path} has shape {tuple(leaf.shape)}, must be {tuple(want[path].shape)}"
              for path, leaf in zip(paths, leaves, strict=True)
              if path in want and tuple(leaf.shape) != tuple(want[path].shape)]
    if lines:
        raise CheckpointError(f"these params are not those of the model: {'; '.join(lines)}; merge adapters first")
    rows = names.resolved(names.prefixes[0])
    origin: dict[str, tuple[Row, Any, tuple[int, ...]]] = {}
    infos: dict[str, Info] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        for index, name in rows[path].names(leaf.shape):
            infos[name] = Info(np.dtype(leaf.dtype), rows[path].stored_shape(leaf.shape))
            origin[name] = (rows[path], leaf, index)

    def make(name: str) -> np.ndarray:
        row, leaf, index = origin[name]
        return np.ascontiguousarray(row.to_stored(np.asarray(leaf[index] if index else leaf)))

    return infos, make
