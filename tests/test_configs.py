"""Every shipped configuration: it parses, it says how to run it and what to expect, and it runs (made tiny)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("pydantic", reason="needs the packages of jpeft[train]")

from cli import tinyjob
from cli.tinyjob import Tiny

from jpeft.cli import config, runs
from jpeft.cli.main import main
from jpeft.cli.rules import to_methods

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
QUICK = [path for path in CONFIGS if path.stem.startswith("quickstart")]
METHODS = {"quickstart": "LoRA", "full": "Full", "head": "Full", "dora": "DoRA", "ia3": "IA3", "bitfit": "BitFit",
           "prompt": "PromptTuning", "prefix": "PrefixTuning", "pfeiffer": "Pfeiffer"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tinyjob.make(tmp_path_factory.mktemp("tiny"))


def test_all_nine_quickstarts_are_there() -> None:
    assert {path.stem.rpartition("_")[2] for path in QUICK} == set(METHODS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_parses_and_says_how_to_run_it(path: Path) -> None:
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    assert first == f"# jpeft train {path.relative_to(ROOT)}"
    assert second.startswith("# Expect: ")
    assert second.endswith(".")
    job = config.load(path)
    assert job.name == path.stem
    assert job.model.sha256
    assert job.data.sha256


@pytest.mark.parametrize("path", QUICK, ids=lambda path: path.stem)
def test_quickstarts_differ_in_the_method_alone(path: Path) -> None:
    job, other = config.load(path), config.load(ROOT / "configs" / "quickstart.yaml")
    assert {p.partition(".")[0] for p in job.differences(other)} <= {"rules", "train"}
    assert [p for p in job.differences(other) if p.startswith("train.")] in ([], ["train.learning_rate"])
    names = {type(method).__name__ for method in to_methods(job.rules).values()}
    assert names <= {METHODS[path.stem.rpartition("_")[2]], "Full"}
    assert METHODS[path.stem.rpartition("_")[2]] in names


@pytest.mark.parametrize("path", QUICK, ids=lambda path: path.stem)
def test_quickstart_runs_for_two_steps(path: Path, tiny: Tiny, tmp_path: Path) -> None:
    assert main(["train", str(path), *tiny.settings(tmp_path)]) == 0
    folder = tmp_path / path.stem
    assert {p.name for p in folder.iterdir()} == {
        runs.CONFIG, runs.METRICS, runs.PLOT, runs.SUMMARY, runs.ADAPTER, runs.CHECKPOINTS}
    rows = [json.loads(line) for line in (folder / runs.METRICS).read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    summary = runs.summary(folder)
    assert summary is not None
    assert summary.steps == 2
    assert summary.test["count"] == 16
    assert summary.trainable_parameters > 0
    assert summary.temp_bytes > 0
    assert (summary.percent == 100) == (path.stem == "quickstart_full")
