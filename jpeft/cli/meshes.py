"""The mesh section of a job: how many devices divide what, who runs them, and what a report says of it."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import pydantic
from jax.sharding import Mesh, PartitionSpec

from jpeft.cli.fields import Count, Section, Steps
from jpeft.core import hosts
from jpeft.core.paths import flatten
from jpeft.core.plan import Plan
from jpeft.core.sharding import SMALL, shardings
from jpeft.errors import ConfigError, RunError
from jpeft.train.sharding import device_bytes, made_mesh

if TYPE_CHECKING:
    from jpeft.cli.config import JobConfig

J = TypeVar("J", bound="JobConfig")
AXES = ("data", "fsdp", "expert", "sequence", "tensor")
PROCESSES, PROCESS = "JPEFT_PROCESSES", "JPEFT_PROCESS"
"""Environment variables that `jpeft launch` sets, beside JAX's own JAX_COORDINATOR_ADDRESS."""


class MeshConfig(Section):
    """How many devices divide what; null: the mesh lacks this axis.

    Attributes:
        data: rows of a batch.
        fsdp: rows of a batch, and every weight along its inputs.
        tensor: heads, and the inner width of an MLP.
        sequence: tokens of a batch.
        expert: experts.
        rules: path pattern -> mesh axes of each dim (an axis, a list of axes, or null), before the presets; the first
            that matches a leaf wins.
        replicate_below: what trains is whole on every device where it has fewer bytes than these, and divided as the
            leaf that it rides on otherwise.
    """

    data: Count | None = None
    fsdp: Count | None = None
    tensor: Count | None = None
    sequence: Count | None = None
    expert: Count | None = None
    rules: dict[str, list[str | list[str] | None]] = pydantic.Field(default_factory=dict)
    replicate_below: Steps = SMALL

    @pydantic.model_validator(mode="after")
    def _some(self) -> MeshConfig:
        if not self.axes:
            raise ValueError(f"names no axis; give one of {', '.join(AXES)} a number of devices, as {{fsdp: 8}}")
        return self

    @property
    def axes(self) -> dict[str, int]:
        """The axes that the mesh has, those that exchange most last: their devices are next to each other."""
        return {axis: size for axis in AXES if (size := getattr(self, axis)) is not None}

    @property
    def specs(self) -> dict[str, PartitionSpec]:
        """The rules, as `jpeft.from_pretrained` takes them."""
        return {pattern: PartitionSpec(*(tuple(one) if isinstance(one, list) else one for one in entries))
                for pattern, entries in self.rules.items()}

    @property
    def rows(self) -> int:
        """Devices that divide the rows of a batch."""
        return (self.data or 1) * (self.fsdp or 1)


def words(config: MeshConfig | None) -> str:
    """Say which mesh it is.

    Example:
        >>> words(MeshConfig(tensor=2, fsdp=4)), words(None)
        ('fsdp=4, tensor=2', 'one device')
    """
    return "one device" if config is None else ", ".join(f"{axis}={size}" for axis, size in config.axes.items())


def made(config: MeshConfig | None) -> Mesh | None:
    """Return the mesh of a job, over the devices of all processes; None: it has none.

    Raises:
        ShardingError: there are too few devices, or a process would have none of them.
        ConfigError: there are several processes, and no mesh.
    """
    if config is None and hosts.several():
        raise ConfigError(f"{jax.process_count()} processes run a job without a mesh section, which says what each of "
                          f"them has; add --set mesh.data={jax.device_count()}")
    return None if config is None else made_mesh(config.axes)


def here(job: J) -> tuple[J, tuple[str, ...]]:
    """Return a job that the devices of this process are enough for, and a note where it is another one."""
    if job.mesh is None or math.prod(job.mesh.axes.values()) <= jax.device_count():
        return job, ()
    return job.model_copy(update={"mesh": None}), (
        f"the run's mesh, {words(job.mesh)}, has more devices than the {jax.device_count()} here: on one of them",)


def places(config: MeshConfig | None, plan: Plan, params: Any) -> Any:
    """Return where an adapter lies, as of `jpeft.shardings`; None: on one device."""
    return None if config is None else shardings(plan, params, replicate_below=config.replicate_below)


@contextlib.contextmanager
def used(config: MeshConfig | None) -> Iterator[Mesh | None]:
    """Have JAX make arrays on the mesh of a job, and models keep their activations divided by rows."""
    mesh = made(config)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield mesh


def join() -> None:
    """Become one of several processes: those of `jpeft launch`, or of the cluster that JAX detects.

    Raises:
        RunError: there is no such cluster, or the processes do not find each other.
    """
    count = os.environ.get(PROCESSES)
    said = {} if count is None else {"num_processes": int(count), "process_id": int(os.environ[PROCESS])}
    try:
        jax.distributed.initialize(**said)
    except (ValueError, RuntimeError) as error:
        raise RunError(f"--distributed found no other processes ({_line(error)}); start them with jpeft launch, or by "
                       "SLURM, Kubernetes, MPI or on a TPU pod") from error


def leave(code: int) -> None:
    """End this process at once after an error, if it has joined others: JAX would wait for them, and they for it."""
    if hosts.several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Say in one line that another process was lost, which JAX says in many.

    Raises:
        RunError: it was.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not hosts.several():
            raise
        raise RunError(f"process {jax.process_index()} of {jax.process_count()} has lost another one "
                       f"({_line(error)}); begin all of them again with --resume") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def told(mesh: Mesh, base: Any, state: Any, frozen: Any) -> list[str]:
    """Say what each device holds, and what is whole on all of them.

    Args:
        mesh: the mesh.
        base: the params.
        state: a `TrainState`.
        frozen: what `jpeft.init` returned beside it.
    """
    bytes_ = held(base, state, frozen)
    each = ", ".join(f"{name} {here:,} of {everywhere:,}" for name, (here, everywhere) in bytes_.items())
    paths, leaves, _ = flatten(base)
    both = zip(paths, leaves, strict=True)
    same = sorted(((x.nbytes, path) for path, x in both if x.is_fully_replicated), reverse=True)
    most = ", ".join(path for _, path in same[:3]) + (f" and {len(same) - 3} more" if len(same) > 3 else "")
    axes, idle = ", ".join(f"{a}={n}" for a, n in mesh.shape.items()), jax.device_count() - mesh.size
    return [
        f"mesh: {axes}: {mesh.size} devices" + (f" of {jax.process_count()} processes" if hosts.several() else "")
        + (f"; {idle} more devices are not used" if idle else ""),
        f"bytes on each device: {each}",
        f"whole on every device: {sum(size for size, _ in same):,} bytes of the base ({most})" if same else
        "every leaf of the base is divided"]


def moved(before: MeshConfig | None, now: MeshConfig | None) -> list[str]:
    """Say that a run goes on on another mesh than it began on."""
    old, new = (None if one is None else one.axes for one in (before, now))
    return [] if old == new else [f"begun on {words(before)}, goes on on {words(now)}: sums are taken in another "
                                  "order, so losses are the same to rounding, not bit by bit"]


def held(base: Any, state: Any, frozen: Any) -> dict[str, tuple[int, int]]:
    """Return the bytes that the fullest device holds, and those of one copy of all, of what a run keeps in memory."""
    named: Mapping[str, Any] = {"base": base, "adapters": (state.trainable, frozen.theta), "optimizer": state.opt_state}
    return {name: (device_bytes(tree), sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)))
            for name, tree in named.items()}
