"""Texts that grow: whole characters, stop strings over token borders, nothing said twice or lost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from jpeft.serve.text import Growing


def in_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def test_characters_come_whole() -> None:
    growing = Growing(in_bytes)
    parts = [growing.push(byte) for byte in "aé🙂b".encode()]
    assert parts == ["a", "", "é", "", "", "", "🙂", "b"]
    assert growing.text + growing.finish() == "aé🙂b"


def test_a_broken_character_at_the_end_is_not_lost() -> None:
    growing = Growing(in_bytes)
    assert [growing.push(byte) for byte in (97, 0xC3)] == ["a", ""]
    assert growing.finish() == "\ufffd"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 50])
@pytest.mark.parametrize(("text", "stop", "want"), [
    ("one STOP two", ["STOP"], "one "),
    ("one STO two", ["STOP"], "one STO two"),
    ("ababac!", ["abac"], "ab"),
    ("x END y STOP", ["STOP", "END"], "x "),
    ("nothing", [], "nothing"),
    ("ends with STO", ["STOP"], "ends with STO"),
])  # fmt: skip
def test_stop_strings_over_token_borders(text: str, stop: list[str], want: str, size: int) -> None:
    pieces = [text[i:i + size] for i in range(0, len(text), size)]
    growing = Growing(lambda ids: "".join(pieces[i] for i in ids), stop)
    said = [growing.push(i) for i in range(len(pieces))] + [growing.finish()]
    assert "".join(said) == growing.text == want
    assert growing.stopped == (want != text)


def test_pieces_that_look_otherwise_at_the_start() -> None:
    """A sentencepiece decoder drops the space before the first word that it is given."""
    words = ["▁one", "▁two", "▁three", "s"]
    growing = Growing(lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" "))
    assert [growing.push(i) for i in range(4)] == ["one", " two", " three", "s"]


def test_any_split_of_any_text() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(rng.choice(list("abAé🙂"), 12))
        growing = Growing(in_bytes, ["aba"])
        said = "".join(growing.push(byte) for byte in text.encode()) + growing.finish()
        assert said == growing.text == text.split("aba")[0]
