"""TensorBoard's files and the profiler's window."""

import sys

import jax.numpy as jnp
import pytest

from jpeft.errors import ReportError, TrainConfigError
from jpeft.train.profile import Profile
from jpeft.train.tensorboard import TensorBoard


def events(folder):
    """Return step, tag and value of all that the files hold, and the steps from which on older ones do not count."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2", reason="needs tensorboardX")
    rows, purged = [], []
    for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")  # a record: length, its checksum, the event, its checksum
            event = event_pb2.Event.FromString(data[12:12 + size])
            data = data[12 + size + 4:]
            rows += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            purged += [event.step] if event.HasField("session_log") else []
    return rows, purged


def test_tensorboard_has_every_metric(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    for at, loss in ((0, 0.5), (2, 0.25)):
        hook = TensorBoard(tmp_path)
        hook.start(9, at)
        hook.step(at + 1, {"loss": loss, "grad_norm": float("inf")}, 0.5, 8)
        hook.evaluated(at + 1, {"accuracy": 0.75})
        hook.saving(at + 1)
        hook.close()
    rows, purged = events(tmp_path)
    assert rows == [(1, "train/loss", 0.5), (1, "train/examples_per_second", 16.0), (1, "eval/accuracy", 0.75),
                    (3, "train/loss", 0.25), (3, "train/examples_per_second", 16.0), (3, "eval/accuracy", 0.75)]
    assert purged == [3]


def test_without_tensorboardx_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ReportError, match=r"need tensorboardX; pip install 'jpeft\[tensorboard\]'"):
        TensorBoard(tmp_path)


@pytest.mark.parametrize(("start", "at", "traced"), [(3, 0, True), (1, 0, True), (3, 2, True), (3, 3, False)])
def test_the_profile_holds_its_window(tmp_path, monkeypatch, start, at, traced):
    said = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: said.append(("begin", folder)))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: said.append(("end",)))
    hook = Profile(tmp_path, start, 2)
    hook.start(9, at)
    for n in range(at + 1, 10):
        hook.step(n, {}, 0.1, 1)
        said.append(n)
    hook.close()
    # Step n is reported when step n + 1 has begun: to see the first step whole, one begins two reports before.
    steps = list(range(at + 1, 10))
    if not traced:
        assert said == steps
        return
    begin, end = said.index(("begin", str(tmp_path))), said.index(("end",))
    assert not [n for n in said[:begin] if n >= start - 1]
    assert said[end + 1] == start + 1
    assert [n for n in said if isinstance(n, int)] == steps


def test_a_profile_that_cannot_be(tmp_path):
    with pytest.raises(TrainConfigError, match="a profile of 0 steps from step 1 on is none"):
        Profile(tmp_path, 1, 0)
    with pytest.raises(TrainConfigError, match="the profile ends with step 12 and the training with step 9"):
        Profile(tmp_path, 10, 3).start(9, 0)


def test_a_profile_that_a_failing_run_cuts_short_is_written(tmp_path):
    hook = Profile(tmp_path, 1, 5)
    hook.start(9, 0)
    (jnp.ones(3) * 2).block_until_ready()
    hook.close()
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1
