"""A process that is killed at random moments, again and again, ends where an uninterrupted one does."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train import tinyjob

TOTAL, EVERY, KILLS = 240, 3, 20
PROGRAM = [sys.executable, tinyjob.__file__]


def start(folder: Path) -> tuple[subprocess.Popen, int]:
    """Start the program, wait until it trains, and return it with the step that it begins at."""
    process = subprocess.Popen([*PROGRAM, str(folder), str(TOTAL)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    word, at, *_ = process.stdout.readline().split()
    assert word == "at"
    return process, int(at)


def last_row(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Wait until the program has done a step, or has ended, however slow the machine is."""
    until = time.monotonic() + 300
    while process.poll() is None and last_row(folder) < step:
        assert time.monotonic() < until, f"not at step {step} in five minutes"
        time.sleep(0.005)


def finished(folder: Path) -> tuple[list, dict[str, int], bytes]:
    """Return the bits of the last checkpoint, its position in the data, and the metrics."""
    job = tinyjob.Job(folder, TOTAL)
    assert job.resume() == TOTAL
    return tinyjob.bits(job.state), job.batches.get_state(), (folder / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    process, at = start(folder)
    assert at == 0
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0
    return folder, json.loads(said)


@pytest.mark.slow
def test_killed_twenty_times_and_resumed_each_time(tmp_path, whole):
    moments, kills = random.Random(0), 0
    while kills < KILLS:
        process, at = start(tmp_path)
        # Counted in steps, so that a slow machine has as many deaths; zero may be before the first step.
        wait_for_step(process, tmp_path, at + moments.randrange(TOTAL // KILLS))
        time.sleep(moments.uniform(0.0, 0.05))
        assert process.poll() is None, "the program is too fast for this test: raise TOTAL"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        reached = last_row(tmp_path)
        newest = tinyjob.Job(tmp_path, TOTAL).resume()
        assert newest >= at
        assert reached - newest <= 2 * EVERY, "the last save may be under way, and no more than that"
    process, _ = start(tmp_path)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0
    assert {**json.loads(said), "message": ""} == {**whole[1], "message": ""}
    assert finished(tmp_path) == finished(whole[0])


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(tmp_path, whole):
    process, at = start(tmp_path)
    wait_for_step(process, tmp_path, at + 20)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    found = json.loads(said)
    assert found["stopped"] == "interrupted"
    assert found["message"].startswith("stopped by SIGINT after step ")
    process, at = start(tmp_path)
    assert f"after step {at} of" in found["message"]
    process.communicate(timeout=900)
    assert finished(tmp_path) == finished(whole[0])
