"""An adapter on disk: `adapter.safetensors` and `plan.json`, written atomically and read strictly."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import files, hosts, sharding
from jpeft.core.frozen import Frozen
from jpeft.core.identity import fingerprint
from jpeft.core.paths import flatten
from jpeft.core.plan import Plan
from jpeft.errors import (
    CorruptFileError,
    ExtraKeyError,
    JpeftError,
    MissingKeyError,
    StoreError,
    WrongBaseError,
    WrongDtypeError,
    WrongShapeError,
)

FORMAT, VERSION = "jpeft-adapter", 1
TENSORS, PLAN = "adapter.safetensors", "plan.json"

_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip

Theta = dict[str, dict[str, Any]]


class Slot(NamedTuple):
    """What the plan says of one stored tensor.

    Attributes:
        shape: shape of the theta entry in memory.
        dtype: its dtype, by name.
        live: bool mask `[*shape]` of the entries that are stored, in C order; None if all are, in their own shape.
    """

    shape: tuple[int, ...]
    dtype: str
    live: np.ndarray | None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape if self.live is None else (int(self.live.sum()),)

    def to_json(self) -> dict[str, Any]:
        """Describe the slot; a mask is cut to size 1 on the axes that it does not depend on, and written as digits."""
        if self.live is None:
            return {"shape": list(self.shape), "dtype": self.dtype, "live": None}
        mask = self.live
        for axis in (a for a, n in enumerate(mask.shape) if n):
            first = mask.take([0], axis)
            mask = first if (mask == first).all() else mask
        bits = "".join("1" if bit else "0" for bit in mask.reshape(-1))
        return {"shape": list(self.shape), "dtype": self.dtype, "live": {"shape": list(mask.shape), "bits": bits}}


def save(dir: str | os.PathLike[str], plan: Plan, trainable: Theta, frozen: Frozen) -> None:
    """Write an adapter to a directory: theta and the plan, no base parameter.

    `adapter.safetensors` holds the tensors `trainable/<path>#<letter>` and `frozen/<path>#<letter>`; of an entry of
    which the method says that parts can never matter (`Method.live`), only the live elements, as a vector. `plan.json`
    holds the format, the plan, the base's fingerprint, the tensors' shapes, dtypes and live layout, and the sha256 of
    the tensor file.

    Saving over an old adapter is atomic: whatever moment a crash comes at, `load` finds the old adapter or the new
    one, whole. One process may save to a directory at a time; others may load meanwhile. Where several processes train
    together, each of them must call `save`, as each may hold a part of theta; the first one writes.

    Args:
        dir: the directory; made if it does not exist. Other files in it are left alone.
        plan: the plan.
        trainable: `{path: {letter: array}}`, as `jpeft.init` returned it or training changed it.
        frozen: as `jpeft.init` returned it.

    Raises:
        MissingKeyError, ExtraKeyError, WrongShapeError, WrongDtypeError: theta is not what the plan says.
        WrongBaseError: `frozen.base` is not what the plan was made for.

    Example:
        >>> import jpeft, jax, jax.numpy as jnp, tempfile
        >>> apply, params, x = (lambda p, x: x @ p["w"]), {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
        >>> plan = jpeft.plan(apply, params, (x,), {"w": jpeft.LoRA(rank=2)})
        >>> trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
        >>> where = tempfile.mkdtemp()
        >>> jpeft.save(where, plan, trainable, frozen)
        >>> plan2, trainable2, frozen2 = jpeft.load(where, params)
        >>> plan2 == plan, sorted(trainable2["w"])
        (True, ['a', 'b'])
    """
    import safetensors.numpy

    folder = Path(dir)
    slots = _slots(plan, *plan.theta_shapes())
    given = {**_named("trainable", trainable), **_named("frozen", frozen.theta)}
    where = "the theta passed to save"
    _check_keys(where, given, slots, "pass the trees that jpeft.init(plan, ...) returned, trained or not")
    _check_base(plan, frozen.base)
    arrays = {}
    for key, slot in slots.items():
        array = given[key]
        dtype = str(getattr(array, "dtype", type(array).__name__))
        _check_tensor(where, key, np.shape(array), slot.shape, dtype, slot.dtype)
        if dtype not in _DTYPES.values():
            raise WrongDtypeError(f"{key!r} is {dtype}, which safetensors cannot hold; keep plain numbers in theta")
        array = np.ascontiguousarray(hosts.whole(array)).reshape(slot.shape)
        arrays[key] = array if slot.live is None else array[slot.live]
    blob = safetensors.numpy.save(arrays, metadata={"format": FORMAT})
    sha = hashlib.sha256(blob).hexdigest()
    record = {
        "format": FORMAT,
        "version": VERSION,
        "plan": plan.to_json(),
        "base": fingerprint(frozen.base),
        "sha256": sha,
        "tensors": {key: slot.to_json() for key, slot in sorted(slots.items())},
    }
    record["checksum"] = _checksum(record)
    text = re.sub(r"\[[\s\d,-]+\]", lambda m: " ".join(m[0].split()), json.dumps(record, indent=1)) + "\n"

    if hosts.first():
        folder.mkdir(parents=True, exist_ok=True)
        files.sync(folder.parent)
        files.write(folder / _content_name(sha[:16]), blob)
        files.write(folder / PLAN, text.encode())
        files.rename(folder / _content_name(sha[:16]), folder / TENSORS)
        any_content = _content_name("[0-9a-f]" * 16)
        for pattern in (any_content, f".{any_content}.*.tmp", f".{PLAN}.*.tmp"):
            files.remove(folder, pattern)
    hosts.wait("the adapter is written")


def load(dir: str | os.PathLike[str], params: Any) -> tuple[Plan, Theta, Frozen]:
    """Read an adapter that `save` wrote. Nothing is traced and no code in the files is run.

    Args:
        dir: the directory.
        params: the base parameters that the adapter was trained on.

    Returns:
        `(plan, trainable, frozen)`. The leaves of `frozen.base` are those of `params`; every other array is new, and
        lies where `jpeft.init` puts it: on the mesh of the params, if they lie on one. Elements that can never matter
        (`Method.live`) are zero.

    Raises:
        CorruptFileError: a file is missing, truncated, garbled, of another format, or was changed after it was saved.
        MissingKeyError, ExtraKeyError: a tensor of the plan is not there, or one that is there is not of the plan.
        WrongShapeError, WrongDtypeError: a tensor is not as the plan says, or needs `jax_enable_x64`.
        WrongBaseError: `params` are not the ones that the adapter was trained on.

    Example:
        >>> import jpeft
        >>> jpeft.load("nowhere", {})
        Traceback (most recent call last):
        jpeft.errors.CorruptFileError: nowhere/plan.json is missing; give a directory that jpeft.save has written
    """
    folder = Path(dir)
    record, plan = _read_plan(folder)
    blob, intact = _read_tensors(folder, record["sha256"])
    if not intact:
        record, plan = _read_plan(folder)
        blob, intact = _read_tensors(folder, record["sha256"])
    where = str(folder / TENSORS)
    tensors = _parse(where, blob)
    for key, array in tensors.items():
        _check_width(where, key, array.dtype.name)
    _check_base(plan, params)
    shapes = plan.theta_shapes()
    slots = _slots(plan, *shapes)
    advice = "take the files of one save" if intact else "the file was changed after it was saved: take the original"
    _check_keys(where, tensors, slots, advice)
    for key, slot in slots.items():
        array = tensors[key]
        _check_tensor(where, key, array.shape, slot.stored_shape, array.dtype.name, slot.dtype)
    if not intact:
        raise CorruptFileError(f"{where} is not the file that was saved (its sha256 differs); take the original file")
    if record["tensors"] != {key: slot.to_json() for key, slot in slots.items()}:
        raise CorruptFileError(f"{folder / PLAN} lists other tensors than its plan; load with the jpeft that saved it")
    found = fingerprint(params)
    if found != record["base"]:
        raise WrongBaseError(
            f"{folder} was trained on other base parameters: same shapes, other values (fingerprint "
            f"{record['base'][:12]}, here {found[:12]}); load the checkpoint that it was trained on"
        )
    places = sharding.of_arrays(plan, *flatten(params)[:2])
    over = ({}, {}) if places is None else (places[0], places[1].theta)
    trainable = _tree("trainable", shapes[0], tensors, slots, over[0])
    return plan, trainable, Frozen(params, _tree("frozen", shapes[1], tensors, slots, over[1]))


def _slots(plan: Plan, trainable: Theta, frozen: Theta) -> dict[str, Slot]:
    expected = {**_named("trainable", trainable), **_named("frozen", frozen)}
    live: dict[str, np.ndarray] = {}
    for entry in plan.entries:
        for letter, mask in entry.live().items():
            key = _key("trainable", entry.path, letter)
            live[key] = np.broadcast_to(np.asarray(mask, bool), expected[key].shape)
    return {key: Slot(tuple(s.shape), str(s.dtype), live.get(key)) for key, s in expected.items()}


def _key(group: str, path: str, letter: str) -> str:
    return f"{group}/{path}#{letter}"


def _named(group: str, theta: Theta) -> dict[str, Any]:
    return {_key(group, path, letter): array for path, letters in theta.items() for letter, array in letters.items()}


def _tree(group: str, shapes: Theta, tensors: dict[str, np.ndarray], slots: dict[str, Slot], over: Any) -> Theta:
    def leaf(path: str, letter: str) -> jax.Array:
        slot = slots[key := _key(group, path, letter)]
        full = tensors[key]
        if slot.live is not None:
            full = np.zeros(slot.shape, full.dtype)
            full[slot.live] = tensors[key]
        return sharding.put(full, over[path][letter]) if over else jnp.array(full, copy=True)

    return {path: {letter: leaf(path, letter) for letter in letters} for path, letters in shapes.items()}


def _check_keys(where: str, found: Iterable[str], expected: Iterable[str], remedy: str) -> None:
    found, expected = set(found), set(expected)
    kinds: tuple[tuple[set[str], type[StoreError], str], ...] = (
        (expected - found, MissingKeyError, "lacks"),
        (found - expected, ExtraKeyError, "has, and the plan does not name,"),
    )
    for keys, error, verb in kinds:
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise error(f"{where} {verb} {', '.join(sorted(keys)[:3])}{more}; {remedy}")


def _check_tensor(
    where: str, key: str, shape: tuple[int, ...], want_shape: tuple[int, ...], dtype: str, want_dtype: str
) -> None:
    if tuple(shape) != want_shape:
        raise WrongShapeError(
            f"{key!r} in {where} has the shape {list(shape)} and the plan says {list(want_shape)}; "
            f"use the theta of this plan"
        )
    if dtype != want_dtype:
        raise WrongDtypeError(f"{key!r} in {where} is {dtype} and the plan says {want_dtype}; cast it to {want_dtype}")


def _check_width(where: str, key: str, dtype: str) -> None:
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise WrongDtypeError(
            f"{key!r} in {where} is {dtype} and JAX is limited to 32 bits; "
            f"call jax.config.update('jax_enable_x64', True) first"
        )


def _check_base(plan: Plan, params: Any) -> None:
    """Raise `WrongBaseError` at the first leaf, in the order of paths, that is not as the plan says."""
    paths, leaves, _ = flatten(params)
    types = (f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(np.shape(leaf))}" for leaf in leaves)
    have = dict(zip(paths, types, strict=True))
    want = {site.path: f"{site.dtype}{list(site.shape)}" for site in plan.sites}
    for path in sorted({**want, **have}):
        if have.get(path) != want.get(path):
            raise WrongBaseError(
                f"the leaf {path!r} of the base parameters is {have.get(path, 'missing')} and the plan says "
                f"{want.get(path, 'that there is none')}; pass the parameters that the plan was made for, uncast"
            )


def _content_name(sha: str) -> str:
    """Return the name of a tensor file until its plan is in place."""
    return f"adapter-{sha}.safetensors"


def _checksum(record: dict[str, Any]) -> str:
    """Return the sha256 of the canonical JSON of `record` without its own checksum."""
    body = {key: value for key, value in record.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        reason = "is missing" if isinstance(e, FileNotFoundError) else f"cannot be read ({e.strerror})"
        raise CorruptFileError(f"{path} {reason}; give a directory that jpeft.save has written") from e


def _read_plan(folder: Path) -> tuple[dict[str, Any], Plan]:
    path = folder / PLAN

    def broken(why: str) -> CorruptFileError:
        return CorruptFileError(f"{path} {why}; take the original file")

    text = _read(path)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise broken("is not JSON, so it is truncated or garbled") from e
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise broken(f"is not a {FORMAT} file")
    if record.get("version") != VERSION:
        version = record.get("version")
        raise CorruptFileError(f"{path} has format version {version!r} and this jpeft reads {VERSION}; update jpeft")
    if record.get("checksum") != _checksum(record):
        raise broken("was changed after it was saved (its checksum differs)")
    for field, kind in (("plan", dict), ("base", str), ("sha256", str), ("tensors", dict)):
        if not isinstance(record.get(field), kind):
            raise broken(f"lacks {field!r}")
    try:
        return record, Plan.from_json(record["plan"])
    except JpeftError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise broken(f"holds no plan that this jpeft can read ({type(e).__name__}: {e})") from e


def _read_tensors(folder: Path, sha: str) -> tuple[bytes, bool]:
    """Return the bytes that hash to `sha`, and True; or those of the tensor file as it is, and False.

    Between the last two renames of a `save` the new tensors still have their content name.
    """
    blobs = []
    for name in (TENSORS, _content_name(sha[:16])):
        if (folder / name).is_file():
            blobs.append(_read(folder / name))
            if hashlib.sha256(blobs[-1]).hexdigest() == sha:
                return blobs[-1], True
    return (blobs[0] if blobs else _read(folder / TENSORS)), False


def _parse(where: str, blob: bytes) -> dict[str, np.ndarray]:
    import safetensors

    try:
        raw = safetensors.deserialize(blob)
    except safetensors.SafetensorError as e:
        raise CorruptFileError(f"{where} is truncated or garbled ({e}); take the original file") from e
    tensors = {}
    for key, spec in raw:
        if spec["dtype"] not in _DTYPES:
            raise WrongDtypeError(f"{key!r} in {where} is {spec['dtype']}, which jpeft never writes; take the original")
        tensors[key] = np.frombuffer(spec["data"], jnp.dtype(_DTYPES[spec["dtype"]])).reshape(spec["shape"])
    return tensors
