"""Prompts and completions from the columns of a table, as the data section says."""

from __future__ import annotations

from jpeft.cli.datakinds import PairsData, TargetsData
from jpeft.data import rows
from jpeft.data.table import Table


def pairs(d: PairsData | TargetsData, table: Table, notes: list[str]) -> tuple[list[str], list[str]]:
    """Return the prompts and the completions of a table, and note how many rows were left out."""
    if d.match:
        table, dropped = rows.matching(table, d.match)
        notes += [f"left out: {dropped:,} rows do not match data.match"] * bool(dropped)
    if d.unique:
        table, dropped = rows.distinct(table, d.unique)
        notes += [f"left out: {dropped:,} rows equal an earlier one in {', '.join(d.unique)}"] * bool(dropped)
    names = {column: dict(enumerate(words)) for column, words in d.names.items()}
    return rows.fill(table, d.prompt, names), rows.fill(table, d.completion, names)
