"""Checkpoints: bit by bit, whole or not at all, and never another run's."""

import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from train.tinyjob import Job, bits

from jpeft.errors import (
    CheckpointMismatchError,
    CheckpointOrderError,
    CheckpointWriteError,
    DamagedCheckpointsError,
    NonFiniteLossError,
    TrainConfigError,
    WrongBaseError,
)
from jpeft.train import manifest
from jpeft.train import state as states
from jpeft.train.checkpoint import Checkpoints
from jpeft.train.sharding import made_mesh


def make_state(step=0, rank=2, impl=None, tx=None):
    a = jax.random.normal(jax.random.key(step), (5, rank))
    theta = {
        "h/0~1w": {"a": a, "b": jnp.full((rank, 5), step, jnp.bfloat16)},
        "bias": {"b": jnp.arange(3.0, dtype=jnp.float16) + step}, "none": {"nothing": jnp.float32(step)},
        "empty": {"z": jnp.zeros((0, 3))},
    }
    tx = tx or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    made = states.create(theta, tx, jax.random.key(7 + step, impl=impl))
    return made._replace(step=jnp.int32(step))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the checkpoints of steps 10 and 20."""
    folder = tmp_path_factory.mktemp("written")
    checkpoints = Checkpoints(folder, keep=2, base="base-a", config_hash="c1")
    for step in (10, 20):
        checkpoints.save(step, make_state(step), {"given": step}, {"best": {"step": step, "loss": 0.1 + 0.2}})
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(written, tmp_path / "checkpoints"))


def opened(folder, **options):
    return Checkpoints(folder, **{"keep": 2, "base": "base-a", "config_hash": "c1", **options})


def test_what_comes_back_is_what_went_in(folder):
    found = opened(folder).restore(make_state())
    assert bits(found.state) == bits(make_state(20))
    assert jax.tree.structure(found.state) == jax.tree.structure(make_state())
    assert (found.step, found.data_position, found.notes) == (20, {"given": 20}, ())
    assert found.extra == {"best": {"step": 20, "loss": 0.1 + 0.2}}
    assert isinstance(found.state, states.TrainState)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg", "old"])
def test_keys_of_every_kind(tmp_path, impl):
    def with_key(seed):
        key = jax.random.PRNGKey(seed) if impl == "old" else jax.random.key(seed, impl=impl)
        return make_state(tx=optax.sgd(0.1))._replace(key=key)

    checkpoints = Checkpoints(tmp_path, base="b")
    checkpoints.save(1, with_key(5))
    key = checkpoints.restore(with_key(0)).state.key
    assert key.dtype == with_key(5).key.dtype
    assert jax.random.uniform(key) == jax.random.uniform(with_key(5).key)
    other = make_state(tx=optax.sgd(0.1), impl="rbg" if impl != "rbg" else None)
    with pytest.raises(CheckpointMismatchError, match=r"key is .* in the checkpoint"):
        checkpoints.restore(other)


def test_arrays_go_where_those_of_the_like_state_are(tmp_path):
    mesh = jax.make_mesh((2,), ("x",))
    spread = jax.NamedSharding(mesh, jax.P("x"))

    def made(value):
        return states.create({"w": jax.device_put(jnp.full(4, value), spread)}, optax.sgd(0.1), jax.random.key(0))

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, made(3.0))
    w = checkpoints.restore(made(0.0)).state.trainable["w"]
    assert w.sharding == spread
    assert w.tolist() == [3.0] * 4


def test_infinity_in_the_optimiser_is_kept(tmp_path):
    state = make_state()._replace(opt_state={"best": jnp.float32(jnp.inf)})
    Checkpoints(tmp_path).save(1, state)
    assert Checkpoints(tmp_path).restore(state).state.opt_state["best"] == jnp.inf


def test_no_checkpoints(tmp_path):
    assert Checkpoints(tmp_path / "none").restore(make_state()) is None
    assert Checkpoints(tmp_path / "none").steps() == []
    assert not (tmp_path / "none").exists()


def test_keeps_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 5, 30, 200):
        checkpoints.save(step, make_state(step))
    assert checkpoints.steps() == [30, 200]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["200", "30"]
    with pytest.raises(TrainConfigError, match="keep = 0"):
        Checkpoints(tmp_path, keep=0)


def test_base_parameters_are_not_written(tmp_path):
    job = Job(tmp_path, 2)
    job.checkpoints.save(1, job.state)
    held = [spec[0] for spec in json.loads((tmp_path / "checkpoints/1/jpeft.json").read_text())["arrays"]]
    assert {path.split("/")[0] for path in held} == {"step", "trainable", "opt_state", "key"}
    assert len(held) == len(jax.tree.leaves(job.state))


def files_of(folder):
    return sorted(p.relative_to(folder).as_posix() for p in (folder / "20").rglob("*") if p.is_file())


DAMAGE = {
    "halved": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "one bit": lambda path: path.write_bytes(flip(path.read_bytes())),
    "deleted": lambda path: path.unlink(),
}


def flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damaged_file_of_the_newest_is_noticed(written, tmp_path, damage):
    names = files_of(written)
    assert len(names) > 5
    for i, name in enumerate(names):
        folder = Path(shutil.copytree(written, tmp_path / str(i)))
        path = folder / name
        if damage == "emptied" and not path.stat().st_size:
            continue
        DAMAGE[damage](path)
        checkpoints = opened(folder)
        found = checkpoints.restore(make_state())
        assert (found.step, found.data_position) == (10, {"given": 10}), name
        assert bits(found.state) == bits(make_state(10)), name
        assert len(found.notes) == 1
        gone = damage == "deleted" and name.endswith(manifest.NAME)
        said = "was not completed and is not used" if gone else "is damaged and is not used"
        assert f"the checkpoint of step 20 {said}" in found.notes[0], name
        assert "\n" not in found.notes[0]


def test_arrays_that_orbax_did_not_write_right_are_noticed(folder):
    """Files as the manifest says and arrays that are not."""
    record = manifest.read(folder / "20")
    record["digest"] = "0" * 64
    manifest.write(folder / "20", record)
    found = opened(folder).restore(make_state())
    assert found.step == 10
    assert "gives other arrays than were written" in found.notes[0]


def test_training_goes_on_after_a_damaged_checkpoint(folder):
    os.truncate(folder / "20" / manifest.NAME, 30)
    checkpoints = opened(folder)
    assert checkpoints.restore(make_state()).step == 10
    assert checkpoints.latest() == 10
    checkpoints.save(20, make_state(20), {"given": 20})
    assert opened(folder).restore(make_state()).notes == ()
    assert opened(folder).restore(make_state()).step == 20


def test_damaged_checkpoints_are_removed_with_the_next_good_one(folder):
    os.truncate(folder / "20" / manifest.NAME, 30)
    checkpoints = opened(folder)
    checkpoints.restore(make_state())
    checkpoints.save(15, make_state(15))
    assert sorted(p.name for p in folder.iterdir()) == ["10", "15"]


def test_all_damaged_is_an_error_and_not_a_new_start(folder):
    for step in ("10", "20"):
        os.truncate(folder / step / manifest.NAME, 30)
    with pytest.raises(DamagedCheckpointsError, match=r"step 20 is damaged.*step 10 is damaged.*begin a new run"):
        opened(folder).restore(make_state())


def test_wrong_base(folder):
    with pytest.raises(WrongBaseError, match="trained on base parameters 'base-a' and these are 'base-b'; resume with"):
        opened(folder, base="base-b").restore(make_state())


def test_other_configuration(folder):
    with pytest.raises(CheckpointMismatchError, match="belongs to configuration 'c1' and this is 'c2'; resume with"):
        opened(folder, config_hash="c2").restore(make_state())


@pytest.mark.parametrize(("like", "text"), [
    (lambda: make_state(rank=3), r"trainable/h~10~01w/a is float32\[5, 2\] in the check.* and float32\[5, 3\] in"),
    (lambda: make_state(tx=optax.sgd(0.1)), r"opt_state/\S+ is \S+ in the checkpoint .* and missing in this run"),
    (lambda: make_state(tx=optax.adagrad(0.1)), r"opt_state/\S+ is missing in the checkpoint .* and float\S+ in this"),
    (lambda: make_state()._replace(step=jnp.float32(0)), r"step is int32\[\] in the checkpoint .* and float32\[\] in"),
])
def test_other_structure(folder, like, text):
    with pytest.raises(CheckpointMismatchError, match=text):
        opened(folder).restore(like())


def test_other_version(folder):
    record = manifest.read(folder / "20")
    body = {**record, "version": 99}
    (folder / "20" / manifest.NAME).write_text(json.dumps({**body, "checksum": manifest._checksum(body)}))
    with pytest.raises(CheckpointMismatchError, match="99 and this jpeft reads"):
        opened(folder).restore(make_state())


@pytest.mark.parametrize("step", [15, 20])
def test_steps_rise(folder, step):
    with pytest.raises(CheckpointOrderError, match=f"a checkpoint of step 20 and this run is at step {step}; resume"):
        opened(folder).save(step, make_state(5))
    assert opened(folder).steps() == [10, 20]


def test_saving_the_same_again_does_nothing(folder):
    before = {name: (folder / name).stat().st_mtime_ns for name in files_of(folder)}
    opened(folder).save(20, make_state(20), {"given": 20}, {"best": {"step": 20, "loss": 0.1 + 0.2}})
    assert {name: (folder / name).stat().st_mtime_ns for name in files_of(folder)} == before
    with pytest.raises(CheckpointOrderError):
        opened(folder).save(20, make_state(20), {"given": 21})


@pytest.mark.parametrize("change", [
    lambda s: s._replace(trainable={**s.trainable, "bias": {"b": jnp.array([1, jnp.nan, 2], jnp.float16)}}),
    lambda s: s._replace(trainable={**s.trainable, "bias": {"b": jnp.array([1, jnp.inf, 2], jnp.float16)}}),
    lambda s: s._replace(trainable={**s.trainable, "none": {"nothing": jnp.bfloat16(jnp.nan)}}),
    lambda s: s._replace(opt_state=[jnp.array([jnp.nan])]),
])
def test_what_is_not_finite_is_never_saved(folder, change):
    with pytest.raises(NonFiniteLossError, match=r"is not finite after step 30, which is not saved.*intact: 10, 20"):
        opened(folder).save(30, change(make_state(30)))
    assert opened(folder).restore(make_state()).step == 20


def test_positions_are_json(tmp_path):
    with pytest.raises(TrainConfigError, match="data_position is not JSON"):
        Checkpoints(tmp_path).save(1, make_state(), {"given": np.arange(3)})
    assert list(tmp_path.iterdir()) == []


class Crash(BaseException):
    """Stands for the death of the process: nothing after it runs but `finally`."""


def crash(*args, **kwargs):
    raise Crash


@pytest.mark.parametrize("moment", ["before the manifest", "before the rename of the manifest", "while old ones go"])
def test_death_at_the_worst_moments(folder, monkeypatch, moment):
    name = {"before the manifest": "jpeft.train.manifest.hashes", "while old ones go": "shutil.rmtree",
            "before the rename of the manifest": "os.replace"}[moment]
    with monkeypatch.context() as patch:
        patch.setattr(name, crash)
        with pytest.raises(Crash):
            opened(folder).save(30, make_state(30), {"given": 30})
    checkpoints = opened(folder)
    assert checkpoints.steps() == ([20, 30] if moment == "while old ones go" else [10, 20])
    found = checkpoints.restore(make_state())
    assert found.step == (30 if moment == "while old ones go" else 20)
    assert bits(found.state) == bits(make_state(found.step))
    if found.step == 20:
        assert found.notes == (f"the checkpoint of step 30 was not completed and is not used ({folder / '30'})",)
    checkpoints.save(40, make_state(40))
    assert sorted(p.name for p in folder.iterdir()) == [str(found.step), "40"]


def test_death_inside_orbax_leaves_a_draft_that_the_next_save_removes(folder, monkeypatch):
    import orbax.checkpoint as ocp

    (folder / "30.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", crash)
        with pytest.raises(Crash):
            opened(folder).save(30, make_state(30))
    (folder / "30.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True)
    assert opened(folder).restore(make_state()).step == 20
    opened(folder).save(30, make_state(30))
    assert sorted(p.name for p in folder.iterdir()) == ["20", "30"]


def test_death_in_the_first_save_is_a_new_start(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("jpeft.train.manifest.write", crash)
        with pytest.raises(Crash):
            Checkpoints(tmp_path).save(3, make_state(3))
    assert (tmp_path / "3").is_dir()
    assert Checkpoints(tmp_path).restore(make_state()) is None


@pytest.mark.parametrize("broken", ["jpeft.core.files.os.fsync", "orbax.checkpoint.CheckpointManager.save"])
def test_full_disk_in_the_writer(folder, monkeypatch, broken):
    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    checkpoints = opened(folder)
    with monkeypatch.context() as patch:
        patch.setattr(broken, full)
        with pytest.raises(CheckpointWriteError) as caught:
            checkpoints.save(30, make_state(30))
    assert str(caught.value) == (
        f"the checkpoint of step 30 cannot be written to {folder} (No space left on device); free space or fix the "
        "folder, then resume; earlier checkpoints are intact: 10, 20")
    assert isinstance(caught.value, OSError)
    assert sorted(p.name for p in folder.iterdir()) == ["10", "20"]
    assert checkpoints.restore(make_state()).step == 20
    checkpoints.save(30, make_state(30))
    assert opened(folder).steps() == [20, 30]


def test_written_in_a_thread_from_a_copy(folder, monkeypatch):
    """Training goes on and donates the state; the manifest comes last; one is written at a time."""
    go, begun = threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        begun.set()
        assert go.wait(60)
        return hashes(*args, **kwargs)

    hashes = manifest.hashes
    monkeypatch.setattr(manifest, "hashes", slow)
    checkpoints, state = opened(folder), make_state(30)
    checkpoints.save(30, state, {"given": 30}, wait=False)
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0 if jnp.issubdtype(x.dtype, jnp.number) else x, s),
            donate_argnums=0)(state)
    assert state.trainable["h/0~1w"]["a"].is_deleted()
    assert begun.wait(60)
    assert opened(folder).steps() == [10, 20]
    threading.Timer(0.05, go.set).start()
    checkpoints.save(40, make_state(40), wait=False)
    assert opened(folder).steps() == [20, 30]
    assert checkpoints.latest() == 40
    assert bits(opened(folder).restore(make_state()).state) == bits(make_state(40))
    shutil.rmtree(folder / "40")
    assert bits(opened(folder).restore(make_state()).state) == bits(make_state(30))


@pytest.mark.parametrize("broken", ["jpeft.train.manifest.write", "orbax.checkpoint.CheckpointManager.close"])
def test_what_fails_in_the_thread_is_raised_by_the_next(folder, monkeypatch, broken):
    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    checkpoints = opened(folder)
    with monkeypatch.context() as patch:
        patch.setattr(broken, full)
        checkpoints.save(30, make_state(30), wait=False)
        assert checkpoints.latest() == 20
    with pytest.raises(CheckpointWriteError, match=r"step 30 cannot be .*\(No space left on device\).*intact: 10, 20"):
        checkpoints.save(40, make_state(40), wait=False)
    checkpoints.save(40, make_state(40), wait=False)
    checkpoints.wait()
    assert opened(folder).steps() == [20, 40]


CHILD = """
    import os, resource, sys
    import jax, jax.numpy as jnp, optax
    from jpeft.errors import CheckpointWriteError
    from jpeft.train import state as states
    from jpeft.train.checkpoint import Checkpoints

    state = states.create({"w": jax.random.normal(jax.random.key(0), (200, 200))}, optax.adam(0.1), jax.random.key(0))
    checkpoints = Checkpoints(sys.argv[1], keep=2)
    checkpoints.save(1, state)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        checkpoints.save(2, state)
    except CheckpointWriteError as error:
        print(error)
    print(os.listdir(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(checkpoints.restore(state).step)
    checkpoints.save(2, state)
    print(Checkpoints(sys.argv[1]).restore(state).step)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits")
def test_a_write_that_really_fails_says_one_line(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"the checkpoint of step 2 cannot be written to {tmp_path} (File too large); free space or fix the folder, "
        "then resume; earlier checkpoints are intact: 1", "['1']", "1", "2"]
    assert done.stderr == ""


def test_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointWriteError, match=r"cannot be written to .*\((Not a directory|File exists)\)"):
        Checkpoints(tmp_path / "file" / "checkpoints").save(1, make_state())


def test_orbax_is_quiet(folder, capfd, caplog):
    level = logging.getLogger("absl").level
    with caplog.at_level(logging.WARNING):
        opened(folder).save(30, make_state(30))
        opened(folder).restore(make_state())
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert logging.getLogger("absl").level == level


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_a_state_that_lies_on_a_mesh(tmp_path):
    """It is written by shards, and restored onto another mesh and onto one device, bit by bit, where that lies."""
    def state(axes, seed):
        key = jax.random.key(seed)
        weights = {"w": jax.random.normal(key, (8, 6)), "b": jax.random.normal(key, (3,))}
        if axes:
            mesh = made_mesh(axes)
            where = {"w": NamedSharding(mesh, P(*axes)), "b": NamedSharding(mesh, P())}
            weights = jax.device_put(weights, where)
        return states.create(weights, optax.adam(0.1), key)

    saved = state({"fsdp": 4, "tensor": 2}, 1)
    Checkpoints(tmp_path, base="b").save(3, saved, {"at": 1})
    for axes in ({"fsdp": 4, "tensor": 2}, {"fsdp": 2}, {}):
        like = state(axes, 0)
        restored = Checkpoints(tmp_path, base="b").restore(like)
        assert restored.step == 3
        assert bits(restored.state) == bits(saved)
        for found, wanted in zip(jax.tree.leaves(restored.state), jax.tree.leaves(like), strict=True):
            assert found.sharding == wanted.sharding
    bad = saved._replace(trainable={**saved.trainable, "b": saved.trainable["b"] * jnp.nan})
    with pytest.raises(NonFiniteLossError, match="trainable/b is not finite after step 4"):
        Checkpoints(tmp_path, base="b").save(4, bad, {"at": 2})
    assert Checkpoints(tmp_path, base="b").steps() == [3]
