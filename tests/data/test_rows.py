"""Conversations in columns, templates over columns, rows that are kept, files of text, and places in a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jpeft.data import rows
from jpeft.data.rows import Text, conversations, distinct, fill, hold_out, matching, read_texts, spans
from jpeft.data.table import Table, read_table
from jpeft.errors import (
    ColumnError,
    DataFileError,
    EmptyDataError,
    JpeftError,
    LabelError,
    MissingValueError,
    SplitError,
    TemplateError,
)

TALK = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Upon the heath."}]
SUMS = Table({"passage": ["Ann has 2.", "Bob has 3."], "question": ["How many?", "And {?"], "answer": ["2 apples", "3"],
              "n": [2, 3.0], "easy": [True, None], "list": [[1], []]}, "sums.jsonl")


def test_conversations_of_json_lines_parquet_and_csv(tmp_path: Path) -> None:
    lines = tmp_path / "talks.jsonl"
    lines.write_text("\n".join(json.dumps({"messages": TALK, "id": i}) for i in range(2)))
    assert conversations(read_table(lines)) == [TALK, TALK]
    as_text = Table({"talk": [json.dumps(TALK)]}, "talks.csv")
    assert conversations(as_text, "talk") == [TALK]
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"messages": [TALK]}), tmp_path / "talks.parquet")
    assert conversations(read_table(tmp_path / "talks.parquet")) == [TALK]


def test_a_template_over_columns() -> None:
    assert fill(SUMS, "{passage} {question}") == ["Ann has 2. How many?", "Bob has 3. And {?"]
    assert fill(SUMS, "{{{n}}} of {n}") == ["{2} of 2", "{3} of 3"]
    assert fill(Table({"ok": [True, False]}, "t"), "{ok}") == ["true", "false"]
    assert fill(Table({"a b.c[0]": ["x"]}, "t"), "<{a b.c[0]}>") == ["<x>"]


def test_names_of_values() -> None:
    table = Table({"label": [1, 0], "text": ["a", "b"]}, "reviews.csv")
    names = {"label": {0: "negative", 1: "positive"}}
    assert fill(table, "{label}", names) == ["positive", "negative"]
    assert fill(Table({"label": ["1", "0"]}, "reviews.csv"), "{label}", names) == ["positive", "negative"]
    assert fill(table, "{text}", names) == ["a", "b"]
    assert fill(Table({"ok": [True]}, "t"), "{ok}", {"ok": {True: "yes", False: "no"}}) == ["yes"]


def test_rows_that_match() -> None:
    number = r"(-?\d+(?:\.\d+)?)(?: .*)?"
    table = Table({"answer": ["9 apples", "Yes", "3", "2:30 p.m.", None, "-1.5", 7], "i": list(range(7))}, "sums")
    kept = matching(table, {"answer": number})
    assert kept.table.columns == {"answer": ["9", "3", "-1.5", "7"], "i": [0, 2, 5, 6]}
    assert kept.dropped == 3
    assert matching(table, {"answer": r"-?\d+"}).table.columns == {"answer": ["3", 7], "i": [2, 6]}
    assert matching(table, {"answer": r"\d.*", "i": "[0-3]"}).table.columns["answer"] == ["9 apples", "3", "2:30 p.m."]
    assert table.columns["answer"][0] == "9 apples", "the table itself has changed"
    assert matching(table, {}) == (table, 0)


def test_rows_that_differ() -> None:
    table = Table({"q": ["a", "b", "a", "a"], "n": [1, 1, 1.0, 2], "i": [0, 1, 2, 3]}, "t")
    assert distinct(table, ["q"]).table.columns["i"] == [0, 1]
    kept = distinct(table, ["q", "n"])
    assert (kept.table.columns["i"], kept.dropped) == ([0, 1, 3], 1)


@pytest.fixture
def plays(tmp_path: Path) -> Path:
    for name, text in {"tragedies/macbeth.md": "Anon.", "tragedies/hamlet.md": "Who's there?", "romances/tempest.TXT":
                       "﻿Boatswain! 🙂", "notes.rst": "no play", "__init__.py": ""}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def test_files_of_text(plays: Path) -> None:
    found = read_texts(plays)
    assert found == [("tempest", "Boatswain! 🙂"), ("hamlet", "Who's there?"), ("macbeth", "Anon.")]
    assert read_texts([plays / "notes.rst", plays / "tragedies"]) == [("notes", "no play"), *found[1:]]
    kept, held = hold_out(found, ["macbeth", "tempest"])
    assert ([t.name for t in kept], [t.name for t in held]) == (["hamlet"], ["tempest", "macbeth"])
    assert hold_out(found, []) == (found, [])


def test_places() -> None:
    text = "> a b\nno\n>c\n> \n> d"
    assert [text[a:b] for a, b in spans(text, "^> (.*)$")] == ["a b", "d"]
    assert [text[a:b] for a, b in spans(text, "^>.*$")] == ["> a b", ">c", "> ", "> d"]
    assert [text[a:b] for a, b in spans(text, "b|(c)|(d)")] == ["c"], "a match without the first group is passed over"


def test_the_spoken_lines_of_a_play() -> None:
    text = ("# Macbeth\n\n## ACT I\n\n_Thunder. Enter\nthree Witches_\n\n**First Witch**  \nWhen shall we three  \n"
            "meet again _\\[Aside]_  \n\n_A drum_\n\n**ALL**  \nFair is foul!\n\n_Burthen _\\[within_\n\n"
            "**A**  \nAnon.\n")
    pattern = r"_(?:[^_\n]|\n(?!\n))+_|^(?![#*])([^_\n]*[^_\s])"
    assert [text[a:b] for a, b in spans(text, pattern)] == [
        "When shall we three", "meet again", "Fair is foul!", "Anon."]


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: fill(SUMS, "{pasage} {question}"), ColumnError, "sums.jsonl has no column 'pasage'; nearest: 'passage'"),
    (lambda: fill(SUMS, "passage"), TemplateError, "names no column; write columns in braces"),
    (lambda: fill(SUMS, ""), TemplateError, "names no column"),
    (lambda: fill(SUMS, "{passage"), TemplateError, "the template '{passage' is none .*braces as {{ and }}"),
    (lambda: fill(SUMS, "{}"), TemplateError, "holds {}, expected the name of a column alone"),
    (lambda: fill(SUMS, "{n:3d}"), TemplateError, "holds {n:3d}, expected the name"),
    (lambda: fill(SUMS, "{n!r}"), TemplateError, "holds {n!r}, expected the name"),
    (lambda: fill(SUMS, "{easy}"), MissingValueError, "row 1 .*has no 'easy'"),
    (lambda: fill(SUMS, "{list}"), ColumnError, "'list' of row 0 .*expected text or a number"),
    (lambda: fill(SUMS, "{n}", {"m": {1: "a"}}), ColumnError, "has no column 'm'; nearest: .*'n'"),
    (lambda: fill(SUMS, "{n}", {"n": {1: "one", 2: "two"}}), LabelError, "'n' of row 1 .*'3', which has no name.*1, 2"),
    (lambda: fill(Table({"a": [""]}, "t"), "{a}"), MissingValueError, "row 0 .*has no 'a'"),
    (lambda: conversations(SUMS, "mesages"), ColumnError, "no column 'mesages'; nearest"),
    (lambda: conversations(SUMS, "n"), ColumnError, "'n' of row 0 .*is 2, expected a list of messages"),
    (lambda: conversations(SUMS, "list"), ColumnError, "row 0 .*expected a list of messages"),
    (lambda: conversations(SUMS, "answer"), ColumnError, "row 0 .*is no JSON"),
    (lambda: conversations(SUMS, "easy"), ColumnError, "row 0"),
    (lambda: conversations(Table({"m": [[{}], None]}, "t"), "m"), MissingValueError, "row 1 .*has no 'm'"),
    (lambda: matching(SUMS, {"anser": "x"}), ColumnError, "no column 'anser'; nearest: 'answer'"),
    (lambda: matching(SUMS, {"answer": "("}), TemplateError, r"'\(' is no regular expression"),
    (lambda: matching(SUMS, {"answer": "x"}), EmptyDataError, "no value of 'answer' matches 'x'; the first is '2 ap"),
    (lambda: distinct(SUMS, ["anser"]), ColumnError, "no column 'anser'"),
    (lambda: distinct(SUMS, "answer"), ColumnError, "are 'answer', must be a list of names"),
    (lambda: distinct(SUMS, []), ColumnError, "name at least one"),
    (lambda: spans("abc", "x"), TemplateError, "the pattern 'x' finds nothing in a text that begins 'abc'"),
    (lambda: spans("abc", "["), TemplateError, "is no regular expression"),
    (lambda: spans("abc", "^()"), TemplateError, "finds nothing"),
    (lambda: hold_out([Text("macbeth", "x")], ["mcbeth"]), SplitError, "no text 'mcbeth' to hold out; nearest: 'macb"),
    (lambda: hold_out([Text("macbeth", "x")], ["macbeth"]), SplitError, "all 1 texts are held out"),
    (lambda: hold_out([Text("macbeth", "x")], "macbeth"), SplitError, "must be a list of names"),
    (lambda: read_texts([]), EmptyDataError, "no files of text to read"),
])
def test_mistakes(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, JpeftError)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(plays: Path) -> None:
    with pytest.raises(DataFileError, match=r"no file .*macbet.md; nearest: 'macbeth.md'"):
        read_texts(plays / "tragedies" / "macbet.md")
    (plays / "empty").mkdir()
    with pytest.raises(EmptyDataError, match=r"empty has no \.md or \.txt file in it"):
        read_texts(plays / "empty")
    (plays / "empty" / "a.txt").write_text(" \n")
    with pytest.raises(EmptyDataError, match=r"a\.txt holds no text"):
        read_texts(plays)
    (plays / "empty" / "a.txt").write_bytes(b"fine\n\xff")
    with pytest.raises(DataFileError, match=r"a\.txt line 2 is not UTF-8"):
        read_texts(plays)
    assert rows.TEXT_FILES == (".md", ".txt")
