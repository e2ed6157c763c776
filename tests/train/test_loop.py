"""The loop: what is reported and saved, how it stops, and that a resumed run is the uninterrupted one, bit by bit."""

import itertools
import math
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train.tinyjob import Job, bits

from jpeft.errors import (
    BatchesError,
    CheckpointMismatchError,
    CheckpointOrderError,
    CheckpointWriteError,
    NonFiniteLossError,
    ReportError,
    TrainConfigError,
    WrongBaseError,
)
from jpeft.train import losses, manifest, metrics
from jpeft.train import state as states
from jpeft.train.checkpoint import Checkpoints
from jpeft.train.hooks import Hook
from jpeft.train.loop import fit
from jpeft.train.step import compiled_step

TOTAL = 22


class Log:
    """A hook that records every call."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, event):
        if event not in ("start", "step", "evaluated", "saving", "saved", "end", "close"):
            raise AttributeError(event)
        return lambda *args: self.calls.append((event, *args[:1]))


class At:
    """A hook that acts when a step is reported."""

    def __init__(self, n, act):
        self.n, self.act = n, act

    def step(self, n, *rest):
        if n == self.n:
            self.act()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its result, its job and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    job = Job(folder, TOTAL)
    return job.fit(), job, folder


def lines(folder):
    return (folder / "metrics.jsonl").read_bytes()


def assert_same_run(result, job, folder, whole):
    theirs, their_job, their_folder = whole
    assert bits(result.state) == bits(theirs.state)
    assert result.best == theirs.best
    assert lines(folder) == lines(their_folder)
    assert job.batches.get_state() == their_job.batches.get_state()
    ours = job.checkpoints.restore(job.state)
    assert bits(ours.state) == bits(theirs.state)
    assert (ours.step, ours.extra["best"]["step"]) == (TOTAL, theirs.best.step)


def test_rows_are_complete_and_learning_happens(whole):
    result, job, folder = whole
    rows = metrics.read(folder / "metrics.jsonl")
    assert rows == result.history
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, TOTAL + 1))
    assert [row["step"] for row in rows if "eval/loss" in row] == [6, 12, 18, 22]
    trained = [row["loss"] for row in rows if "loss" in row]
    assert np.mean(trained[-5:]) < np.mean(trained[:5])
    assert job.checkpoints.steps() == [20, 22]
    assert result.stopped == "finished"
    assert result.message == f"finished 22 steps; the last checkpoint is in {folder / 'checkpoints'}"


def test_dropout_differs_from_step_to_step():
    """With equal batches and parameters that do not move, only the dropout differs."""
    job, tx = Job(None, TOTAL), optax.set_to_zero()
    one = next(job.batches)
    state = states.create(jax.tree.map(lambda x: jnp.full_like(x, 0.3), job.state.trainable), tx, jax.random.key(0))
    step = compiled_step(losses.classification(job.apply), tx, donate=False)
    found = []
    for _ in range(3):
        state, values = step(state, job.frozen, one)
        found.append(float(values["loss"]))
    assert len(set(found)) == 3
    assert float(step(state._replace(step=jnp.int32(1)), job.frozen, one)[1]["loss"]) == found[1]


@pytest.mark.parametrize("stop", [1, 4, 6, 13])
def test_interrupted_and_resumed_is_the_uninterrupted_run(whole, tmp_path, stop):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    first = Job(tmp_path, TOTAL)
    number = signal.SIGINT if stop % 2 else signal.SIGTERM
    halves = first.fit(hooks=[At(stop, lambda: os.kill(os.getpid(), number))])
    at = int(halves.state.step)
    assert halves.stopped == "interrupted"
    assert stop <= at <= stop + 1
    assert halves.message == (f"stopped by {signal.Signals(number).name} after step {at} of {TOTAL}, saved in "
                              f"{tmp_path / 'checkpoints'}; resume to go on")
    assert first.checkpoints.latest() == at
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    second = Job(tmp_path, TOTAL)
    assert second.resume() == at
    assert_same_run(second.fit(), second, tmp_path, whole)


@pytest.mark.parametrize("stop", [5, 7, 20, 21])
def test_a_crash_loses_only_the_steps_since_the_checkpoint(whole, tmp_path, stop):
    def crash():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Job(tmp_path, TOTAL).fit(hooks=[At(stop, crash)])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 22, "lo')
    second = Job(tmp_path, TOTAL)
    assert second.resume() == (stop - 1) // 4 * 4
    assert_same_run(second.fit(), second, tmp_path, whole)


def test_after_a_damaged_checkpoint_the_one_before_leads_to_the_same_end(whole, tmp_path):
    Job(tmp_path, TOTAL).fit(hooks=[At(13, lambda: os.kill(os.getpid(), signal.SIGINT))])
    newest = Job(tmp_path, TOTAL).checkpoints.latest()
    data = next((tmp_path / "checkpoints" / str(newest) / "arrays" / "d").iterdir())
    os.truncate(data, data.stat().st_size // 2)
    second = Job(tmp_path, TOTAL)
    assert second.resume() == 12
    assert f"the checkpoint of step {newest} is damaged" in second.notes[0]
    assert_same_run(second.fit(), second, tmp_path, whole)


def test_a_second_signal_ends_the_run_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    job = Job(tmp_path, TOTAL)
    log = Log()
    with pytest.raises(KeyboardInterrupt):
        job.fit(hooks=[At(5, twice), log])
    assert job.checkpoints.latest() == 4
    assert log.calls[-1] == ("close",)


def test_signals_that_the_caller_ignores_stay_ignored(tmp_path):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        result = Job(tmp_path, TOTAL).fit(hooks=[At(3, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.stopped == "finished"


def test_a_signal_at_the_last_step_is_a_finished_run(tmp_path):
    def evaluate(trainable):
        os.kill(os.getpid(), signal.SIGINT)
        return {"accuracy": 1.0}

    state, step = plain()
    result = fit(step, state, None, itertools.repeat(jnp.ones(2)), total_steps=3, evaluate=evaluate)
    assert result.stopped == "finished"


def test_interrupted_without_checkpoints_says_so():
    state, step = plain()
    result = fit(step, state, None, itertools.repeat(jnp.ones(2)), total_steps=9,
                 hooks=[At(2, lambda: os.kill(os.getpid(), signal.SIGINT))])
    assert result.message == "stopped by SIGINT after step 3 of 9, and nothing is saved; pass checkpoints"


def test_runs_in_a_thread():
    found = []
    state, step = plain()
    thread = threading.Thread(
        target=lambda: found.append(fit(step, state, None, itertools.repeat(jnp.ones(2)), total_steps=3)))
    thread.start()
    thread.join()
    assert found[0].stopped == "finished"


def plain(loss=None, tx=None):
    tx = tx or optax.sgd(0.1)
    loss = loss or (lambda t, frozen, batch, key: (jnp.sum((t["w"] - batch) ** 2), {}))
    return states.create({"w": jnp.zeros(2)}, tx, jax.random.key(0)), compiled_step(loss, tx)


class Counted:
    """Batches `0, 1, 2, ...`; some of them not numbers."""

    def __init__(self, bad=()):
        self.n, self.bad = 0, bad

    def __next__(self):
        self.n += 1
        return np.full(2, np.nan if self.n in self.bad else self.n, np.float32)

    def get_state(self):
        return self.n

    def set_state(self, n):
        self.n = n


@pytest.mark.parametrize(("bad", "kept"), [(7, 6), (6, 3), (1, None)])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, bad, kept):
    state, step = plain()
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    log = Log()
    left = "there is no checkpoint" if kept is None else f"the last good checkpoint, of step {kept}, is in {tmp_path}"
    with pytest.raises(NonFiniteLossError, match=f"loss is nan and grad_norm is nan after step {bad}; lower.*; {left}"):
        fit(step, state, None, Counted([bad]), total_steps=20, save_every=3, checkpoints=checkpoints,
            hooks=[metrics.JsonLines(tmp_path / "m.jsonl"), log])
    assert checkpoints.latest() == kept
    assert [n for event, *n in log.calls if event == "step"] == [[n] for n in range(1, bad)]
    assert len(metrics.read(tmp_path / "m.jsonl")) == bad - 1
    if kept is None:
        return
    restored = Checkpoints(tmp_path / "c").restore(plain()[0])
    assert np.isfinite(restored.state.trainable["w"]).all()
    clean = Counted()
    state, step = plain()
    for _ in range(kept):
        state, _ = step(state, None, next(clean))
    assert bits(restored.state) == bits(state)


def test_a_gradient_that_is_no_number_stops_the_run():
    state, step = plain(lambda t, frozen, batch, key: (jnp.sqrt(t["w"]).sum(), {}))
    with pytest.raises(NonFiniteLossError, match="grad_norm is inf after step 1"):
        fit(step, state, None, Counted(), total_steps=2)


def test_parameters_that_are_no_numbers_are_not_saved(tmp_path):
    """The loss and the gradient are fine, and the update is not."""
    broken = optax.stateless(lambda g, p: jax.tree.map(lambda x: x * jnp.nan, g))
    state, step = plain(tx=broken)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(NonFiniteLossError, match="trainable/w is not finite after step 1, which is not saved"):
        fit(step, state, None, Counted(), total_steps=3, save_every=1, checkpoints=checkpoints)
    assert checkpoints.steps() == []


def test_an_evaluation_that_is_no_number_stops_the_run(tmp_path):
    state, step = plain()
    best = []
    with pytest.raises(NonFiniteLossError, match="loss is nan in the evaluation after step 2"):
        fit(step, state, None, Counted(), total_steps=4, eval_every=2, save_every=2, checkpoints=Checkpoints(tmp_path),
            evaluate=lambda t: {"accuracy": 1.0, "loss": math.nan}, on_best=lambda *args: best.append(args))
    assert best == []
    assert Checkpoints(tmp_path).steps() == []


@pytest.mark.parametrize(("bad", "kept"), [(6, "2, 4"), (8, "4, 6")])
def test_full_disk_ends_the_run_with_what_was_saved(tmp_path, monkeypatch, bad, kept):
    """Also in the last checkpoint, which is written when all steps are done."""
    state, step = plain()
    checkpoints, log = Checkpoints(tmp_path), Log()
    real = manifest.write

    def full(folder, record):
        if record["step"] == bad:
            raise OSError(28, "No space left on device")
        real(folder, record)

    monkeypatch.setattr(manifest, "write", full)
    with pytest.raises(CheckpointWriteError, match=f"step {bad} cannot be written .*No space left.*intact: {kept}"):
        fit(step, state, None, Counted(), total_steps=8, save_every=2, checkpoints=checkpoints, hooks=[log])
    assert checkpoints.restore(plain()[0]).step == bad - 2
    assert [n for event, *n in log.calls if event == "saved"] == [[n] for n in range(2, bad, 2)]
    assert log.calls[-1] == ("close",)


def test_a_failed_write_goes_with_the_error_that_ends_the_run(tmp_path, monkeypatch):
    def full(folder, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write", full)
    state, step = plain()
    with pytest.raises(NonFiniteLossError, match=r"after step 3; .*; there is no checkpoint") as caught:
        fit(step, state, None, Counted([3]), total_steps=8, save_every=2, checkpoints=Checkpoints(tmp_path))
    assert "the checkpoint of step 2 cannot be written" in caught.value.__notes__[0]


def tiring(tmp_path, scores, total, **options):
    state, step = plain()
    checkpoints = Checkpoints(tmp_path)
    restored, batches = checkpoints.restore(state), Counted()
    if restored is not None:
        state = restored.state
        batches.set_state(restored.data_position)
    left = iter(scores[int(state.step):])
    return fit(step, state, None, batches, total_steps=total, eval_every=1, save_every=1, checkpoints=checkpoints,
               evaluate=lambda t: {"accuracy": next(left)}, **options)


def test_patience_ends_the_run_also_after_a_resume(tmp_path):
    scores = [0.1, 0.5, 0.4, 0.5, 0.6, 0.6, 0.2, 0.3, 0.9]
    whole = tiring(tmp_path / "a", scores, 9, patience=3)
    assert (whole.stopped, int(whole.state.step), whole.best.step) == ("early", 8, 5)
    assert whole.message == ("stopped early after step 8 of 9: accuracy has not got better in 3 evaluations since "
                             "step 5")
    tiring(tmp_path / "b", scores, 7)
    again = tiring(tmp_path / "b", scores, 9, patience=3)
    assert (again.stopped, int(again.state.step), again.best) == ("early", 8, whole.best)
    assert bits(again.state) == bits(whole.state)
    once_more = tiring(tmp_path / "b", scores, 9, patience=3)
    assert (once_more.stopped, once_more.history) == ("early", []), "it has ended, and stays so"
    assert tiring(tmp_path / "c", scores, 8, patience=4).stopped == "finished"


def test_patience_without_evaluations_is_an_error():
    state, step = plain()
    with pytest.raises(TrainConfigError, match="patience = 2 evaluations and there is no evaluate"):
        fit(step, state, None, Counted(), total_steps=3, patience=2)


def test_batches_that_do_not_come_end_the_run(tmp_path):
    class Stalled(Counted):
        def __next__(self):
            if self.n == 3:
                threading.Event().wait(60)
            return super().__next__()

    state, step = plain()
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(BatchesError, match=r"Stalled has given no batch for 0\.5 s; .* \(train\.data_timeout"):
        fit(step, state, None, Stalled(), total_steps=5, save_every=1, checkpoints=checkpoints, data_timeout=0.5)
    assert checkpoints.latest() == 3
    whole, timed = (fit(step, plain()[0], None, Counted(), total_steps=3, data_timeout=t) for t in (None, 60.0))
    assert bits(whole.state) == bits(timed.state)
    with pytest.raises(BatchesError, match="the batches end before step 3 of 4"):
        fit(step, plain()[0], None, iter(np.ones((2, 2))), total_steps=4, data_timeout=60.0)


@pytest.mark.parametrize(("mode", "monitor", "steps"), [
    ("max", "accuracy", [1, 2, 4]), ("min", "loss", [1, 3, 4]), ("min", "accuracy", [1]),
])
def test_best(mode, monitor, steps):
    scores = iter([{"accuracy": 0.1, "loss": 5}, {"accuracy": 0.4, "loss": 5}, {"accuracy": 0.4, "loss": 4},
                   {"accuracy": 0.5, "loss": 3}])
    found = []
    state, step = plain()
    result = fit(step, state, None, Counted(), total_steps=4, eval_every=1, evaluate=lambda t: next(scores), mode=mode,
                 monitor=monitor, on_best=lambda t, m, n: found.append((n, np.array(t["w"]), m)))
    assert [n for n, *_ in found] == steps
    assert result.best.step == steps[-1]
    assert result.best.metrics == found[-1][2]
    plain_state, plain_step = plain()
    batches = Counted()
    for n in range(1, found[-1][0] + 1):
        plain_state, _ = plain_step(plain_state, None, next(batches))
        if n == found[-1][0]:
            assert np.array_equal(plain_state.trainable["w"], found[-1][1])


def test_best_is_remembered_over_a_resume(tmp_path):
    scores = {2: 0.9, 4: 0.5, 6: 0.6}
    found = []

    def run(total, **options):
        state, step = plain()
        batches, checkpoints = Counted(), Checkpoints(tmp_path)
        restored = checkpoints.restore(state)
        if restored is not None:
            state = restored.state
            batches.set_state(restored.data_position)
        at = itertools.count(int(state.step) + 2, 2)
        return fit(step, state, None, batches, total_steps=total, eval_every=2, checkpoints=checkpoints,
                   evaluate=lambda t: {"accuracy": scores[next(at)]}, on_best=lambda t, m, n: found.append(n))

    run(2)
    result = run(6)
    assert found == [2]
    assert result.best == (2, {"accuracy": 0.9})


def test_hooks_are_told_in_order():
    state, step = plain()
    log, seen = Log(), []

    class Some(Hook):
        def step(self, n, metrics, seconds, examples):
            seen.append((n, sorted(metrics), seconds > 0, examples))

    fit(step, state, None, Counted(), total_steps=3, eval_every=2, evaluate=lambda t: {"accuracy": 1.0},
        hooks=[log, Some()])
    assert log.calls == [("start", 3), ("step", 1), ("step", 2), ("evaluated", 2), ("step", 3), ("evaluated", 3),
                         ("end", log.calls[-2][1]), ("close",)]
    assert seen == [(n, ["grad_norm", "loss"], True, 2) for n in (1, 2, 3)]


def test_a_run_that_is_done_does_nothing(tmp_path):
    job = Job(tmp_path, TOTAL)
    done = job.fit()
    before = lines(tmp_path)
    again = Job(tmp_path, TOTAL)
    assert again.resume() == TOTAL
    result = again.fit()
    assert (result.stopped, result.history, result.best) == ("finished", [], done.best)
    assert lines(tmp_path) == before


def test_metrics_are_safe_before_the_checkpoint_is(tmp_path):
    state, step = plain()
    checkpoints = Checkpoints(tmp_path / "c")
    seen = []
    real = checkpoints.save

    def save(n, *args, **options):
        seen.append([row["step"] for row in metrics.read(tmp_path / "m.jsonl")])
        real(n, *args, **options)

    checkpoints.save = save
    fit(step, state, None, Counted(), total_steps=5, save_every=2, checkpoints=checkpoints,
        hooks=[metrics.JsonLines(tmp_path / "m.jsonl")])
    assert seen == [[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5]]


def test_a_new_run_in_an_old_folder_is_an_error(tmp_path):
    Job(tmp_path, TOTAL).checkpoints.save(4, Job(tmp_path, TOTAL).state)
    with pytest.raises(CheckpointOrderError, match="holds a checkpoint of step 4 and this run is at step 0; resume"):
        Job(tmp_path, TOTAL).fit()


def test_resuming_with_another_model_is_an_error(tmp_path):
    Job(tmp_path, TOTAL).checkpoints.save(4, Job(tmp_path, TOTAL).state)
    with pytest.raises(WrongBaseError, match="resume with the model that the run began with"):
        Job(tmp_path, TOTAL, base_seed=1).resume()
    with pytest.raises(CheckpointMismatchError, match=r"trainable/down/a is float32.* and .* in this run"):
        Job(tmp_path, TOTAL, rank=1).resume()


def test_metrics_that_lag_behind_the_checkpoint_are_an_error(tmp_path):
    Job(tmp_path, TOTAL).fit(hooks=[At(8, lambda: os.kill(os.getpid(), signal.SIGINT))])
    kept = lines(tmp_path).splitlines(keepends=True)[:5]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(kept))
    job = Job(tmp_path, TOTAL)
    at = job.resume()
    with pytest.raises(ReportError, match=f"ends at step 5 and the run resumes from {at}; move the file away"):
        job.fit()


@pytest.mark.parametrize(("options", "error", "text"), [
    ({"total_steps": 0}, TrainConfigError, "total_steps = 0 must be 1 or more"),
    ({"eval_every": 0}, TrainConfigError, "eval_every = 0 must be"),
    ({"save_every": -3}, TrainConfigError, "save_every = -3 must be"),
    ({"patience": 0}, TrainConfigError, "patience = 0 must be 1 or more"),
    ({"data_timeout": 0.0}, TrainConfigError, r"data_timeout = 0\.0 must be above 0"),
    ({"mode": "best"}, TrainConfigError, "mode = 'best' must be 'max' or 'min'"),
    ({"hooks": [print]}, TrainConfigError, "the hook builtin_function_or_method has none of the methods start, step"),
    ({"evaluate": lambda t: {"acuracy": 1.0}}, TrainConfigError, r"no metric 'accuracy' \(nearest: 'acuracy'\); set"),
    ({"batches": iter([jnp.ones(2)])}, BatchesError, "the batches end before step 2 of 3"),
    ({"batches": itertools.repeat(1), "checkpoints": Checkpoints("nowhere")}, BatchesError, r"repeat has no get_state"),
])
def test_arguments_that_make_no_sense(options, error, text):
    state, step = plain()
    with pytest.raises(error, match=text):
        fit(step, state, None, options.pop("batches", Counted()), **{"total_steps": 3, **options})


def test_a_state_beyond_the_end():
    state, step = plain()
    with pytest.raises(TrainConfigError, match="the state is at step 5, beyond total_steps = 3"):
        fit(step, state._replace(step=jnp.int32(5)), None, Counted(), total_steps=3)
