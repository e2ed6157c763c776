"""metrics.jsonl, the plot, the summary and the memory."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.errors import ReportError
from jpeft.train import memory, report
from jpeft.train.loop import Best, FitResult
from jpeft.train.metrics import JsonLines, read
from jpeft.train.state import TrainState

PNG = b"\x89PNG\r\n\x1a\n"
ROWS = [{"step": n, "loss": 1 / n, "correct": 3.0, "count": 4.0} for n in range(1, 70)] + [
    {"step": 69, "eval/loss": 0.5, "eval/accuracy": 0.75}]


def filled(path, rows):
    hook = JsonLines(path)
    hook.start(9, 0)
    for n in rows:
        hook.step(n, {"loss": 0.1 * n}, 0.0, 1)
    hook.close()
    return hook


def test_numbers_are_exact_and_missing_ones_are_null(tmp_path):
    hook = JsonLines(tmp_path / "deep" / "m.jsonl")
    hook.start(9, 0)
    value = float(np.float32(0.1))
    hook.step(1, {"loss": value, "odd": float("nan")}, 0.0, 1)
    hook.evaluated(1, {"accuracy": 1 / 3})
    hook.saving(1)
    assert read(hook.path) == [{"step": 1, "loss": value, "odd": None}, {"step": 1, "eval/accuracy": 1 / 3}]
    hook.close()
    hook.close()


def test_resume_drops_what_comes_after(tmp_path):
    path = tmp_path / "m.jsonl"
    filled(path, range(1, 7))
    kept = path.read_bytes().splitlines(keepends=True)[:4]
    with open(path, "ab") as file:
        file.write(b'{"step": 7, "l')
    again = JsonLines(path)
    again.start(9, 4)
    again.close()
    assert path.read_bytes() == b"".join(kept)
    fresh = JsonLines(path)
    fresh.start(9, 0)
    fresh.close()
    assert path.read_bytes() == b""


def test_a_file_that_was_moved_away_begins_anew(tmp_path):
    hook = JsonLines(tmp_path / "m.jsonl")
    hook.start(9, 4)
    hook.step(5, {"loss": 1.0}, 0.0, 1)
    hook.close()
    assert read(hook.path) == [{"step": 5, "loss": 1.0}]


@pytest.mark.parametrize("line", [b"no json\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": "3"}\n', b"\xff\n"])
def test_damaged_lines(tmp_path, line):
    path = tmp_path / "m.jsonl"
    filled(path, [1, 2])
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(ReportError, match=r"line 3 of .* is no row of metrics"):
        read(path)
    with pytest.raises(ReportError, match=r"line 3 of .* is no row of metrics; restore the file, or move it away"):
        JsonLines(path).start(9, 3)


def test_files_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot be written"):
        JsonLines(tmp_path / "file" / "m.jsonl").start(9, 0)
    with pytest.raises(ReportError, match=r"cannot be read .*No such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(ReportError, match="cannot be written"):
        report.plot(ROWS, tmp_path / "file" / "plot.png")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk(tmp_path):
    hook = JsonLines(tmp_path / "m.jsonl")
    hook.start(9, 0)
    hook.close()
    hook._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(ReportError, match=r"cannot be written .No space left on device.; free space"):
        hook.step(1, {"loss": 1.0}, 0.0, 1)
    hook.close()


def test_plot(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert report.plot(path, tmp_path / "deep" / "plot.png").read_bytes().startswith(PNG)
    from_history = report.plot(ROWS, tmp_path / "other.png").read_bytes()
    assert from_history == (tmp_path / "deep" / "plot.png").read_bytes()
    assert report.plot(ROWS[:5], tmp_path / "few.png").read_bytes() != from_history
    assert report.plot(ROWS[-1:], tmp_path / "evaluation.png").read_bytes().startswith(PNG)
    with pytest.raises(ReportError, match="no metrics to plot"):
        report.plot([], tmp_path / "empty.png")


def test_plot_has_both_curves():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    report._lines(axes, "loss", report._series(ROWS, "loss"), report._series(ROWS, "eval/loss"))
    plain, mean, judged = axes.get_lines()
    assert len(plain.get_xdata()) == 69
    assert len(mean.get_xdata()) == 68
    np.testing.assert_allclose(mean.get_ydata()[0], (1 + 1 / 2) / 2)
    assert judged.get_xdata() == [69]


def test_summary(tmp_path):
    state = TrainState(jnp.int32(3), {"w": jnp.ones((2, 3)), "s": jnp.ones(())}, (), jax.random.key(0))
    history = [{"step": 3, "loss": 0.25}, {"step": 3, "eval/accuracy": 0.4}]
    result = FitResult(state, Best(2, {"accuracy": 0.5}), history, "interrupted", "")
    made = report.summarise(result, 9, base={"k": jnp.ones((5, 4))}, seconds=2.0, examples=100, notes=["one"])
    assert (made.steps, made.total_steps, made.stopped) == (3, 9, "interrupted")
    assert (made.best_step, made.best) == (2, {"accuracy": 0.5})
    assert (made.trainable_parameters, made.base_parameters, made.final) == (7, 20, {"loss": 0.25})
    assert made.examples_per_second == 50
    assert made.peak_host_bytes > 10_000_000
    made.write(tmp_path / "run" / "summary.json")
    assert report.Summary.read(tmp_path / "run" / "summary.json") == made
    (tmp_path / "bad.json").write_text('{"steps": 1}')
    with pytest.raises(ReportError, match="is no summary of a run"):
        report.Summary.read(tmp_path / "bad.json")
    empty = report.summarise(FitResult(state, None, [], "finished", ""), 3)
    assert (empty.best_step, empty.best, empty.final, empty.examples_per_second) == (None, {}, {}, 0.0)


def test_peak_memory_rises():
    """In a process of its own, whose peak is not yet that of other tests."""
    code = (
        "import numpy as np; from jpeft.train import memory; before = memory.peak_memory().host;"
        "block = np.ones((before + 50_000_000) // 8); print(memory.peak_memory().host - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 40_000_000


def test_step_memory():
    x = jnp.ones((64, 64))
    found = memory.step_memory(jax.jit(lambda a, b: (a @ b, a.sum())), x, x)
    assert found.arguments == 2 * 64 * 64 * 4
    assert found.outputs >= 64 * 64 * 4 + 4
    assert found.aliased == 0
    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    donated = memory.step_memory(jax.jit(lambda a: a + 1, donate_argnums=0), shape)
    assert donated.aliased == 64 * 64 * 4
