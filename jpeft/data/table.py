"""Rows of a CSV, JSON lines, Parquet or Orange file, as columns."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jpeft.errors import ColumnError, DataFileError, EmptyDataError, nearest

Columns = dict[str, list[Any]]

# Kinds of a column in Orange's files; the values of a discrete one may be listed in its place.
_ORANGE = re.compile(r"d|discrete|c|continuous|s|string|t|time|b|basket|-?[\w.]+( -?[\w.]+)+|")
_FIELD_LIMIT = 2**31 - 1  # the largest that the csv module takes where a C long has 32 bits


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns of equal length, and where they came from.

    Attributes:
        columns: values by column name, one per row; a value that the file lacks is None (in a CSV: the empty string).
        where: the file and the filter, for messages.

    Example:
        >>> Table({"text": ["good", "bad"], "label": [1, 0]}, "reviews").column("label")
        [1, 0]
    """

    columns: Columns
    where: str

    def __post_init__(self) -> None:
        sizes = {name: len(values) for name, values in self.columns.items()}
        if len(set(sizes.values())) > 1:
            raise ColumnError(f"the columns of {self.where} have unequal lengths, {sizes}; pass one value a row")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def column(self, name: str) -> list[Any]:
        """Return the values of one column.

        Raises:
            ColumnError: there is no such column.
        """
        if name not in self.columns:
            raise ColumnError(f"{self.where} has no column {name!r}; {nearest(str(name), self.columns)}")
        return self.columns[name]


def read_table(path: str | os.PathLike[str], *, where: Mapping[str, Any] | None = None) -> Table:
    r"""Read a file of rows, of the kind that its suffix says.

    - `.csv`: RFC 4180 (commas, quotes, line breaks inside quotes), UTF-8 with or without a byte order mark, the first
      line names the columns. All values are strings.
    - `.jsonl`, `.json`: a JSON object on each line; columns are the union of the keys.
    - `.parquet`: needs the pyarrow package.
    - `.tab`: as the Orange suite writes: values between tabs, and three lines before the rows, which hold the names of
      the columns, their types, and flags. All values are strings.

    Blank lines of text files are no rows. Anything else that is not a row is an error with its line number.

    Args:
        path: a local file; `jpeft.interop.sources.resolve` brings others here.
        where: keep only rows whose values equal these, by column; a list allows any of its members. Values are
            compared as they are and as text, so that 1 finds "1" in a CSV.

    Raises:
        DataFileError: the file is absent, of another kind, or damaged.
        ColumnError: `where` names a column that is not there.
        EmptyDataError: no row is there or none is left.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "reviews.csv"
        >>> _ = path.write_text('text,label,source\n"good, really",1,a\nbad,0,b\n')
        >>> read_table(path, where={"source": "a"}).columns
        {'text': ['good, really'], 'label': ['1'], 'source': ['a']}
    """
    path = Path(path).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if p.suffix.lower() in _READERS)
        raise DataFileError(f"{path} is a folder, expected a file of rows in it; {nearest('data', files)}")
    if not path.exists():
        siblings = (p.name for p in path.parent.iterdir()) if path.parent.is_dir() else ()
        raise DataFileError(f"there is no file {path}; {nearest(path.name, siblings, 2)} in its folder")
    if reader is None:
        raise DataFileError(f"{path} has the suffix {path.suffix!r}, which says no kind of table; "
                            f"use one of {', '.join(_READERS)}")
    try:
        table = Table(reader(path), path.name)
    except OSError as error:
        raise DataFileError(f"{path} cannot be read ({error}); check the file and its permissions") from error
    if len(table) == 0:
        raise EmptyDataError(f"{path} has no rows; write at least one")
    return _filter(table, where) if where else table


def _filter(table: Table, where: Mapping[str, Any]) -> Table:
    kept = range(len(table))
    for name, value in where.items():
        column = table.column(name)
        allowed = value if isinstance(value, list | tuple | set | frozenset) else [value]
        texts = {as_text(one) for one in allowed}
        rows = [i for i in kept if as_text(column[i]) in texts]
        if not rows:
            known = sorted({text for i in kept if (text := as_text(column[i])) is not None})
            wanted = " or ".join(repr(one) for one in allowed) or "nothing"
            raise EmptyDataError(f"{table.where} has no row with {name} {wanted}; "
                                 + nearest(str(next(iter(allowed), "")), (one[:60] for one in known)))
        kept = rows  # type: ignore[assignment]
    said = ", ".join(f"{name}={value}" for name, value in where.items())
    return Table({name: [column[i] for i in kept] for name, column in table.columns.items()}, f"{table.where} ({said})")


def as_text(value: Any) -> str | None:
    """Return a value as text: booleans as JSON spells them, whole floats as integers, None if missing.

    Example:
        >>> as_text(True), as_text(3.0), as_text(None)
        ('true', '3', None)
    """
    if value is None:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def decoded(path: Path) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Raises:
        DataFileError: it is not UTF-8.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise DataFileError(f"{path} line {line} is not UTF-8 (byte {byte:#04x}); save it as UTF-8") from error


def _csv(path: Path, delimiter: str = ",", orange: bool = False) -> Columns:
    limit = csv.field_size_limit(_FIELD_LIMIT)
    try:
        reader = csv.reader(io.StringIO(decoded(path), newline=""), delimiter=delimiter, strict=True)
        rows = _records(path, reader)
        _, header = next(rows, (1, []))
        if not header:
            raise EmptyDataError(f"{path} is empty; its first line must name the columns")
        twice = sorted({name for name in header if header.count(name) > 1 or not name})
        if twice:
            raise DataFileError(f"{path} names the column {twice[0]!r} in its first line more than once or not at all; "
                                "give each column a name of its own")
        types, flags = (next(reader, []), next(reader, None)) if orange else ([], [])
        if orange and (len(types) != len(header) or flags is None or not all(map(_ORANGE.fullmatch, types))):
            raise DataFileError(f"{path} line 2 is {types!r:.60}, expected the types of its {len(header)} columns (d, "
                                "c, string, ...) and a line of flags after it, as Orange writes; save it as .csv")
        kept = []
        for line, row in rows:
            if len(row) != len(header):
                raise DataFileError(f"{path} line {line} has {len(row)} values, its first line names {len(header)} "
                                    "columns; quote values that hold commas, or correct the line")
            kept.append(row)
    finally:
        csv.field_size_limit(limit)
    return {name: [row[i] for row in kept] for i, name in enumerate(header)}


def _records(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV reader that are not blank, each with the number of the line that it starts on."""
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataFileError(f"{path} line {line} starts a row that is no CSV ({error}); close its quotes, and "
                                "write quotes inside a quoted value twice") from error
        if row is None:
            return
        if row:
            yield line, row


def _tab(path: Path) -> Columns:
    return _csv(path, "\t", orange=True)


def _jsonl(path: Path) -> Columns:
    rows: list[dict[str, Any]] = []
    # Not `splitlines`: JSON strings may hold line separators other than \n.
    for number, line in enumerate(decoded(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataFileError(f"{path} line {number} is no JSON ({said}): {line.strip()[:60]!r}; each line must be "
                                'an object such as {"text": "...", "label": 0}') from error
        if not isinstance(row, dict):
            kind = "array" if isinstance(row, list) else type(row).__name__
            raise DataFileError(f"{path} line {number} is a JSON {kind}, expected one object a line; write "
                                '{"text": "...", "label": 0} and so on, without brackets around the lines')
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _parquet(path: Path) -> Columns:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataFileError(f"reading {path} needs pyarrow; pip install pyarrow, or save the rows as CSV") from error
    try:
        return dict(pyarrow.parquet.read_table(path).to_pydict())
    except (pyarrow.ArrowException, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise DataFileError(f"{path} is no readable Parquet file ({said}); write it again") from error


_READERS: dict[str, Callable[[Path], Columns]] = {".csv": _csv, ".jsonl": _jsonl, ".json": _jsonl, ".parquet": _parquet,
                                                  ".tab": _tab}
