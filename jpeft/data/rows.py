"""What a row is, beyond a value in a column: conversations, templates over columns, files of text, places in a text."""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jpeft.data.checks import missing
from jpeft.data.table import Table, as_text, decoded
from jpeft.errors import (
    ColumnError,
    DataFileError,
    EmptyDataError,
    LabelError,
    MissingValueError,
    SplitError,
    TemplateError,
    nearest,
)

TEXT_FILES = (".md", ".txt")


class Kept(NamedTuple):
    """The rows of a table that were kept, and how many were not."""

    table: Table
    dropped: int


class Text(NamedTuple):
    """A file of text, by its name without folder and suffix."""

    name: str
    text: str


def conversations(table: Table, column: str = "messages") -> list[list[dict[str, Any]]]:
    """Return the conversations in a column: lists of messages, or JSON text of such a list.

    Raises:
        ColumnError: there is no such column, or a value is no list of messages `{"role": ..., "content": ...}`.
        MissingValueError: a row has none.

    Example:
        >>> conversations(Table({"messages": ['[{"role": "user", "content": "hi"}]']}, "talks"))
        [[{'role': 'user', 'content': 'hi'}]]
    """
    found = []
    for i, value in enumerate(table.column(column)):
        if missing(value) or value == "":
            raise MissingValueError(f"{table.where}: row {i} (counted from 0) has no {column!r}; fill it in or leave "
                                    "the row out")
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ColumnError(f"{table.where}: {column!r} of row {i} (counted from 0) is no JSON ({error}): "
                                  f"{value[:60]!r}; write a list of messages") from error
        if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
            raise ColumnError(f"{table.where}: {column!r} of row {i} (counted from 0) is {value!r:.80}, expected a "
                              "list of messages {'role': ..., 'content': ...}")
        found.append([dict(one) for one in value])
    return found


def fill(table: Table, template: str, names: Mapping[str, Mapping[Any, str]] | None = None) -> list[str]:
    """Return a text for each row: a template with the row's values in it.

    Args:
        table: the rows.
        template: `"{passage} {question}"`: columns in braces; `{{` and `}}` are braces.
        names: by column, the text that stands for each of its values, such as `{"label": {0: "bad", 1: "good"}}`.

    Raises:
        TemplateError: it is no template, or names no column.
        ColumnError: it or `names` names a column that is not there, or a value is a list or an object.
        MissingValueError: a row lacks a value.
        LabelError: a value has no name.

    Example:
        >>> table = Table({"text": ["fine", "dull"], "label": [1, 0]}, "reviews")
        >>> fill(table, "{text}: {label}", {"label": {0: "bad", 1: "good"}})
        ['fine: good', 'dull: bad']
    """
    pieces = _parsed(template)
    words = {name: {as_text(value): word for value, word in one.items()} for name, one in (names or {}).items()}
    columns = {name: table.column(name) for name in (*(name for _, name in pieces if name is not None), *words)}

    def value(i: int, name: str) -> str:
        found = columns[name][i]
        if missing(found) or found == "":
            raise MissingValueError(f"{table.where}: row {i} (counted from 0) has no {name!r}; fill it in or leave the "
                                    "row out")
        if not isinstance(found, str | int | float | bool):
            raise ColumnError(f"{table.where}: {name!r} of row {i} (counted from 0) is {found!r:.60}, expected text or "
                              "a number; name a column that holds one")
        text = str(as_text(found))
        if name in words and text not in words[name]:
            raise LabelError(f"{table.where}: {name!r} of row {i} (counted from 0) is {text!r:.60}, which has no name; "
                             f"those that have: {', '.join(map(str, words[name]))}")
        return words[name][text] if name in words else text

    return ["".join(literal + ("" if name is None else value(i, name)) for literal, name in pieces)
            for i in range(len(table))]


def matching(table: Table, patterns: Mapping[str, str]) -> Kept:
    r"""Keep the rows whose values match, whole, by column; a missing value matches nothing.

    Where a pattern has groups, the value becomes what the first one holds.

    Raises:
        ColumnError: there is no such column.
        TemplateError: a pattern is no regular expression.
        EmptyDataError: no row is left.

    Example:
        >>> kept = matching(Table({"answer": ["12 apples", "none", 3]}, "sums"), {"answer": r"(\d+)( .*)?"})
        >>> kept.table.columns, kept.dropped
        ({'answer': ['12', '3']}, 1)
    """
    left = table
    for name, pattern in patterns.items():
        column, regex = left.column(name), _regex(pattern)
        found = [regex.fullmatch(as_text(value) or "") for value in column]
        rows = [i for i, match in enumerate(found) if match and (not regex.groups or match[1])]
        if not rows:
            raise EmptyDataError(f"{table.where}: no value of {name!r} matches {pattern!r}; the first is "
                                 f"{next(iter(column), None)!r:.60}")
        if regex.groups:
            column = [match and match[1] for match in found]
        left = _rows(Table({**left.columns, name: column}, table.where), rows)
    return Kept(left, len(table) - len(left))


def distinct(table: Table, columns: Sequence[str]) -> Kept:
    """Keep the first of the rows that are equal in these columns.

    Raises:
        ColumnError: there is no such column, or none is named.

    Example:
        >>> distinct(Table({"q": ["a", "b", "a"], "n": [1, 2, 3]}, "sums"), ["q"]).table.columns
        {'q': ['a', 'b'], 'n': [1, 2]}
    """
    if isinstance(columns, str) or not columns:
        raise ColumnError(f"the columns that tell rows apart are {columns!r}, must be a list of names; name at least "
                          "one")
    first: dict[tuple[str | None, ...], int] = {}
    for i, one in enumerate(_values(table, columns)):
        first.setdefault(one, i)
    left = _rows(table, list(first.values()))
    return Kept(left, len(table) - len(left))


def without(table: Table, others: Table, columns: Sequence[str]) -> Kept:
    """Drop the rows that equal a row of another table in these columns.

    Raises:
        ColumnError: one of the tables has no such column.
        EmptyDataError: no row is left.

    Example:
        >>> without(Table({"q": ["a", "b"]}, "test"), Table({"q": ["b", "c"]}, "train"), ["q"])
        Kept(table=Table(columns={'q': ['a']}, where='test'), dropped=1)
    """
    seen = set(_values(others, columns))
    rows = [i for i, values in enumerate(_values(table, columns)) if values not in seen]
    if not rows:
        raise EmptyDataError(f"every row of {table.where} is one of {others.where}; name files of other rows")
    return Kept(_rows(table, rows), len(table) - len(rows))


def read_texts(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Text]:
    """Read files of text, UTF-8, in the order of their paths.

    Args:
        paths: files, or folders whose `.md` and `.txt` files at any depth are read.

    Raises:
        DataFileError: one is absent or not UTF-8.
        EmptyDataError: there is no file, or one is empty.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "macbeth.md").write_text("Anon.")
        >>> read_texts(folder)
        [Text(name='macbeth', text='Anon.')]
    """
    found: list[Path] = []
    for path in map(Path, [paths] if isinstance(paths, str | os.PathLike) else paths):
        path = path.expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT_FILES and p.is_file())
            if not inside:
                raise EmptyDataError(f"{path} has no {' or '.join(TEXT_FILES)} file in it; name another folder")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            siblings = (p.name for p in path.parent.iterdir()) if path.parent.is_dir() else ()
            raise DataFileError(f"there is no file {path}; {nearest(path.name, siblings, 2)} in its folder")
    if not found:
        raise EmptyDataError("there are no files of text to read; name at least one")
    texts = [Text(path.stem, decoded(path)) for path in found]
    empty = [str(path) for path, text in zip(found, texts, strict=True) if not text.text.strip()]
    if empty:
        raise EmptyDataError(f"{empty[0]} holds no text; leave it out")
    return texts


def hold_out(texts: Sequence[Text], names: Sequence[str]) -> tuple[list[Text], list[Text]]:
    """Divide texts into the others and those of these names.

    Raises:
        SplitError: there is no text of such a name, or no other is left.

    Example:
        >>> hold_out([Text("hamlet", "..."), Text("macbeth", "...")], ["macbeth"])[1]
        [Text(name='macbeth', text='...')]
    """
    known = [text.name for text in texts]
    if isinstance(names, str):
        raise SplitError(f"the texts to hold out are {names!r}, must be a list of names; put it in a list")
    for name in names:
        if name not in known:
            raise SplitError(f"there is no text {name!r} to hold out; {nearest(str(name), known)}")
    if set(known) <= set(names):
        raise SplitError(f"all {len(known)} texts are held out, so none is left to train on; hold out fewer")
    return [text for text in texts if text.name not in names], [text for text in texts if text.name in names]


def spans(text: str, pattern: str) -> list[tuple[int, int]]:
    r"""Return the places in a text that a pattern finds, `(start, end)` in characters.

    `^` and `$` stand for the borders of lines. Where the pattern has groups, a place is what the first one holds, and a
    match in which that group takes no part is passed over: so `skipped|^(kept)$` leaves things out.

    Raises:
        TemplateError: it is no regular expression, or finds nothing.

    Example:
        >>> text = "**Witch**\nWhen shall\n_Exit, in\nthunder_\nwe meet\n"
        >>> [text[a:b] for a, b in spans(text, r"_[^_]+_|^(?!\*)(.+)$")]
        ['When shall', 'we meet']
    """
    regex = _regex(pattern, re.MULTILINE)
    group = 1 if regex.groups else 0
    found = [match.span(group) for match in regex.finditer(text) if match.end(group) > match.start(group)]
    if not found:
        raise TemplateError(f"the pattern {pattern!r} finds nothing in a text that begins {text[:40]!r}; correct it")
    return found


def _parsed(template: str) -> list[tuple[str, str | None]]:
    """Return literal text and the column after it, in order."""
    try:
        parts = list(string.Formatter().parse(template))
    except (ValueError, TypeError) as error:
        raise TemplateError(f"the template {template!r} is none ({error}); write columns as {{name}}, and braces as "
                            "{{ and }}") from error
    odd = [f"{{{name}{'!' + kind if kind else ''}{':' + form if form else ''}}}" for _, name, form, kind in parts
           if name is not None and (form or kind or not name)]
    if odd:
        raise TemplateError(f"the template {template!r} holds {odd[0]}, expected the name of a column alone, such as "
                            "{text}; braces that are text are written {{ and }}")
    if all(name is None for _, name, _, _ in parts):
        raise TemplateError(f"the template {template!r} names no column; write columns in braces, such as {{text}}")
    return [(literal, name) for literal, name, _, _ in parts]


def _regex(pattern: str, flags: int = 0) -> re.Pattern[str]:
    try:
        return re.compile(pattern, flags)
    except (re.error, TypeError) as error:
        raise TemplateError(f"{pattern!r} is no regular expression ({error}); correct it") from error


def _values(table: Table, columns: Sequence[str]) -> list[tuple[str | None, ...]]:
    return list(zip(*([as_text(value) for value in table.column(name)] for name in columns), strict=True))


def _rows(table: Table, rows: Sequence[int]) -> Table:
    return Table({name: [column[i] for i in rows] for name, column in table.columns.items()}, table.where)
