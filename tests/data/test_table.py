"""Tables: what CSV, JSON lines and Parquet files may hold, filters, and what each damaged file says."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jpeft.data.table import Table, read_table
from jpeft.errors import ColumnError, DataError, DataFileError, EmptyDataError, JpeftError

Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


def fails(path: Path, kind: type[JpeftError], where: dict[str, Any] | None = None) -> str:
    with pytest.raises(kind) as caught:
        read_table(path, where=where)
    message = str(caught.value)
    assert "\n" not in message
    assert isinstance(caught.value, DataError)
    return message


def test_csv_with_quotes_line_breaks_and_unicode(write: Write) -> None:
    path = write("a.csv", 'text,label\r\n"He said ""no"", twice",1\r\n"two\nlines\r\nthree",0\r\nnaïve ☃\u2028x,1\r\n')
    assert read_table(path).columns == {
        "text": ['He said "no", twice', "two\nlines\r\nthree", "naïve ☃\u2028x"], "label": ["1", "0", "1"]}


@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_name(write: Write, name: str) -> None:
    text = '{"text": "x"}\n' if name.endswith("jsonl") else "text\nx\n"
    assert read_table(write(name, b"\xef\xbb\xbf" + text.encode())).columns == {"text": ["x"]}


def test_csv_fields_of_any_size_and_the_limit_of_others_stays(write: Write) -> None:
    limit = csv.field_size_limit()
    huge = "word, " * 200_000
    assert len(huge) > limit
    assert read_table(write("a.csv", f'text,label\n"{huge}",1\n')).column("text") == [huge]
    assert csv.field_size_limit() == limit
    fails(write("b.csv", 'text\n"open\n'), DataFileError)
    assert csv.field_size_limit() == limit


def test_csv_blank_lines_are_no_rows_and_empty_values_are_kept(write: Write) -> None:
    table = read_table(write("a.csv", "text,label\n\nx,\n\n,1\n\n"))
    assert table.columns == {"text": ["x", ""], "label": ["", "1"]}
    assert len(table) == 2


@pytest.mark.parametrize(("content", "said"), [
    ('text,label\n"a\nb",1\nx,1,2\n', "line 4 has 3 values, its first line names 2 columns; quote"),
    ("text,label\nx\n", "line 2 has 1 values"),
    ('text,label\nx,1\n"never closed,1\ny,0\n', r"line 3 starts a row that is no CSV \(unexpected end of data\)"),
    ('text,label\n"a" b,1\n', "line 2 starts a row that is no CSV .* write quotes inside a quoted value twice"),
    ("text,text\nx,1\n", "names the column 'text' in its first line more than once"),
    ("text,\nx,1\n", "names the column '' .* not at all; give each column a name"),
    (b"text,label\nx,1\ncaf\xe9,0\n", r"line 3 is not UTF-8 \(byte 0xe9\); save it as UTF-8"),
    ("text,label\nx,1\n".encode("utf-16"), "line 1 is not UTF-8"),
])
def test_what_is_no_csv_is_an_error_with_its_line(write: Write, content: str | bytes, said: str) -> None:
    with pytest.raises(DataFileError, match=said):
        read_table(write("a.csv", content))


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.csv", "", "is empty; its first line must name the columns"),
    ("a.csv", "\ufeff\n", "is empty"),
    ("a.csv", "text,label\n", "has no rows; write at least one"),
    ("a.jsonl", "\n \n", "has no rows"),
])
def test_files_without_rows(write: Write, name: str, content: str, said: str) -> None:
    assert said in fails(write(name, content), EmptyDataError)


def test_jsonl_columns_are_the_union_of_the_keys(write: Write) -> None:
    path = write("a.jsonl", '{"text": "a\\nb\u2028c", "label": 1}\r\n\n{"label": true, "extra": [1]}')
    assert read_table(path).columns == {"text": ["a\nb\u2028c", None], "label": [1, True], "extra": [None, [1]]}


@pytest.mark.parametrize(("content", "said"), [
    ('{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n', "line 3 is no JSON (Expecting ',' delimiter): '{\"text\": "),
    ('[{"text": "a"}]', "line 1 is a JSON array, expected one object a line"),
    ('{"text": "a"}\n"b"\n', "line 2 is a JSON str, expected one object a line"),
    ('{"text": "a"}\n{"text": NULL}', "line 2 is no JSON"),
    ("[" * 100_000, "line 1 is no JSON (maximum recursion depth"),
])
def test_a_broken_line_of_json_is_named(write: Write, content: str, said: str) -> None:
    assert said in fails(write("a.json", content), DataFileError)


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"text": ["a", None, "c,\n"], "label": [1, 0, 1]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet", where={"label": "1"})
    assert table.columns == {"text": ["a", "c,\n"], "label": [1, 1]}
    assert table.where == "a.parquet (label=1)"

    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[:len(data) // 2])
    assert "is no readable Parquet file (" in fails(tmp_path / "cut.parquet", DataFileError)
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    assert "has no rows" in fails(tmp_path / "none.parquet", EmptyDataError)


def test_parquet_without_pyarrow(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "needs pyarrow; pip install pyarrow" in fails(write("a.parquet", b"PAR1"), DataFileError)


ROWS = "text,label,source\na,1,rotten_tomatoes\nb,0,imdb\nc,1,imdb\nd,2.0,other\n"


@pytest.mark.parametrize(("where", "kept"), [
    ({"source": "imdb"}, ["b", "c"]),
    ({"source": "imdb", "label": 1}, ["c"]),
    ({"label": [0, 2]}, ["b", "d"]),
    ({"source": ["imdb", "nowhere"]}, ["b", "c"]),
    ({}, ["a", "b", "c", "d"]),
])
def test_filters(write: Write, where: dict[str, Any], kept: list[str]) -> None:
    path = write("a.csv", ROWS.replace("2.0", "2"))
    assert read_table(path, where=where).column("text") == kept


def test_filters_know_booleans_and_missing_values(write: Write) -> None:
    path = write("a.jsonl", '{"i": 0, "x": true}\n{"i": 1, "x": "None"}\n{"i": 2}\n{"i": 3, "x": "true"}\n{"i": 4.0}\n')
    assert read_table(path, where={"x": True}).column("i") == [0, 3]
    assert read_table(path, where={"x": None}).column("i") == [2, 4.0]
    assert read_table(path, where={"i": "4"}).column("i") == [4.0]


def test_a_filter_that_keeps_nothing_names_the_nearest_value(write: Write) -> None:
    path = write("a.csv", ROWS)
    message = fails(path, EmptyDataError, {"source": "rotten-tomatoes"})
    assert message.startswith("a.csv has no row with source 'rotten-tomatoes'; nearest: 'rotten_tomatoes'")
    assert "no row with label '0' or '7'; nearest: '1'" in fails(path, EmptyDataError,
                                                                {"source": "rotten_tomatoes", "label": ["0", "7"]})
    assert "no row with label nothing" in fails(path, EmptyDataError, {"label": []})


def test_wrong_columns_name_the_nearest(write: Write) -> None:
    path = write("a.csv", ROWS)
    assert "a.csv has no column 'sources'; nearest: 'source'" in fails(path, ColumnError, {"sources": "imdb"})
    with pytest.raises(ColumnError, match=r"a\.csv has no column 'txt'; nearest: 'text'"):
        read_table(path).column("txt")


def test_files_that_are_not_there_or_of_another_kind(write: Write, tmp_path: Path) -> None:
    path = write("reviews.csv", ROWS)
    assert "nearest: 'reviews.csv' in its folder" in fails(tmp_path / "review.csv", DataFileError)
    assert "there are none in its folder" in fails(tmp_path / "nowhere" / "review.csv", DataFileError)
    assert "is a folder, expected a file of rows in it; nearest: 'reviews.csv'" in fails(tmp_path, DataFileError)
    assert ("has the suffix '.xlsx', which says no kind of table; use one of .csv, .jsonl, .json, .parquet"
            in fails(write("a.xlsx", "x"), DataFileError))
    assert "has the suffix ''" in fails(path.rename(tmp_path / "reviews"), DataFileError)


def test_a_file_that_may_not_be_read(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    path = write("a.csv", ROWS)
    monkeypatch.setattr(Path, "read_bytes", denied)
    assert "cannot be read ([Errno 13] Permission denied); check the file" in fails(path, DataFileError)


def test_columns_of_unequal_length() -> None:
    with pytest.raises(ColumnError, match=r"columns of here have unequal lengths, \{'a': 1, 'b': 0\}"):
        Table({"a": [1], "b": []}, "here")


TAB = "Category\tText\nd\tstring\nclass\t\n"


def test_orange_files_have_three_lines_before_their_rows(write: Write) -> None:
    rows = 'rec.autos\tmy old car\nsci.med\t"a ""tab""\there"\n'
    want = {"Category": ["rec.autos", "sci.med"], "Text": ["my old car", 'a "tab"\there']}
    assert read_table(write("a.tab", TAB + rows)).columns == want
    assert read_table(write("b.tab", TAB.replace("class\t", "") + rows)).columns == want  # no flags at all


def test_a_table_that_is_not_oranges_is_refused(write: Write) -> None:
    plain = write("a.tab", "Category\tText\n" + 2 * "rec.autos\tmy old car\n")
    assert "line 2 is ['rec.autos', 'my old car']" in fails(plain, DataFileError)
    assert "line 2 is []" in fails(write("b.tab", "Category\tText\n"), DataFileError)
    assert "has no rows" in fails(write("c.tab", TAB), EmptyDataError)
    assert "line 5 has 1 values" in fails(write("d.tab", TAB + "sci.med\tx\nsci.med\n"), DataFileError)
