"""Names in two languages from pickles: read without babel, without executing anything, divided by key."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from jpeft.data import cldr
from jpeft.errors import DataFileError, EmptyDataError, SplitError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for language, names in (("aa", {"X": "ex", "Y": "why", "Z": ""}), ("bb", {"Y": "WHY", "X": "EX", "W": "W"})):
        held = {"languages": names, "territories": {"X": language}, "currency_names": {}, "scripts": {}}
        (tmp_path / f"{language}.dat").write_bytes(pickle.dumps(held))
    return tmp_path


def test_names_are_joined_by_key(folder: Path) -> None:
    found = cldr.pairs(folder, ["aa"], "bb", ["languages", "territories"])
    assert found.keys == ["languages/X", "languages/Y", "territories/X"]
    assert found.read == ["ex", "why", "aa"]
    assert found.written == ["EX", "WHY", "bb"]
    both = cldr.pairs(folder, ["aa", "bb"], "bb", ["languages"])
    assert both.read == ["ex", "why", "W", "EX", "WHY"]
    assert both.keys == ["languages/X", "languages/Y", "languages/W", "languages/X", "languages/Y"]


def test_a_key_is_in_one_part_in_every_pair() -> None:
    keys = [f"languages/{i}" for i in range(200)]
    whole, some = cldr.split(keys, 0.2, 0.1, 3), cldr.split(keys[50:], 0.2, 0.1, 3)
    assert {keys[i] for i in whole.test if i >= 50} == {keys[50:][i] for i in some.test}
    assert sorted(np.concatenate(whole).tolist()) == list(range(200))
    assert cldr.split(keys, 0.2, 0.1, 4).test.tolist() != whole.test.tolist()
    assert whole.test.tolist() == cldr.split(keys, 0.2, 0.3, 3).test.tolist()  # whatever is for validation
    with pytest.raises(SplitError, match="no row for validation of 3 names"):
        cldr.split(keys[:3], 0.5, 0.001, 0)


class Shell:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 1",)


def test_files_that_are_none(folder: Path) -> None:
    with pytest.raises(DataFileError, match=r"has no names in the language 'ab' .nearest: 'bb'"):
        cldr.pairs(folder, ["aa"], "ab", ["languages"])
    with pytest.raises(EmptyDataError, match="no name of scripts in common"):
        cldr.pairs(folder, ["aa"], "bb", ["scripts"])
    (folder / "aa.dat").write_bytes(b"\x80\x04")
    with pytest.raises(DataFileError, match="is no file of babel's"):
        cldr.pairs(folder, ["aa"], "bb", ["languages"])
    (folder / "aa.dat").write_bytes(pickle.dumps([Shell()]))
    with pytest.raises(DataFileError, match=r"it holds a posix\.system, which is none of babel's"):
        cldr.pairs(folder, ["aa"], "bb", ["languages"])
