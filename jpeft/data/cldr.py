"""Names in many languages from the Unicode CLDR, as the babel package stores them: a small parallel corpus.

The files are pickles. They are read without babel, and nothing in them is executed: what is not plain data becomes an
empty object.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jpeft.data.split import Split
from jpeft.errors import DataFileError, EmptyDataError, SplitError, nearest

KINDS = {"territories": "territories", "languages": "languages", "scripts": "scripts", "currencies": "currency_names"}


class Names(NamedTuple):
    """What is read, what should be written, and the key of each (`territories/TJ`)."""

    read: list[str]
    written: list[str]
    keys: list[str]


class _Opaque:
    """Stands for an object of babel's, with nothing in it."""

    def __init__(self, *args: Any) -> None:
        """Take what babel's object would."""

    def __setstate__(self, state: Any) -> None:
        """Forget it."""


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] != "babel":
            raise pickle.UnpicklingError(f"it holds a {module}.{name}, which is none of babel's")
        return _Opaque


def pairs(folder: Path, read: Sequence[str], write: str, kinds: Sequence[str]) -> Names:
    """Return the names that some languages and another one both have.

    Args:
        folder: `babel/locale-data`.
        read: codes of languages, as "tg"; their names come one language after the other.
        write: code of the other one.
        kinds: keys of `KINDS`.

    Raises:
        DataFileError: a language is not there, or its file is damaged.
        EmptyDataError: they have no name in common.
    """
    found, right = Names([], [], []), _names(folder, write, kinds)
    for language in read:
        names = _names(folder, language, kinds)
        keys = sorted(set(names) & set(right))
        if not keys:
            raise EmptyDataError(f"{language!r} and {write!r} have no name of {', '.join(kinds)} in common; choose "
                                 "others")
        found.read.extend(names[key] for key in keys)
        found.written.extend(right[key] for key in keys)
        found.keys.extend(keys)
    return found


def split(keys: Sequence[str], test: float, validation: float, seed: int) -> Split:
    """Divide names by their keys: a key is for the test in every pair of languages, or in none.

    Args:
        keys: one for each row.
        test: share of all keys, about.
        validation: the same.
        seed: of the division.

    Raises:
        SplitError: a part would be empty.

    Example:
        >>> parts = split([f"languages/{i}" for i in range(100)], 0.2, 0.1, 0)
        >>> [len(part) for part in parts]
        [72, 10, 18]
    """
    place = np.array([zlib.crc32(f"{seed}/{key}".encode()) / 2**32 for key in keys])
    parts = (place >= test + validation, (place >= test) & (place < test + validation), place < test)
    rows = [np.flatnonzero(part).astype(np.int64) for part in parts]
    for name, part in zip(Split._fields, rows, strict=True):
        if not len(part):
            raise SplitError(f"test={test!r} and validation={validation!r} leave no row for {name} of {len(keys)} "
                             "names; change them")
    return Split(*rows)


def _names(folder: Path, language: str, kinds: Sequence[str]) -> dict[str, str]:
    path = folder / f"{language}.dat"
    if not path.is_file():
        known = [p.stem for p in folder.glob("*.dat")] if folder.is_dir() else []
        raise DataFileError(f"{folder} has no names in the language {language!r} ({nearest(language, known)}); give "
                            "the folder babel/locale-data and a language's code")
    try:
        with open(path, "rb") as file:
            held = _Plain(file).load()
        return {f"{kind}/{key}": name for kind in kinds for key, name in held.get(KINDS[kind], {}).items()
                if isinstance(name, str) and name.strip()}
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError, KeyError) as error:
        raise DataFileError(f"{path} is no file of babel's ({error}); install or download babel again") from error
