"""The table of methods, made from the classes: docstrings, fields and what they derive from `Method`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from jpeft.cli.rules import METHODS, described
from jpeft.cli.tables import markdown

HEAD = ("method", "paper", "equation", "trained values of a leaf", "rides on", "merges", "in a chain",
        "PEFT's format", "lr")
BEGIN, END = "<!-- jpeft methods --markdown -->", "<!-- end of jpeft methods -->"
READABLE: frozenset[str] = frozenset()  # PEFT's types whose adapters are read and written
NOTE = " ".join((
    "`in` and `out` are the sides of a kernel, `size` all values of the leaf, longer words fields of the method;",
    "single letters are in its docstring. A scanned leaf has as many for each layer, but for what stands in [ ]. On",
    "different leaves all methods compose. On one leaf, `Chain` takes one that is first, then early, middle and late",
    "ones, and one that is last. PEFT's format: whether adapter files of Hugging Face PEFT are read and written, and",
    "its name there."))


@dataclasses.dataclass(frozen=True)
class Listed:
    """One row: a method as its class describes it.

    Attributes:
        name: the class.
        paper: an arXiv id, or `openreview` and an id; empty if there is no paper.
        equation: the first of the docstring.
        formula: see `jpeft.Method.formula`.
        uses: the uses of a leaf that it rides on.
        merges: `yes`, or `no` and why.
        place: where it stands among several methods on one leaf.
        peft: whether Hugging Face PEFT's files are read and written, and what the method is called there.
        rate: the recommended learning rate.
    """

    name: str
    paper: str
    equation: str
    formula: str
    uses: str
    merges: str
    place: str
    peft: str
    rate: str


def listed(name: str) -> Listed:
    """Describe one method.

    Example:
        >>> found = listed("LoRA")
        >>> found.equation, found.formula, found.merges
        ("W' = W + s A B", 'rank * (in + out)', 'yes')
    """
    cls = METHODS[name]
    bare = object.__new__(cls)  # fields at their defaults, unchecked: some methods have none that make sense
    text = inspect.getdoc(cls) or ""
    equation = re.search(r"`([^`\n]* = [^`\n]*)`", text)
    many = name == "Chain"
    known = "no" if cls.peft_type is None else f"{'yes' if cls.peft_type in READABLE else 'no'} ({cls.peft_type})"
    return Listed(
        name, _paper(described(name)[1]), equation[1] if equation else "", "sum of its parts" if many else cls.formula,
        "as its parts" if many else ", ".join(sorted(cls.uses)), "as its parts" if many else _merges(bare),
        "as its parts" if many else _place(bare), known,
        "smallest of its parts" if many else f"{cls.recommended_lr:g}")


def _paper(source: str) -> str:
    found = re.search(r"\d{4}\.\d{5}|openreview \w+", source)
    return found[0] if found else ""


def _merges(method: Any) -> str:
    if not method.hooks:
        return "yes"
    if method.virtual_tokens:
        return "no: it adds tokens"
    return "no: it acts at positions" if method.positions else "no: it acts on activations"


def _place(method: Any) -> str:
    if method.virtual_tokens:
        return "last"
    return "late" if method.hooks else "first" if method.leads else "early" if method.dense else "middle"


def rows() -> list[list[str]]:
    """Return a row of `HEAD` for each method, for a terminal."""
    return [[cell or "-" for cell in dataclasses.astuple(listed(name))] for name in METHODS]


def document() -> str:
    """Return the same as Markdown, papers as links, between the two marks that a document holds."""
    cells = []
    for name in METHODS:
        row = listed(name)
        quoted = {k: f"`{v}`" for k in ("name", "equation") if (v := getattr(row, k))}
        formula = row.formula if name == "Chain" else f"`{row.formula}`"
        cells.append([cell or "-" for cell in dataclasses.astuple(
            dataclasses.replace(row, **quoted, formula=formula, paper=_link(row.paper)))])
    return "\n".join((BEGIN, "", NOTE, "", markdown(HEAD, cells, left=len(HEAD)), "", END))


def _link(paper: str) -> str:
    kind, _, number = paper.rpartition(" ")
    where = f"https://openreview.net/forum?id={number}" if kind else f"https://arxiv.org/abs/{number}"
    return f"[{paper}]({where})" if paper else ""
