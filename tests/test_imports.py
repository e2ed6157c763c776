"""The laws of the house: who may import whom, what `import jpeft` loads, and what no file may hold."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jpeft"
MAX_LINES = 400

# A file imports lower numbers and its own folder. Equal numbers never see each other. A new folder gets a row here.
LAYERS = {
    "errors": 0,
    "core": 1,
    "methods": 2, "quant": 2, "models": 2, "optim": 2,
    "interop": 3,
    "data": 4, "train": 4, "serve": 4,
    "cli": 5,
    "__main__": 6, "__init__": 6,
}

BASE = ("jax", "optax", "numpy")  # what `import jpeft` may load, with the rest of their own packages
LEFTOVERS = re.compile(r"\b(NotImplementedError|TODO|FIXME|XXX)\b")
PRIVATE_JAX = re.compile(r"jax\._src|from\s+jax\s+import\s.*\b_src\b")


class Import(NamedTuple):
    """One import of a jpeft module by another."""

    source: str
    target: str
    line: int
    typing_only: bool


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Return every module of the package by dotted name; a package's `__init__` has the package's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _statements(tree: ast.AST, typing_only: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, typing_only
        elif isinstance(node, ast.If) and re.fullmatch(r"(typing\.)?TYPE_CHECKING", ast.unparse(node.test)):
            for child in node.body:
                yield from _statements(ast.Module([child], []), True)
            for child in node.orelse:
                yield from _statements(ast.Module([child], []), typing_only)
        else:
            yield from _statements(node, typing_only)


def imports_of(name: str, path: Path, known: dict[str, Path]) -> Iterator[Import]:
    """Yield the imports of one module that stay inside its package, at any depth of the code."""
    top = name.split(".")[0]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node, typing_only in _statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            members = [f"{origin}.{alias.name}" for alias in node.names]
            targets = [member if member in known else origin for member in members]
        for target in targets:
            if target.split(".")[0] == top:
                yield Import(name, target, node.lineno, typing_only)


def all_imports(known: dict[str, Path]) -> list[Import]:
    return [edge for name, path in known.items() for edge in imports_of(name, path, known)]


def folder(module: str) -> str:
    """Return the row of `LAYERS` that a module belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def layer_faults(edges: list[Import]) -> list[str]:
    """Return one line per import that goes up, or sideways to another folder of the same number."""
    faults = []
    for edge in edges:
        here, there = folder(edge.source), folder(edge.target)
        if here != there and LAYERS.get(there, 99) >= LAYERS.get(here, -1):
            faults.append(f"{edge.source}:{edge.line} ({here}) must not import {edge.target} ({there})")
    return faults


def cycles(edges: list[Import]) -> list[str]:
    """Return one import cycle per module that closes one; imports for the type checker alone do not count."""
    graph: dict[str, set[str]] = {}
    for edge in edges:
        if not edge.typing_only and edge.source != edge.target:
            graph.setdefault(edge.source, set()).add(edge.target)
    found, done = [], set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append(" -> ".join([*trail[trail.index(module):], module]))
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def swallows(path: Path) -> list[int]:
    """Return the lines of handlers that catch everything and do nothing."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            idle = all(isinstance(s, ast.Pass) or ast.unparse(s) in ("...", "continue") for s in node.body)
            if broad and idle:
                lines.append(node.lineno)
    return lines


def test_every_folder_has_a_layer() -> None:
    assert {folder(name) for name in modules()} <= set(LAYERS)


def test_imports_go_down() -> None:
    assert layer_faults(all_imports(modules())) == []


def test_there_is_no_import_cycle() -> None:
    assert cycles(all_imports(modules())) == []


def test_import_jpeft_loads_no_other_package() -> None:
    """Compared with what jax, optax and numpy load on their own, in a fresh process."""
    code = (
        f"import sys, json, {', '.join(BASE)}; before = set(sys.modules); import jpeft;"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    # A platform that does not exist: an array or a device touched at import time would fail.
    env = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    allowed = {"jpeft", "jaxlib", *BASE, *sys.stdlib_module_names}
    assert [name for name in loaded if name.split(".")[0] not in allowed] == []


def test_public_names_exist_and_are_documented() -> None:
    import jpeft

    names = jpeft.__all__
    assert len(set(names)) == len(names)
    for name in names:
        thing = getattr(jpeft, name)
        doc = getattr(thing, "__doc__", None) or ""
        assert doc.strip(), f"jpeft.{name} has no docstring"
        assert not doc.startswith(f"{name}("), f"jpeft.{name} has only the docstring that dataclasses write"


@pytest.mark.parametrize("name", modules())
def test_file_keeps_the_house_rules(name: str) -> None:
    path = modules()[name]
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert LEFTOVERS.findall(text) == []
    assert swallows(path) == []


def test_nobody_reaches_into_private_jax() -> None:
    sources = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "notebooks").rglob("*.ipynb")]
    assert [str(p.relative_to(ROOT)) for p in sources if PRIVATE_JAX.search(p.read_text(encoding="utf-8"))] == []


@pytest.fixture
def bad_package(tmp_path: Path) -> Path:
    """A package that breaks each law once."""
    files = {
        "__init__.py": "from jpeft.core.a import x\n",
        "errors.py": "import jpeft.core\n",
        "core/__init__.py": "",
        "core/a.py": "from jpeft.core import b\nx = 1\n",
        "core/b.py": "def f():\n    from . import a\n    return a\n",
        "core/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from jpeft.core import d\n",
        "core/d.py": "from jpeft.core.c import x\n",
        "methods/m.py": "from jpeft.quant.q import z\nfrom ..core import a\n",
        "quant/q.py": "try:\n    import jpeft.cli.main as m\nexcept Exception:\n    pass\n",
        "cli/main.py": "import os, jpeft.methods.m\n",
    }
    for name, text in files.items():
        path = tmp_path / "jpeft" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "jpeft"


def test_the_laws_catch_what_they_forbid(bad_package: Path) -> None:
    known = modules(bad_package)
    edges = all_imports(known)
    assert layer_faults(edges) == [
        "jpeft.errors:1 (errors) must not import jpeft.core (core)",
        "jpeft.methods.m:1 (methods) must not import jpeft.quant.q (quant)",
        "jpeft.quant.q:2 (quant) must not import jpeft.cli.main (cli)",
    ]
    assert cycles(edges) == [
        "jpeft.core.a -> jpeft.core.b -> jpeft.core.a",
        "jpeft.cli.main -> jpeft.methods.m -> jpeft.quant.q -> jpeft.cli.main",
    ]
    assert swallows(known["jpeft.quant.q"]) == [3]
    private = "_" + "src"
    assert PRIVATE_JAX.search(f"import jax.{private}.core")
    assert PRIVATE_JAX.search(f"from jax import numpy, {private}")
    assert not PRIVATE_JAX.search("import jax.numpy")
