"""The generated table of methods: complete, true, and that of the README."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import CASES

from jpeft.cli import listing
from jpeft.cli.main import main
from jpeft.cli.rules import METHODS
from jpeft.errors import MethodConfigError
from jpeft.methods import IA3, Chain, LoRA

README = Path(__file__).resolve().parents[2] / "README.md"
ROWS = {name: listing.listed(name) for name in METHODS}
UNDER_TEST = {c.name: next(iter(c.rules.values())) for c in CASES}
FIRST = {type(UNDER_TEST[c.name]): c for c in reversed(CASES)}.values()  # the row of each method's usual form


@pytest.mark.parametrize("name", METHODS)
def test_every_class_says_what_it_is(name: str) -> None:
    row = ROWS[name]
    assert " = " in row.equation
    assert row.formula
    assert row.paper or name in ("Chain", "Full", "TrainableTokens")
    assert name in {type(m).__name__ for m in UNDER_TEST.values()}, "its formula is counted on a row of cases.py"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_what_is_said_to_merge_does(case) -> None:
    """`extra` says what a law writes into the model for a method that has no merged weights."""
    row = ROWS[type(UNDER_TEST[case.name]).__name__]
    assert row.merges.startswith("as" if row.name == "Chain" else "no" if case.extra else "yes")


@pytest.mark.parametrize("case", [c for c in FIRST if "linear" in UNDER_TEST[c.name].uses], ids=lambda c: c.name)
def test_a_chain_takes_it_where_the_table_says(case) -> None:
    method, place = UNDER_TEST[case.name], ROWS[type(UNDER_TEST[case.name]).__name__].place
    other, taken = IA3() if isinstance(method, LoRA) else LoRA(rank=2), {}
    for order in ("before", "after"):
        try:
            Chain((method, other) if order == "before" else (other, method))
            taken[order] = True
        except MethodConfigError:
            taken[order] = False
    want = {"first": (True, False), "early": (True, False), "middle": (True, True), "late": (False, True),
            "last": (False, True), "as its parts": (True, False)}[place]
    assert (taken["before"], taken["after"]) == want


def test_the_readme_holds_it() -> None:
    text = README.read_text(encoding="utf-8")
    start, end = text.index(listing.BEGIN), text.index(listing.END)
    assert text[start:end + len(listing.END)] == listing.document(), "paste what `jpeft methods --markdown` prints"


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--markdown"]) == 0
    assert capsys.readouterr().out == listing.document() + "\n"
