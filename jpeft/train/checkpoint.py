"""Checkpoints of a training run: what a resumed run needs to go on as if nothing had happened.

`<folder>/<step>/` holds the arrays, written by Orbax, and last of all `jpeft.json`, the manifest (`manifest.py`). A
folder without a manifest is no checkpoint; a checkpoint whose files differ from its manifest is not used. Old ones go
after the new one is complete. So whenever the process dies, the newest complete checkpoint is whole. All of this may
happen beside the training, of which a copy on the host is written.

On a mesh each process writes its own shards and reads those that it needs: other numbers of devices and processes can
restore what some have saved. All processes call `save` and `restore`; the first one alone writes the manifest, once all
shards are there, and removes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp  # type: ignore[import-untyped]

from jpeft.core import hosts
from jpeft.errors import (
    CheckpointMismatchError,
    CheckpointOrderError,
    CheckpointWriteError,
    DamagedCheckpointsError,
    JpeftError,
    NonFiniteLossError,
    TrainConfigError,
    WrongBaseError,
)
from jpeft.train import manifest
from jpeft.train.manifest import Spec, Stored
from jpeft.train.state import TrainState

ARRAYS = "arrays"
SETTLE = 0.2  # seconds that writes under way may take to end after another one failed


class Restored(NamedTuple):
    """What a checkpoint gives back.

    Attributes:
        state: the training state, bit by bit.
        data_position: for `set_state` of the batches.
        extra: what else was saved.
        step: number of updates so far.
        notes: one line per newer checkpoint that was not used, and why.
    """

    state: TrainState
    data_position: Any
    extra: dict[str, Any]
    step: int
    notes: tuple[str, ...]


class Checkpoints:
    """A folder of checkpoints, which belongs to one run: whatever has a step's name in it may be removed.

    Attributes:
        folder: where they are.
        extra: the `extra` of the checkpoint that was restored, `{}` before.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, optax
        >>> from jpeft.train.state import create
        >>> state = create({"w": jnp.ones(3)}, optax.adam(0.1), jax.random.key(0))
        >>> checkpoints = Checkpoints(tempfile.mkdtemp(), keep=2, base="b1")
        >>> checkpoints.save(0, state, {"epoch": 0})
        >>> checkpoints.restore(state).data_position
        {'epoch': 0}
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, keep: int = 2, base: str = "", config_hash: str = ""
    ) -> None:
        """Name the folder; it is made by the first `save`.

        Args:
            folder: where the checkpoints are.
            keep: how many are kept; two or more protect from a damaged newest one.
            base: identity of the base parameters, `jpeft.fingerprint(params)`.
            config_hash: of what a resumed run must share with the run that it continues.

        Raises:
            TrainConfigError: `keep` is not 1 or more.
        """
        if keep < 1:
            raise TrainConfigError(f"keep = {keep} checkpoints; keep 1 or more")
        self.folder = Path(folder).absolute()
        self.extra: dict[str, Any] = {}
        self._keep, self._base, self._config = keep, base, config_hash
        self._damaged: set[int] = set()
        self._writing: concurrent.futures.Future[None] | None = None

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, rising, without those that `restore` found damaged."""
        return [s for s in self._numbered() if s not in self._damaged and (self._at(s) / manifest.NAME).is_file()]

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None, once nothing is being written."""
        if self._writing is not None:
            concurrent.futures.wait([self._writing])
        return max(self.steps(), default=None)

    def save(
        self, step: int, state: TrainState, data_position: Any = None, extra: Mapping[str, Any] | None = None, *,
        wait: bool = True,
    ) -> None:
        """Write a checkpoint, then remove the oldest beyond `keep`. Returns when it is complete and on the disk.

        Saving again what the newest checkpoint holds does nothing. One is written at a time: a save waits for the one
        before, and raises what that one did.

        Args:
            step: its number.
            state: the training state; never the base parameters.
            data_position: JSON data, of `get_state` of the batches.
            extra: more JSON data.
            wait: return when it is complete; if not, when `state` is copied and may be donated: it is written in a
                thread, and `wait()` says when it is complete. Where several processes train, all wait in any case.

        Raises:
            NonFiniteLossError: a trained parameter is NaN or infinite, or the optimiser's state has a NaN.
            CheckpointOrderError: there is a checkpoint of this step already, or of a later one.
            CheckpointWriteError: the disk is full or the folder cannot be written; older checkpoints are intact.
            TrainConfigError: `data_position` or `extra` is no JSON.
        """
        self.wait()
        wait = wait or hosts.several()
        found, arrays = manifest.unpack(state)
        record = {
            "step": step, "base": self._base, "config": self._config,
            "digest": manifest.digest(found, self._finite(step, found, arrays)),
            "arrays": [list(spec) for spec in found], "data_position": manifest.normal(data_position, "data_position"),
            "extra": manifest.normal(dict(extra or {}), "extra"),
        }
        if self._has(step, manifest.normal(record, "the state")):
            return
        with self._explained(step), contextlib.ExitStack() as stack:
            # JAX gives no buffer away that Orbax has a view of, as it has of what lies on a mesh.
            own = arrays if wait else [np.array(x) if isinstance(x, np.ndarray) else x for x in arrays]
            self._begin(step, stack, own)
            begun = stack.pop_all()
        if wait:
            self._finish(step, begun, record)
            return
        writer = concurrent.futures.ThreadPoolExecutor(1, "jpeft-checkpoint")
        self._writing = writer.submit(self._finish, step, begun, record)
        writer.shutdown(wait=False)

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            CheckpointWriteError: what was being written since the last `save` or `wait` could not be.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def restore(self, like_state: TrainState) -> Restored | None:
        """Return the newest checkpoint that is whole, or None if there is none at all.

        Args:
            like_state: a state of the same structure, from `create`; its values do not matter.

        Raises:
            WrongBaseError: the checkpoint was made on other base parameters.
            CheckpointMismatchError: it was made by another configuration, or holds other arrays.
            DamagedCheckpointsError: there are checkpoints, and none is whole.
        """
        notes: list[str] = []
        wanted = manifest.specs(like_state)
        for step in reversed(self._numbered()):
            if not (self._at(step) / manifest.NAME).is_file():
                notes.append(f"the checkpoint of step {step} was not completed and is not used ({self._at(step)})")
                continue
            try:
                record, arrays = self._read(step, wanted, like_state)
            except DamagedCheckpointsError as error:
                self._damaged.add(step)
                notes.append(f"the checkpoint of step {step} is damaged and is not used ({error})")
                continue
            self.extra = record["extra"]
            state = manifest.pack(like_state, arrays)
            return Restored(state, record["data_position"], record["extra"], step, tuple(notes))
        if self._damaged:
            raise DamagedCheckpointsError(
                f"no checkpoint in {self.folder} can be used: {'; '.join(notes)}; begin a new run in another folder")
        return None

    def _at(self, step: int) -> Path:
        return self.folder / str(step)

    def _numbered(self) -> list[int]:
        """Return the steps that there is a folder for, rising."""
        if not self.folder.is_dir():
            return []
        named = (p for p in self.folder.iterdir() if re.fullmatch("0|[1-9][0-9]*", p.name))
        return sorted(int(p.name) for p in named if p.is_dir())

    def _intact(self) -> str:
        return f"earlier checkpoints are intact: {', '.join(map(str, self.steps())) or 'there are none'}"

    def _has(self, step: int, record: dict[str, Any]) -> bool:
        """Tell whether the newest checkpoint is this very one; raise if it is another of this step or a later one."""
        newest = self.latest()
        if newest is None or newest < step:
            return False
        if newest == step:
            held = manifest.read(self._at(step))
            if all(held[name] == value for name, value in record.items()):
                return True
        raise CheckpointOrderError(
            f"{self.folder} holds a checkpoint of step {newest} and this run is at step {step}; resume from it, or use "
            "another folder")

    def _finite(self, step: int, found: list[Spec], arrays: list[Stored]) -> Iterator[np.ndarray]:
        """Yield arrays on the host; raise if a state is lost: some optimisers keep infinities, but none a NaN."""
        for spec, array in zip(found, map(hosts.whole, arrays), strict=True):
            trained = spec.path.partition("/")[0] == "trainable"
            number = not spec.dtype.startswith("key") and jnp.issubdtype(array.dtype, jnp.inexact)
            if number and (not np.isfinite(array).all() if trained else np.isnan(array).any()):
                raise NonFiniteLossError(
                    f"{spec.path} is not finite after step {step}, which is not saved; lower the learning rate or clip "
                    f"the gradients; {self._intact()}")
            yield array

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Clear away what a failed write has left, and say what failed."""
        try:
            yield
        except Exception as error:
            if hosts.first():
                self._remove_drafts()
                if not (self._at(step) / manifest.NAME).is_file():
                    shutil.rmtree(self._at(step), ignore_errors=True)
            raise CheckpointWriteError(
                f"the checkpoint of step {step} cannot be written to {self.folder} ({_reason(error)}); free space or "
                f"fix the folder, then resume; {self._intact()}") from error

    def _begin(self, step: int, stack: contextlib.ExitStack, arrays: list[Stored]) -> None:
        """Hand the arrays to Orbax, which is done with them when `stack` is closed."""
        if hosts.first():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_drafts()
            if self._at(step).exists():
                self._remove(step)
        hosts.wait("the folder of checkpoints is ready")
        manager = stack.enter_context(_orbax(self.folder, background=True))
        items = {f"{i:06d}": array for i, array in enumerate(arrays) if array.size}
        manager.save(step, args=ocp.args.Composite(**{ARRAYS: ocp.args.StandardSave(items)}), force=True)

    def _finish(self, step: int, begun: contextlib.ExitStack, record: dict[str, Any]) -> None:
        """Wait for Orbax, make the folder a checkpoint, and remove the old ones."""
        with self._explained(step):
            begun.close()
            hosts.wait("the shards are written")
            self._damaged.discard(step)
            if hosts.first():
                manifest.write(self._at(step), {**record, "files": manifest.hashes(self._at(step), sync=True)})
                kept = self.steps()[-self._keep:]
                for old in self._numbered():
                    if old not in kept:
                        self._remove(old)
            hosts.wait("the checkpoint is complete")

    def _read(self, step: int, wanted: list[Spec], like: TrainState) -> tuple[dict[str, Any], list[Stored]]:
        folder = self._at(step)
        record = manifest.read(folder)
        if record["base"] != self._base:
            raise WrongBaseError(
                f"{folder} was trained on base parameters {record['base'][:12]!r} and these are {self._base[:12]!r}; "
                "resume with the model that the run began with")
        if record["config"] != self._config:
            raise CheckpointMismatchError(
                f"{folder} belongs to configuration {record['config'][:12]!r} and this is {self._config[:12]!r}; "
                "resume with the configuration that the run began with, or begin a new run")
        found = [Spec(path, tuple(shape), dtype) for path, shape, dtype in record["arrays"]]
        manifest.compare(folder, found, wanted)
        manifest.verify(folder, record)
        structs = manifest.stored_struct(like)
        names = [f"{i:06d}" for i in range(len(structs))]
        asked = {name: s for name, s in zip(names, structs, strict=True) if s.size}
        try:
            with _orbax(self.folder) as manager:
                args = ocp.args.Composite(**{ARRAYS: ocp.args.StandardRestore(asked)})
                held = manager.restore(step, args=args)[ARRAYS]
        except Exception as error:
            raise DamagedCheckpointsError(f"{folder} cannot be read: {_reason(error)}") from error
        arrays = [np.zeros(s.shape, s.dtype) if not s.size else np.asarray(held[name]) if s.sharding is None else
                  held[name] for name, s in zip(names, structs, strict=True)]
        if manifest.digest(found, map(hosts.whole, arrays)) != record["digest"]:
            raise DamagedCheckpointsError(f"{folder} gives other arrays than were written (their digest differs)")
        return record, arrays

    def _remove(self, step: int) -> None:
        """Remove a checkpoint, its manifest first: what a crash leaves behind is no checkpoint."""
        (self._at(step) / manifest.NAME).unlink(missing_ok=True)
        shutil.rmtree(self._at(step))

    def _remove_drafts(self) -> None:
        """Remove what earlier saves that were cut short have left behind."""
        for draft in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def _orbax(folder: Path, background: bool = False) -> Iterator[Any]:
    """Open Orbax on a folder, without its log: what fails is raised, and said once."""
    log = logging.getLogger("absl")
    level, unraisable = log.level, sys.unraisablehook

    def quiet(late: Any) -> None:
        # Writes that are under way when another one fails find the event loop closed, and say so with a traceback.
        if str(late.exc_value) != "Event loop is closed":
            unraisable(late)

    log.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = quiet
    try:
        # Where processes are told to stop, Orbax needs the times of the steps that are there.
        options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=background, create=False, lightweight_initialize=not hosts.several())
        with ocp.CheckpointManager(folder, options=options) as manager:
            yield manager
    except Exception:
        time.sleep(SETTLE)
        raise
    finally:
        log.setLevel(level)
        sys.unraisablehook = unraisable


def _reason(error: Exception) -> str:
    """Say in a few words why writing failed; Orbax gives the operating system's number inside a long text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    if isinstance(error, JpeftError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
