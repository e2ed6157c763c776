"""Every shipped configuration of a job: it parses, says how to run it and what to expect, and runs (made tiny)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import pytest

pytest.importorskip("pydantic", reason="needs the packages of jpeft[train]")

from cli import tinyjob
from cli.tinyjob import Tiny

from jpeft.cli import config, runs, tasks
from jpeft.cli.main import main
from jpeft.cli.rules import to_methods

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.stem.startswith("compare_"))
OBJECTIVES = {"minilm_ner": "token-classification", "minilm_embedding": "embedding", "smollm2_dpo": "preference"}
SMOL = [path for path in CONFIGS if path.stem.startswith("smollm2") and path.stem not in OBJECTIVES]
TRANSLIT = [path for path in CONFIGS if path.stem.startswith("translit")]
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
    job = config.load(path)
    devices = 1 if job.mesh is None else math.prod(job.mesh.axes.values())
    launch = f"launch --processes 1 --devices-per-process {devices} -- " if devices > 1 else ""
    assert first == f"# jpeft {launch}train {path.relative_to(ROOT)}"
    assert second.startswith("# Expect: ")
    assert second.endswith(".")
    assert job.name == path.stem
    assert job.model.sha256 or not str(job.model.source).startswith("pypi:")
    assert job.data.sha256


@pytest.mark.parametrize("path", QUICK, ids=lambda path: path.stem)
def test_quickstarts_differ_in_the_method_alone(path: Path) -> None:
    job, other = config.load(path), config.load(ROOT / "configs" / "quickstart.yaml")
    assert {p.partition(".")[0] for p in job.differences(other)} <= {"rules", "train"}
    assert [p for p in job.differences(other) if p.startswith("train.")] in ([], ["train.learning_rate"])
    names = {type(method).__name__ for method in to_methods(job.rules).values()}
    assert names <= {METHODS[path.stem.rpartition("_")[2]], "Full"}
    assert METHODS[path.stem.rpartition("_")[2]] in names


@pytest.mark.parametrize("path", [
    pytest.param(path, id=path.stem, marks=() if path.stem == "quickstart" else pytest.mark.slow)
    for path in QUICK])
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


@pytest.mark.slow
def test_the_sharded_job_runs_for_two_steps(tiny: Tiny, tmp_path: Path) -> None:
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    assert main(["train", str(ROOT / "configs" / "minilm_sharded.yaml"), *tiny.settings(tmp_path, "train.steps=2"),
                 "--set", "train.epochs=null"]) == 0
    summary = runs.summary(tmp_path / "minilm_sharded")
    assert summary is not None
    assert (summary.steps, summary.mesh) == (2, {"fsdp": 4, "tensor": 2})
    assert summary.device_bytes["base"] < summary.model_bytes / 2


def test_the_jobs_of_language_models_are_there() -> None:
    assert {path.stem.partition("_")[2] for path in SMOL} == {"shakespeare", "sentiment", "asdiv"}
    assert {path.stem.partition("_")[2] for path in TRANSLIT} == {"pretrain", "seq2seq", "prefix"}


@pytest.mark.parametrize("path", SMOL, ids=lambda path: path.stem)
def test_smollm2_learns_by_lora_on_all_linear_weights(path: Path) -> None:
    job = config.load(path)
    assert job.rules == {"all-linear": {"method": "LoRA", "rank": 16, "alpha": 32}}
    assert job.train.learning_rate == 1e-3
    if job.data.format != "text":
        assert (job.data.chat, job.data.default_system) == (True, False)
        assert (job.data.test, job.test.generate.rows) == (300, 300)


def test_the_same_names_are_held_out_in_pretraining_and_after() -> None:
    jobs = [config.load(path) for path in TRANSLIT]
    assert len({(job.data.source, job.data.seed, job.data.test, job.data.write, tuple(job.data.kinds))
                for job in jobs}) == 1
    pretrain = next(job for job in jobs if job.name == "translit_pretrain")
    assert {job.model.source for job in jobs if job is not pretrain} == {
        str((Path(pretrain.output) / str(pretrain.name) / runs.MODEL).absolute())}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_jobs_of_other_objectives_are_there(name: str) -> None:
    assert tasks.name(config.load(ROOT / "configs" / f"{name}.yaml")) == OBJECTIVES[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_other_objectives_run_for_two_steps(name: str, tmp_path: Path) -> None:
    sets = ["train.steps=2", "train.epochs=null", "train.eval_every=2", "train.batch_size=2", "data.test=4",
            "data.validation=4", f"output={tmp_path}"]
    assert main(["train", str(ROOT / "configs" / f"{name}.yaml"), *(w for one in sets for w in ("--set", one))]) == 0
    summary = runs.summary(tmp_path / name)
    assert summary is not None
    assert summary.task == OBJECTIVES[name]
    assert summary.test["loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("path", SMOL[1:], ids=lambda path: path.stem)  # the first is as the second
def test_smollm2_runs_for_two_steps(path: Path, tmp_path: Path) -> None:
    sets = ["train.steps=2", "train.eval_every=2", "train.batch_size=2", "test.generate.rows=2",
            "test.generate.batch_size=2", "test.generate.max_new_tokens=4", f"output={tmp_path}"]
    if config.load(path).data.format == "text":
        sets += ["data.max_length=64", "data.test_windows=2", "data.validation_windows=2"]
    else:
        sets += ["data.max_length=192", "data.test=4", "data.validation=4"]
    assert main(["train", str(path), *(word for one in sets for word in ("--set", one))]) == 0
    summary = runs.summary(tmp_path / path.stem)
    assert summary is not None
    assert summary.test["loss"] < summary.before["loss"]
    assert (tmp_path / path.stem / runs.SAMPLES).is_file()


@pytest.mark.slow
def test_translit_goes_from_random_weights_to_lora_and_prefix(tmp_path: Path) -> None:
    few = ["train.steps=2", "train.eval_every=2", "train.batch_size=8", "test.generate.rows=4",
           "test.generate.batch_size=4", f"output={tmp_path}"]
    for name in ("pretrain", "seq2seq", "prefix"):
        more = [] if name == "pretrain" else [f"model.source={tmp_path / 'translit_pretrain' / runs.MODEL}"]
        words = [word for one in (*few, *more) for word in ("--set", one)]
        assert main(["train", str(ROOT / "configs" / f"translit_{name}.yaml"), *words]) == 0
        summary = runs.summary(tmp_path / f"translit_{name}")
        assert summary is not None
        assert summary.test["answers"] == 4
