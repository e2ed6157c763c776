"""A tiny job and a trained run that the tests of the command line share; programs are compiled once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

pytest.importorskip("pydantic", reason="needs the packages of jpeft[train]")

from cli import tinyjob
from cli.tinyjob import Tiny

from jpeft.cli.main import main


@pytest.fixture(scope="package", autouse=True)
def _programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep compiled programs on disk: every run of this folder trains the same few shapes."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
             "jax_persistent_cache_min_entry_size_bytes")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("programs")), 0.1, 0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tinyjob.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def job(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration: LoRA on the tiny model, 80 steps, with dropout."""
    path = tmp_path_factory.mktemp("config") / "job.yaml"
    path.write_text(f"""
model: {{source: {tiny.model}, dropout: 0.05}}
data:
  source: {tiny.data}
  classes: [negative, positive]
  test: 16
  validation: 16
  max_length: 8
  buckets: [8]
rules:
  (pooler|classifier)/.*: {{method: Full}}
  all-linear: {{method: LoRA, rank: 2, alpha: 4}}
train: {{epochs: 40, batch_size: 32, learning_rate: 3e-2, warmup: 0, eval_every: 20, keep: 3}}
output: {path.parent / "runs"}
""")
    return path


@pytest.fixture(scope="session")
def run(job: Path) -> Path:
    """The folder of the finished run of `job`."""
    assert main(["train", str(job), "--name", "whole"]) == 0
    return job.parent / "runs" / "whole"
