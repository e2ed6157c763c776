"""Texts from the columns of a table, as the data section says."""

from __future__ import annotations

from jpeft.cli.datakinds import PairsData, TargetsData, Templates
from jpeft.data import rows
from jpeft.data.table import Table, read_table
from jpeft.interop import sources


def read(d: Templates, notes: list[str]) -> Table:
    """Return the rows of a job, and note how many were left out."""
    where = sources.resolve(d.source, d.sha256)
    return kept(d, read_table(where, where=d.where or None), notes)


def kept(d: Templates, table: Table, notes: list[str]) -> Table:
    """Return the rows that match and are no copies, and note how many were left out."""
    if d.match:
        table, dropped = rows.matching(table, d.match)
        notes += [f"left out: {dropped:,} rows do not match data.match"] * bool(dropped)
    if d.unique:
        table, dropped = rows.distinct(table, d.unique)
        notes += [f"left out: {dropped:,} rows equal an earlier one in {', '.join(d.unique)}"] * bool(dropped)
    return table


def fill(d: Templates, table: Table, template: str) -> list[str]:
    """Return a text for each row."""
    return rows.fill(table, template, {column: dict(enumerate(words)) for column, words in d.names.items()})


def pairs(d: PairsData | TargetsData, table: Table, notes: list[str]) -> tuple[list[str], list[str]]:
    """Return the prompts and the completions of a table, and note how many rows were left out."""
    table = kept(d, table, notes)
    return fill(d, table, d.prompt), fill(d, table, d.completion)
