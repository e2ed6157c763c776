"""GGUF files: what the header says, and tensors block by block, dequantised by the `gguf` package.

`gguf_models.read_gguf` is the whole way: a configuration as Hugging Face writes it, tensors under their Hugging Face
names, and the tokenizer. `Gguf` is one file as it is, `Split` a model in several files.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jpeft.errors import CheckpointError
from jpeft.interop.tensors import Info, empty, fill, listing, runs

SUFFIX = ".gguf"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_DIRECT: Mapping[str, Any] = {
    "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64,
    "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
}  # fmt: skip


class Stored(NamedTuple):
    """Where a tensor lies in the file, and how it is encoded there."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int


class Gguf:
    """The tensors of one GGUF file under the names that they have there; a `jpeft.interop.tensors.Tensors`.

    Args:
        path: the file.

    Attributes:
        metadata: every key and value of the header. A float32 is the shortest decimal that rounds to it.
        stored: how each tensor is encoded.
        infos: dtype and shape of what `read` returns: float32 for what is quantised.

    Raises:
        CheckpointError: the file is damaged or of another kind, a tensor has an encoding that the `gguf` package cannot
            decode, or the package is missing.

    Example:
        >>> import tempfile, gguf
        >>> path = Path(tempfile.mkdtemp()) / "tiny.gguf"
        >>> writer = gguf.GGUFWriter(path, "llama")
        >>> writer.add_tensor("w", np.ones((2, 3), np.float32))
        >>> for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        ...     step()
        >>> writer.close()
        >>> file = Gguf(path)
        >>> file.metadata["general.architecture"], file.stored["w"].kind, file.read("w").shape
        ('llama', 'F32', (2, 3))
    """

    def __init__(self, path: Path):
        self.where, self.path = str(path), path
        self._package = _package()
        self.metadata: dict[str, Any] = {}
        self.stored: dict[str, Stored] = {}
        try:
            size = path.stat().st_size
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._header(_Cursor(data), size)
        except (ValueError, OSError, struct.error, UnicodeDecodeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is no readable GGUF file ({error}); download it again") from error
        self.infos: Mapping[str, Info] = {
            name: Info(np.dtype(_DIRECT.get(one.kind, np.float32)), one.shape) for name, one in self.stored.items()}

    def _header(self, at: _Cursor, size: int) -> None:
        magic, version = at.take(4), at.number("I")
        if magic != b"GGUF":
            raise ValueError(f"it begins with {magic!r}, not b'GGUF'")
        if version not in (2, 3):
            why = "written on a big-endian machine" if version & 0xFFFF == 0 else f"of version {version}"
            raise CheckpointError(f"{self.path} is {why}; jpeft reads GGUF versions 2 and 3, little-endian")
        tensors, pairs = at.number("Q"), at.number("Q")
        for _ in range(pairs):
            key = at.text()
            if key in self.metadata:
                raise ValueError(f"the key {key!r} is there twice")
            self.metadata[key] = at.value(at.number("I"))
        found = {}
        for _ in range(tensors):
            name = at.text()
            if name in found:
                raise ValueError(f"the tensor {name!r} is there twice")
            shape = at.array("Q", at.number("I"))
            found[name] = (tuple(reversed(shape)), at.number("I"), at.number("Q"))
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1:
            raise ValueError(f"general.alignment is {align!r}")
        start, end = -(-at.position // align) * align, 0
        for name, (dims, kind, offset) in sorted(found.items(), key=lambda item: item[1][2]):
            one = self._place(name, dims, kind, start + offset)
            if offset % align or offset < end:
                raise ValueError(f"the tensor {name!r} begins at byte {offset}, inside another or off {align} bytes")
            end = offset + one.size
            if start + end > size:
                raise CheckpointError(f"{self.path} has {size:,} bytes and ends inside {name!r}, which ends at byte "
                                      f"{start + end:,}: it is truncated; download it again")
            self.stored[name] = one

    def _place(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Stored:
        kinds, quants = self._package.GGMLQuantizationType, self._package.quants
        try:
            known = kinds(kind)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {name!r} has the encoding {kind}, which the installed gguf package "
                                  "does not know; pip install -U gguf") from error
        if known.name not in _DIRECT and known not in quants._type_traits:
            right = ", ".join(sorted({*_DIRECT, *(k.name for k in quants._type_traits)}))
            raise CheckpointError(f"{self.path}: {name!r} is encoded as {known.name}, which the gguf package cannot "
                                  f"decode; get a file with {right}")
        block, width = self._package.GGML_QUANT_SIZES[known]
        if not shape or shape[-1] % block:
            raise ValueError(f"{name!r} has shape {shape}, and {known.name} comes in blocks of {block}")
        return Stored(known.name, shape, offset, math.prod(shape) // block * width)

    def read(self, name: str) -> np.ndarray:
        """Read one tensor into an array of its own, dequantised to float32 where it is quantised.

        Raises:
            CheckpointError: the file has become shorter.
        """
        array = empty(self.infos[name].shape, self.infos[name].dtype)
        if array.size:
            for first, rows in self.blocks(name, 0, len(array)):
                array[first:first + len(rows)] = rows
        return array

    def blocks(self, name: str, start: int, stop: int, step: int = 1, flat: int = 1
               ) -> Iterator[tuple[int, np.ndarray]]:
        """Read rows of one tensor; see `jpeft.interop.tensors.Tensors`. Rows may run over the first `flat` dims.

        Raises:
            CheckpointError: the file has become shorter.
        """
        one, dtype = self.stored[name], self.infos[name].dtype
        shape = (math.prod(one.shape[:flat]), *one.shape[flat:])
        whole = one.kind not in _DIRECT and len(shape) == 1
        width, wide = one.size // shape[0], math.prod(shape[1:]) * dtype.itemsize
        with open(self.path, "rb") as file:
            for first, last in [(0, shape[0])] if whole else runs(start, stop, step, wide):
                raw = np.empty(one.size if whole else (last - first) * width, np.uint8)
                fill(file, one.offset + first * width, raw, f"{self.path} ends inside {name!r}")
                rows = self._decoded(raw, one.kind, (last - first, *shape[1:]))
                yield (start, rows[start:stop]) if whole else (first, rows)

    def _decoded(self, raw: np.ndarray, kind: str, shape: tuple[int, ...]) -> np.ndarray:
        if kind in _DIRECT:
            return raw.view(_DIRECT[kind]).reshape(shape)
        rows = raw.reshape(*shape[:-1], -1)
        encoding = self._package.GGMLQuantizationType[kind]
        return np.asarray(self._package.quants.dequantize(rows, encoding), np.float32).reshape(shape)


class Split:
    """The tensors of a model in several GGUF files, as if they were in one.

    Args:
        path: any of them, `NAME-00001-of-00003.gguf` or the like.

    Attributes:
        metadata: of the first file, which has the keys of the model.
        infos: see `Gguf`.

    Raises:
        CheckpointError: a file is missing, damaged, or not the part that its name says.
    """

    def __init__(self, path: Path):
        paths = siblings(path)
        absent = [p.name for p in paths if not p.is_file()]
        if absent:
            raise CheckpointError(f"{path} is one of {len(paths)} parts; {listing(absent)} missing beside it")
        parts = [Gguf(p) for p in paths]
        self.where, self.metadata = parts[0].where, parts[0].metadata
        self._home: dict[str, Gguf] = {}
        for number, one in enumerate(parts):
            said = tuple(one.metadata.get(f"split.{key}") for key in ("no", "count"))
            if said != (number, len(parts)):
                raise CheckpointError(f"{one.where} says that it is part {said[0]} of {said[1]} (counted from 0), its "
                                      f"name that it is part {number} of {len(parts)}; download it again")
            twice = sorted(set(self._home) & set(one.infos))
            if twice:
                raise CheckpointError(f"{one.where} holds tensors that another part has too: {listing(twice)}")
            self._home.update(dict.fromkeys(one.infos, one))
        total = self.metadata.get("split.tensors.count", len(self._home))
        if total != len(self._home):
            raise CheckpointError(f"{self.where} and its other parts hold {len(self._home)} tensors, must be {total}; "
                                  "download them again")
        self.infos: Mapping[str, Info] = {name: one.infos[name] for name, one in self._home.items()}

    def read(self, name: str) -> np.ndarray:
        """Read one tensor; see `Gguf.read`."""
        return self._home[name].read(name)

    def blocks(self, name: str, start: int, stop: int, step: int = 1, flat: int = 1
               ) -> Iterator[tuple[int, np.ndarray]]:
        """Read rows of one tensor; see `Gguf.blocks`."""
        return self._home[name].blocks(name, start, stop, step, flat)


File = Gguf | Split


def siblings(path: Path) -> list[Path]:
    """Return the paths of all parts of a split model; the path itself, if it is not named like a part.

    Example:
        >>> [p.name for p in siblings(Path("a-00002-of-00002.gguf"))]
        ['a-00001-of-00002.gguf', 'a-00002-of-00002.gguf']
    """
    found = _PART.fullmatch(path.name)
    if found is None or not 0 < int(found[2]) <= int(found[3]):
        return [path]
    return [path.with_name(f"{found[1]}-{i + 1:05d}-of-{found[3]}{SUFFIX}") for i in range(int(found[3]))]


def opened(path: Path) -> File:
    """Open a GGUF file, or all parts of a model that it is a part of.

    Raises:
        CheckpointError: a file is missing or damaged, or it is a part and its name does not say of what.
    """
    if len(siblings(path)) > 1:
        return Split(path)
    file = Gguf(path)
    count = file.metadata.get("split.count", 1)
    if count > 1:
        raise CheckpointError(f"{path} is one of {count} parts; name it as gguf-split does, "
                              f"NAME-00001-of-{count:05d}{SUFFIX}, so that the others are found")
    return file


class _Cursor:
    """Reads a header from its start; a length that leads out of the file is a ValueError."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position = data, 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise ValueError(f"the header runs past the end, {len(self.data):,} bytes")
        part = self.data[self.position:end]
        self.position = end
        return part

    def number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0])

    def array(self, code: str, count: int) -> list[Any]:
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code))))

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner == _STRING:
                return [self.text() for _ in range(count)]
            if inner == _ARRAY:
                raise ValueError("a value is an array of arrays")
            return self._scalars(inner, count)
        return self._scalars(kind, 1)[0]

    def _scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise ValueError(f"a value has the type {kind}")
        if count > len(self.data):
            raise ValueError(f"the header runs past the end, {len(self.data):,} bytes")
        found = self.array(_SCALARS[kind], count)
        return [float(str(np.float32(x))) for x in found] if kind == _FLOAT32 else found


class Source(NamedTuple):
    """Where a renamed tensor comes from.

    Attributes:
        name: in the file.
        change: what is done to the array; None: nothing.
        expert: its number along the first axis of the tensor in the file, which holds all experts; None: the tensor
            is that in the file.
    """

    name: str
    change: Callable[[np.ndarray], np.ndarray] | None = None
    expert: int | None = None


class Renamed:
    """Tensors of a GGUF file under other names, rows put in order where the file has them in another.

    Args:
        file: the file.
        names: where each tensor comes from, by its new name.
    """

    def __init__(self, file: File, names: Mapping[str, Source]):
        self.where, self._file, self._names = file.where, file, names
        self.infos: Mapping[str, Info] = {
            new: file.infos[old.name] if old.expert is None else
            Info(file.infos[old.name].dtype, file.infos[old.name].shape[1:]) for new, old in names.items()}

    def read(self, name: str) -> np.ndarray:
        """Read one tensor."""
        old, change, expert = self._names[name]
        if expert is not None:
            array = empty(self.infos[name].shape, self.infos[name].dtype)
            for first, rows in self.blocks(name, 0, len(array)):
                array[first:first + len(rows)] = rows
            return array
        array = self._file.read(old)
        return array if change is None else change(array)

    def blocks(self, name: str, start: int, stop: int, step: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """Read rows of one tensor; see `jpeft.interop.tensors.Tensors`."""
        old, change, expert = self._names[name]
        if expert is not None:
            begin = expert * self.infos[name].shape[0]
            for first, rows in self._file.blocks(old, begin + start, begin + stop, step, flat=2):
                yield first - begin, rows
        elif change is None:
            yield from self._file.blocks(old, start, stop, step)
        else:
            yield start, self.read(name)[start:stop]


def find(path: Path) -> Path | None:
    """Return the GGUF file that a path means: itself, or the only one in a folder; None if there is none.

    Files that are the parts of one model count as one: the first of them.

    Raises:
        CheckpointError: the folder holds several.

    Example:
        >>> find(Path("jpeft")) is None
        True
    """
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    inside = sorted(path.glob(f"*{SUFFIX}")) or sorted(path.glob(f"*/*{SUFFIX}"))
    if inside and set(inside) - set(siblings(inside[0])):
        names = listing(p.relative_to(path).as_posix() for p in inside)
        raise CheckpointError(f"{path} holds {len(inside)} GGUF files; name one of them: {names}")
    return inside[0] if inside else None


def _package() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise CheckpointError("reading a GGUF file needs the gguf package; pip install 'jpeft[gguf]'") from error
    return gguf
