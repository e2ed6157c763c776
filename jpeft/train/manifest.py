"""The page that makes a folder of arrays a checkpoint: written last, it says what must be there, bit by bit."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import files
from jpeft.core.paths import flatten
from jpeft.core.sharding import mesh_of
from jpeft.errors import CheckpointMismatchError, DamagedCheckpointsError, TrainConfigError

NAME = "jpeft.json"
FORMAT = "jpeft-training-checkpoint"
VERSION = 1
Stored = np.ndarray | jax.Array


class Spec(NamedTuple):
    """One leaf of the state: `path`, `shape`, and `dtype`, for a PRNG key that of the key (`key<fry>`)."""

    path: str
    shape: tuple[int, ...]
    dtype: str


def unpack(state: Any) -> tuple[list[Spec], list[Stored]]:
    """Return what a state consists of and its arrays, keys as their `key_data`; on the host, unless a mesh has them."""
    _, leaves, _ = flatten(state)
    stored = (jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in leaves)
    return specs(state), [np.asarray(x) if mesh_of(x) is None else x for x in stored]


def specs(state: Any) -> list[Spec]:
    """Return what a state consists of."""
    paths, leaves, _ = flatten(state)
    return [Spec(path, tuple(leaf.shape), str(leaf.dtype)) for path, leaf in zip(paths, leaves, strict=True)]


def pack(like: Any, arrays: Sequence[Stored]) -> Any:
    """Return the state of the type of `like` with these arrays, in buffers of its own, each where that of `like` is."""
    _, leaves, treedef = flatten(like)
    made = []
    for leaf, array in zip(leaves, arrays, strict=True):
        if mesh_of(leaf) is not None:
            key = jax.random.key_impl(leaf) if _is_key(leaf) else None
            made.append(jax.jit(functools.partial(_own, key=key), out_shardings=leaf.sharding)(array))
            continue
        value = jnp.array(array)
        if _is_key(leaf):
            value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
        made.append(jax.device_put(value, leaf.sharding) if getattr(leaf, "committed", False) else value)
    return treedef.unflatten(made)


def stored_struct(like: Any) -> list[jax.ShapeDtypeStruct]:
    """Return shape and dtype of what is stored for each leaf, and where it goes if that is a mesh."""
    _, leaves, _ = flatten(like)
    stored = (jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf for leaf in leaves)
    return [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=None if mesh_of(leaf) is None else leaf.sharding)
            for x, leaf in zip(stored, leaves, strict=True)]


def _own(data: jax.Array, key: Any) -> jax.Array:
    return jnp.copy(data) if key is None else jax.random.wrap_key_data(data, impl=key)


def digest(found: Sequence[Spec], arrays: Iterable[np.ndarray]) -> str:
    """Return the sha256 of all leaves: for each, JSON of its spec, a newline, and its bytes in C order.

    Arrays that come one by one need not be on the host all at once.
    """
    total = hashlib.sha256()
    for spec, array in zip(found, arrays, strict=True):
        total.update(json.dumps(spec).encode() + b"\n")
        total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def hashes(folder: Path, *, sync: bool = False) -> dict[str, str]:
    """Return the sha256 of every file of a folder but the manifest; with `sync`, see that they are on the disk."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != NAME:
            with open(path, "rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
                if sync and os.name == "posix":
                    os.fsync(file.fileno())
    return found


def normal(data: Any, what: str) -> Any:
    """Return `data` as JSON gives it back.

    Raises:
        TrainConfigError: it is no JSON.
    """
    try:
        return json.loads(json.dumps(data))
    except (TypeError, ValueError) as error:
        raise TrainConfigError(f"{what} is not JSON ({error}); use dicts, lists, strings and numbers") from error


def write(folder: Path, record: dict[str, Any]) -> None:
    """Put the manifest into a folder; from then on it is a checkpoint."""
    body = {"format": FORMAT, "version": VERSION, **record}
    files.write(folder / NAME, json.dumps({**body, "checksum": _checksum(body)}).encode())


def read(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Raises:
        DamagedCheckpointsError: it is not what was written.
        CheckpointMismatchError: another version of jpeft wrote it.
    """
    path = folder / NAME
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpointsError(f"{path} cannot be read ({type(error).__name__})") from error
    if not isinstance(record, dict) or record.pop("checksum", None) != _checksum(record):
        raise DamagedCheckpointsError(f"{path} is not what was written (its checksum differs)")
    if record["format"] != FORMAT or record["version"] != VERSION:
        raise CheckpointMismatchError(
            f"{path} is {record['format']} {record['version']} and this jpeft reads {FORMAT} {VERSION}; use the jpeft "
            "that wrote it")
    return record


def verify(folder: Path, record: dict[str, Any]) -> None:
    """Compare the files of a checkpoint with its manifest.

    Raises:
        DamagedCheckpointsError: a file is missing or not what was written.
    """
    try:
        have = hashes(folder)
    except OSError as error:
        raise DamagedCheckpointsError(f"{folder} cannot be read ({error.strerror})") from error
    for name, sha in record["files"].items():
        if have.get(name) != sha:
            fault = "differs from what was written" if name in have else "is missing"
            raise DamagedCheckpointsError(f"{folder / name} {fault}")


def compare(where: Path, stored: Sequence[Spec], wanted: Sequence[Spec]) -> None:
    """Check that a state of these specs can be restored.

    Raises:
        CheckpointMismatchError: it cannot.
    """
    have, want = {s.path: s for s in stored}, {s.path: s for s in wanted}
    for path in [*want, *have]:
        pair = have.get(path), want.get(path)
        if pair[0] != pair[1]:
            held, asked = ("missing" if s is None else f"{s.dtype}{list(s.shape)}" for s in pair)
            raise CheckpointMismatchError(
                f"{path} is {held} in the checkpoint {where} and {asked} in this run; resume with the rules and the "
                "optimizer that the run began with, or begin a new run")


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", np.dtype(float)), jax.dtypes.prng_key)


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
