"""Jobs on a mesh and in several processes: the losses of one device, checkpoints for any number, a clear end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest
from cli import tinylm
from cli.tinylm import TinyLm
from jax.sharding import PartitionSpec as P
from support import distance

from jpeft.cli import config, launch, meshes, runs
from jpeft.cli.main import main
from jpeft.cli.meshes import MeshConfig
from jpeft.errors import ConfigError

STEPS = 6
LAYOUTS = {"DP": "{data: 8}", "FSDPxTP": "{fsdp: 4, tensor: 2}", "sequence": "{fsdp: 2, sequence: 2}"}
needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> TinyLm:
    return tinylm.make(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, lm: TinyLm) -> Path:
    """A folder with a configuration: LoRA with dropout, six steps of eight rows, a checkpoint every second."""
    folder = tmp_path_factory.mktemp("home")
    text = lm.config(tinylm.PAIRS, f"output: {folder / 'runs'}")
    text = text.replace("alpha: 4}", "alpha: 4, dropout: 0.1}").replace("steps: 4, batch_size: 2",
                                                                      f"steps: {STEPS}, batch_size: 8")
    (folder / "job.yaml").write_text(text)
    return folder


def rows(folder: Path) -> dict[int, list[float]]:
    """The losses of a run by step: that of training, that of the evaluation."""
    found: dict[int, list[float]] = {}
    for line in (folder / runs.METRICS).read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["step"], []).append(row["loss"] if "loss" in row else row["eval/loss"])
    return found


def same(one: Path, other: Path) -> None:
    """Check that two runs have the same losses, and the same end."""
    a, b = rows(one), rows(other)
    assert set(a) == set(b) == set(range(1, STEPS + 1))
    assert distance([x for step in sorted(a) for x in a[step]], [x for step in sorted(b) for x in b[step]]) <= 1e-5
    mine, theirs = runs.summary(one), runs.summary(other)
    assert mine is not None
    assert theirs is not None
    assert mine.test["loss"] == pytest.approx(theirs.test["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def alone(home: Path) -> Path:
    assert main(["train", str(home / "job.yaml"), "--name", "alone"]) == 0
    folder = home / "runs" / "alone"
    assert max(rows(folder)[1]) - min(rows(folder)[STEPS]) > 1e-2, "nothing was learnt"
    return folder


@needs_eight
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_on_a_mesh_are_those_of_one_device(layout: str, home: Path, alone: Path, capsys: Any) -> None:
    assert main(["train", str(home / "job.yaml"), "--name", layout, "--set", f"mesh={LAYOUTS[layout]}"]) == 0
    folder = home / "runs" / layout
    same(folder, alone)
    said = capsys.readouterr().out
    assert f"mesh: {meshes.words(config.load(folder / runs.CONFIG).mesh)}: " in said
    found = runs.summary(folder)
    assert found is not None
    assert found.device_bytes["base"] < (1 if layout == "DP" else 0.7) * found.model_bytes + 1
    assert main(["eval", str(folder)]) == 0
    assert f"loss {found.test['loss']:.4f}" in capsys.readouterr().out


# --- several processes ---

def launched(processes: int, devices: int, home: Path, *words: str) -> subprocess.Popen[str]:
    """Start a job in several processes."""
    command = [sys.executable, "-m", "jpeft.cli.main", "launch", "--processes", str(processes), "--devices-per-process",
               str(devices), "--", "train", str(home / "job.yaml"), *words]
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def ended(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """Wait for the end; return what was said."""
    out, err = process.communicate(timeout=900)
    assert process.returncode == code, err[-3000:]
    return out, err


DIVIDED = ("--set", "mesh={fsdp: 4, tensor: 2, replicate_below: 0}")


@pytest.fixture(scope="module")
def four(home: Path) -> Path:
    out, _ = ended(launched(4, 2, home, "--name", "four", *DIVIDED))
    assert "[0] mesh: fsdp=4, tensor=2: 8 devices of 4 processes" in out
    assert not re.search(r"^\[[1-3]\]", out, re.MULTILINE), "a process besides the first one prints"
    return home / "runs" / "four"


@pytest.mark.slow
def test_four_processes_are_one_device(four: Path, alone: Path) -> None:
    same(four, alone)
    assert {path.name for path in four.iterdir()} == {path.name for path in alone.iterdir()}
    found = runs.summary(four)
    assert found is not None
    assert (found.processes, found.mesh) == (4, {"fsdp": 4, "tensor": 2})
    assert found.device_bytes["adapters"] < 4 * found.trainable_parameters


@pytest.mark.slow
def test_two_processes_are_one_device(home: Path, alone: Path) -> None:
    ended(launched(2, 2, home, "--name", "two", "--set", "mesh={data: 2, fsdp: 2}"))
    same(home / "runs" / "two", alone)


@needs_eight
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_what_four_have_saved_fewer_go_on_with(processes: int, four: Path, home: Path, alone: Path) -> None:
    name = f"from_four_{processes}"
    folder = home / "runs" / name
    shutil.copytree(four, folder)
    (folder / runs.SUMMARY).unlink()
    shutil.rmtree(folder / runs.CHECKPOINTS / str(STEPS))
    words = ("--name", name, "--resume", "--set", "mesh={data: 2}")
    if processes == 1:
        assert main(["train", str(home / "job.yaml"), *words]) == 0
    else:
        ended(launched(2, 1, home, *words))
    same(folder, alone)
    found = runs.summary(folder)
    assert found is not None
    assert [note for note in found.notes if "begun on fsdp=4, tensor=2, goes on on data=2" in note]
    assert [note for note in found.notes if f"resumed after step {STEPS - 2}" in note]


@pytest.mark.slow
def test_one_of_them_is_killed(home: Path, alone: Path) -> None:
    """All end soon, in one line; the run goes on from its last checkpoint with the losses that it would have had."""
    process = launched(2, 1, home, "--name", "killed", "--set", "mesh={fsdp: 2}")
    assert process.stderr is not None
    first = process.stderr.readline()
    pids = [int(pid) for pid in re.findall(r"\d+", first.partition(":")[2])]
    assert len(pids) == 2
    folder, until = home / "runs" / "killed", time.monotonic() + 600
    while not (folder / runs.CHECKPOINTS / "2" / "jpeft.json").is_file():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "no checkpoint in ten minutes"
        time.sleep(0.01)
    os.kill(pids[1], signal.SIGKILL)
    _, err = ended(process, 1)
    assert err.splitlines()[-1] == ("error: process 1 of 2 was ended by SIGKILL, and the others with it; go on from "
                                    "the last checkpoint: the same command and --resume")
    assert runs.summary(folder) is None
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    ended(launched(2, 1, home, "--name", "killed", "--set", "mesh={fsdp: 2}", "--resume"))
    same(folder, alone)


@pytest.mark.slow
def test_all_of_them_stop_after_the_same_step(home: Path, alone: Path) -> None:
    words = ("--name", "stopped", "--set", "mesh={fsdp: 2}")
    process = launched(2, 1, home, *words)
    folder, until = home / "runs" / "stopped", time.monotonic() + 600
    while not (folder / runs.METRICS).is_file() or not rows(folder):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "no step in ten minutes"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = ended(process, 130)
    assert re.search(r"\[0\] stopped by SIGTERM after step \d of 6, saved in ", err)
    ended(launched(2, 1, home, *words, "--resume"))
    same(folder, alone)


@pytest.mark.slow
def test_mistakes_of_several_processes_end_them(home: Path) -> None:
    _, err = ended(launched(2, 1, home, "--name", "none"), 1)
    assert "[0] error: 2 processes run a job without a mesh section, which says what each of them has; add --set " \
        "mesh.data=2" in err
    _, err = ended(launched(2, 2, home, "--name", "none", "--set", "mesh={fsdp: 2}"), 1)
    assert "error: the mesh {'fsdp': 2} has 2 devices, the 2 processes have 4; divide over all of them" in err
    assert not (home / "runs" / "none").exists()


# --- the section, and the command ---

def test_the_section_says_a_mesh() -> None:
    one = MeshConfig(tensor=2, data=3, rules={"head/.*": [None, ["fsdp", "data"]], ".*": []})
    assert list(one.axes.items()) == [("data", 3), ("tensor", 2)]
    assert one.specs == {"head/.*": P(None, ("fsdp", "data")), ".*": P()}
    assert one.rows == 3


@pytest.mark.parametrize(("mesh", "says"), [
    ("{fdsp: 8}", r"unknown key 'mesh.fdsp'; the nearest is 'mesh.fsdp'"),
    ("{fsdp: 0}", "mesh.fsdp = 0 should be greater than or equal to 1"),
    ("{}", "names no axis; give one of data, fsdp, expert, sequence, tensor a number"),
    ("{fsdp: 3}", r"train.batch_size = 8 rows are not divided by mesh.data x mesh.fsdp = 3 devices"),
])
def test_what_the_section_refuses(mesh: str, says: str, home: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        config.load(home / "job.yaml", [f"mesh={mesh}"])


def test_a_run_may_go_on_on_another_mesh(home: Path) -> None:
    plain, other = (config.load(home / "job.yaml", [f"mesh={mesh}"]) for mesh in ("null", "{fsdp: 4}"))
    assert plain.hash() == other.hash()
    assert not plain.differences(other)
    assert meshes.moved(plain.mesh, other.mesh) == [
        "begun on one device, goes on on fsdp=4: sums are taken in another order, so losses are the same to rounding, "
        "not bit by bit"]
    assert not meshes.moved(other.mesh, MeshConfig(fsdp=4, rules={".*": []}))


def test_too_few_devices(home: Path, capsys: Any) -> None:
    assert main(["train", str(home / "job.yaml"), "--name", "few", "--set", "mesh={tensor: 64}"]) == 1
    assert capsys.readouterr().err == (
        f"error: the mesh {{'tensor': 64}} has 64 devices, JAX has {jax.device_count()}; make it smaller, or simulate "
        "them: set XLA_FLAGS=--xla_force_host_platform_device_count=64 before JAX starts\n")
    assert not (home / "runs" / "few").exists()


def test_launch_runs_train_alone(capsys: Any) -> None:
    assert main(["launch", "--processes", "2", "--", "eval", "x"]) == 1
    assert "jpeft launch runs jpeft train, not 'eval'; write: jpeft launch --processes 2 -- train CONFIG" in \
        capsys.readouterr().err
    assert main(["launch", "--processes", "0", "--", "train", "x"]) == 2


def test_what_a_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--a=1 --xla_force_host_platform_device_count=8")
    env = launch.environment(1, 3, 2, 555)
    assert env["XLA_FLAGS"].split() == ["--a=1", "--xla_force_host_platform_device_count=2"]
    assert {name: env[name] for name in ("JPEFT_PROCESSES", "JPEFT_PROCESS", "JAX_COORDINATOR_ADDRESS",
                                         "JAX_LOCAL_DEVICE_IDS")} == {
        "JPEFT_PROCESSES": "3", "JPEFT_PROCESS": "1", "JAX_COORDINATOR_ADDRESS": "127.0.0.1:555",
        "JAX_LOCAL_DEVICE_IDS": "2,3"}


def test_distributed_alone(home: Path, capsys: Any) -> None:
    assert main(["train", str(home / "job.yaml"), "--distributed"]) == 1
    assert "error: --distributed found no other processes (" in capsys.readouterr().err


def test_a_run_is_read_where_there_are_fewer_devices(home: Path) -> None:
    job = config.load(home / "job.yaml", ["mesh={tensor: 64}"])
    fitting, notes = meshes.here(job)
    assert fitting.mesh is None
    assert notes == (f"the run's mesh, tensor=64, has more devices than the {jax.device_count()} here: on one of them",)
    assert meshes.here(fitting) == (fitting, ())
