"""The README's Python runs as it stands, block after block, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import assert_close

README = Path(__file__).resolve().parent.parent / "README.md"


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("flax", reason="needs flax, which the README's examples use")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert len(blocks) >= 5
    names: dict[str, object] = {}
    first, loop, mesh, linen, nnx, equinox, save = blocks
    for block in (first, save, mesh, linen, nnx, equinox, loop):
        exec(compile(block, "README.md", "exec"), names)
    losses, x = names["losses"], names["data"][0]
    assert losses[-1] < 0.7 * losses[0]
    assert_close(names["trained"](x), names["adapted"](names["trainable"], names["frozen"], x), 1e-5)
    assert "trainable 680 of" in capsys.readouterr().out


def test_configurations_that_are_named_are_there():
    root = README.parent
    texts = [README, root / "CHANGELOG.md", root / "CONTRIBUTING.md", *(root / "jpeft").rglob("*.py")]
    named = {name for path in texts for name in re.findall(r"configs/\w+\.yaml", path.read_text(encoding="utf-8"))}
    assert len(named) > 5
    assert [name for name in sorted(named) if not (root / name).is_file()] == []
