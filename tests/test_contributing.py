"""The example of CONTRIBUTING.md, a method in three files, is the code that is here."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_a_method_is_three_files() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    diff = re.findall(r"```diff\n(.*?)```", text, re.S)[0]
    parts = re.findall(r"\+\+\+ (\S+) \((\d+) lines?\)\n((?:\+(?!\+\+).*\n)*)", diff)
    assert [name for name, *_ in parts] == ["jpeft/methods/hira.py", "jpeft/methods/__init__.py", "tests/cases.py"]
    for name, count, added in parts:
        have = (ROOT / name).read_text(encoding="utf-8").splitlines()
        lines = [line[1:] for line in added.splitlines()] or have
        assert len(lines) == int(count)
        assert set(lines) <= set(have)
    holding = {str(p.relative_to(ROOT)) for p in (ROOT / "jpeft").rglob("*.py")
               if re.search(r"\bhira\b", p.read_text(encoding="utf-8"), re.I)}
    assert holding == {name for name, *_ in parts if name.startswith("jpeft/")}


def test_what_it_says_of_its_docstring_and_its_test() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    source = (ROOT / "jpeft/methods/hira.py").read_text(encoding="utf-8")
    docstring = re.findall(r'    """.*?"""\n', source, re.S)[0]
    assert f"{len(docstring.splitlines())} of them docstring" in text
    own = (ROOT / "tests/methods/test_hira.py").read_text(encoding="utf-8")
    assert f"({len(own.splitlines())} lines, the dense oracle" in text
