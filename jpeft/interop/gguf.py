"""GGUF files: what the header says, and one tensor at a time, dequantised by the `gguf` package.

`read_gguf` is the whole way: a configuration as Hugging Face writes it, tensors under their Hugging Face names, and the
tokenizer. `Gguf` is the file as it is. What the names and keys mean is in `gguf_models`, the tokenizer in
`gguf_tokens`.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jpeft.errors import CheckpointError
from jpeft.interop.tensors import Info, empty, listing

SUFFIX = ".gguf"
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
        one = self.stored[name]
        raw = empty((one.size,), np.dtype(np.uint8))
        with open(self.path, "rb") as file:
            file.seek(one.offset)
            got = file.readinto(raw.data) if one.size else 0
        if got != one.size:
            raise CheckpointError(f"{self.path} ends inside {name!r}; download it again")
        if one.kind in _DIRECT:
            return raw.view(_DIRECT[one.kind]).reshape(one.shape)
        kind = self._package.GGMLQuantizationType[one.kind]
        rows = raw.reshape(*one.shape[:-1], -1)
        return np.asarray(self._package.quants.dequantize(rows, kind), np.float32).reshape(one.shape)


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


class Renamed:
    """Tensors of a GGUF file under other names, rows put in order where the file has them in another.

    Args:
        file: the file.
        names: new name -> name in the file, and what is done to the array; None: nothing.
    """

    def __init__(self, file: Gguf, names: Mapping[str, tuple[str, Callable[[np.ndarray], np.ndarray] | None]]):
        self.where, self._file, self._names = file.where, file, names
        self.infos: Mapping[str, Info] = {new: file.infos[old] for new, (old, _) in names.items()}

    def read(self, name: str) -> np.ndarray:
        old, change = self._names[name]
        array = self._file.read(old)
        return array if change is None else change(array)


def find(path: Path) -> Path | None:
    """Return the GGUF file that a path means: itself, or the only one in a folder; None if there is none.

    Raises:
        CheckpointError: the folder holds several.

    Example:
        >>> find(Path("jpeft")) is None
        True
    """
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    inside = sorted(path.glob(f"*{SUFFIX}")) or sorted(path.glob(f"*/*{SUFFIX}"))
    if len(inside) > 1:
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
