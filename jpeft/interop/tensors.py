"""Safetensors files one tensor at a time: no mapped pages, no second copy, every fault of the file named."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from jpeft.core import files
from jpeft.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000
_BLOCK = 8 << 20
_DTYPES: Mapping[str, Any] = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
    "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F32": np.float32, "F64": np.float64, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


class Info(NamedTuple):
    """What a header says of a tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]


class Tensors(Protocol):
    """Stored tensors by name, read one at a time: what `jpeft.interop.checkpoint.load` asks of a file format.

    `blocks` yields the rows `start` to `stop` of the first axis in order, some megabytes at a time: the number of the
    first row, and as many rows as divide by `step` (counted from `start`).
    """

    where: str
    infos: Mapping[str, Info]

    def read(self, name: str) -> np.ndarray: ...

    def blocks(self, name: str, start: int, stop: int, step: int = 1) -> Iterator[tuple[int, np.ndarray]]: ...


class _Place(NamedTuple):
    path: Path
    offset: int
    info: Info


class Safetensors:
    """The tensors of one file, or of all shards of an index.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and its shards.

    Raises:
        CheckpointError: there is no such file, or one is truncated or damaged, or the index and the shards disagree.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write(folder, {"w": Info(np.dtype("float32"), (2,))}, lambda name: np.ones(2, np.float32))
        >>> Safetensors(folder).read("w")
        array([1., 1.], dtype=float32)
    """

    def __init__(self, folder: Path):
        self.where = str(folder)
        self._places: dict[str, _Place] = {}
        index = folder / INDEX
        if (folder / SINGLE).is_file():
            self._places = _header(folder / SINGLE)
        elif index.is_file():
            self._shards(folder, read_json(index))
        else:
            others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".h5", ".msgpack", ".onnx"))
            found = f"found {', '.join(others)}, which jpeft does not read; convert it to safetensors" if others else \
                f"found {', '.join(sorted(p.name for p in folder.glob('*'))[:8]) or 'nothing'}"
            raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}; {found}")
        self.infos: Mapping[str, Info] = {name: place.info for name, place in self._places.items()}

    def _shards(self, folder: Path, index: Any) -> None:
        table = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
            raise CheckpointError(f"{folder / INDEX} has no weight_map from tensor names to files; download it again")
        shards = sorted(set(table.values()))
        faults = [f"{s!r} is no plain file name" for s in shards if Path(s).name != s]
        faults += [f"{s} is missing" for s in shards if not (folder / s).is_file()]
        if faults:
            raise CheckpointError(f"{folder / INDEX}: {'; '.join(faults)}; download the folder again")
        held = {shard: _header(folder / shard) for shard in shards}
        absent = sorted(name for name, shard in table.items() if name not in held[shard])
        if absent:
            raise CheckpointError(f"{folder / INDEX} names tensors that their shards lack: {', '.join(absent)}; "
                                  "download the folder again")
        for shard in shards:
            self._places.update({n: p for n, p in held[shard].items() if table.get(n, shard) == shard})

    def read(self, name: str) -> np.ndarray:
        """Read one tensor into an array of its own.

        Raises:
            CheckpointError: the file has become shorter.
        """
        place = self._places[name]
        array = empty(place.info.shape, place.info.dtype)
        with open(place.path, "rb") as file:
            fill(file, place.offset, array, f"{place.path} ends inside {name!r}")
        return array

    def blocks(self, name: str, start: int, stop: int, step: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """Read rows of one tensor; see `Tensors`.

        Raises:
            CheckpointError: the file has become shorter.
        """
        place = self._places[name]
        dtype, shape = place.info
        width = math.prod(shape[1:]) * dtype.itemsize
        with open(place.path, "rb") as file:
            for first, last in runs(start, stop, step, width):
                rows = np.empty((last - first, *shape[1:]), dtype)
                fill(file, place.offset + first * width, rows, f"{place.path} ends inside {name!r}")
                yield first, rows


def runs(start: int, stop: int, step: int, width: int) -> Iterator[tuple[int, int]]:
    """Divide rows of `width` bytes into runs of a few megabytes, each a multiple of `step` rows.

    Example:
        >>> list(runs(0, 7, 2, 3 << 20))
        [(0, 2), (2, 4), (4, 6), (6, 7)]
    """
    size = max(_BLOCK // max(width * step, 1), 1) * step
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def fill(file: BinaryIO, offset: int, array: np.ndarray, fault: str) -> None:
    """Read the bytes of an array from a place in a file.

    Raises:
        CheckpointError: there are not so many; the message begins with `fault`.
    """
    file.seek(offset)
    got = file.readinto(array.reshape(-1).view(np.uint8).data) if array.nbytes else 0  # type: ignore[attr-defined]
    if got != array.nbytes:
        raise CheckpointError(f"{fault}; download it again")


def same(tensors: Tensors, one: str, other: str) -> bool:
    """Tell whether two stored tensors are equal, without holding them."""
    infos = tensors.infos[one], tensors.infos[other]
    if infos[0].shape != infos[1].shape or not infos[0].shape or infos[0].dtype != infos[1].dtype:
        return np.array_equal(tensors.read(one), tensors.read(other))
    rows = infos[0].shape[0]
    return all(np.array_equal(a, b) for (_, a), (_, b) in zip(
        tensors.blocks(one, 0, rows), tensors.blocks(other, 0, rows), strict=True))


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Make an array at an address that JAX on CPU can take over without a copy (a multiple of 64 bytes)."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start:start + size].view(dtype).reshape(shape)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: it is missing, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; is its folder a Hugging Face checkpoint?") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; download it again") from error


def _header(path: Path) -> dict[str, _Place]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise CheckpointError(f"{path} is truncated or no safetensors file ({size:,} bytes); download it again")
        text = file.read(length)
    start, places, end = 8 + length, {}, 0
    try:
        header = json.loads(text)
        for name, entry in sorted(((n, e) for n, e in header.items() if n != "__metadata__"),
                                  key=lambda item: item[1]["data_offsets"]):
            code, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
            begin, stop = entry["data_offsets"]
            if code not in _DTYPES:
                raise CheckpointError(f"{path}: {name!r} has the dtype {code}, which jpeft does not read")
            info = Info(np.dtype(_DTYPES[code]), shape)
            if min(shape, default=0) < 0 or begin != end or stop - begin != math.prod(shape) * info.dtype.itemsize:
                raise CheckpointError(f"{path}: the header gives {name!r} the bytes {begin} to {stop}, which do not "
                                      f"fit its shape {shape} or the tensor before it; download it again")
            places[name], end = _Place(path, start + begin, info), stop
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} has a damaged header ({error}); download it again") from error
    if size != start + end:
        raise CheckpointError(f"{path} has {size:,} bytes, its header says {start + end:,}: it is truncated or "
                              "damaged; download it again")
    return places


def write(folder: Path, infos: Mapping[str, Info], make: Callable[[str], np.ndarray],
          max_shard_bytes: int = 5_000_000_000) -> None:
    """Write tensors to `model.safetensors`, or to shards and an index where they are larger than one shard.

    Args:
        folder: an existing folder.
        infos: dtype and shape of every tensor; they are stored in this order.
        make: returns a tensor; called once for each, when it is written.
        max_shard_bytes: size at which a new shard begins.

    Raises:
        CheckpointError: safetensors cannot hold a dtype.
    """
    bad = sorted({str(info.dtype) for info in infos.values() if info.dtype not in _CODES})
    if bad:
        raise CheckpointError(f"safetensors cannot hold {', '.join(bad)}; cast the params first")
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, info in infos.items():
        size = _bytes(info)
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    names = [SINGLE] if len(shards) == 1 else \
        [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, members in zip(names, shards, strict=True):
        _write_one(folder / file, members, infos, make)
    if len(shards) > 1:
        table = {member: file for file, members in zip(names, shards, strict=True) for member in members}
        total = sum(map(_bytes, infos.values()))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
        files.write(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def _bytes(info: Info) -> int:
    return math.prod(info.shape) * info.dtype.itemsize


def _write_one(path: Path, names: Sequence[str], infos: Mapping[str, Info], make: Callable[[str], np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + _bytes(infos[name])
        dtype, shape = infos[name]
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = np.ascontiguousarray(make(name))
            if (array.dtype, array.shape) != infos[name]:
                raise CheckpointError(f"{name!r} is {array.dtype} {array.shape}, announced as {infos[name]}")
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def listing(names: Iterable[str], most: int = 12) -> str:
    """Join names for a message, the surplus counted."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
