"""Memory and time of a training step before there is a device for it: compiled for simulated ones, never run.

The step is the real one (loss, gradients, update of the trainable partition), of the real shapes and shardings, and its
memory is what the compiler says. Four things are not on an accelerator as they are on a CPU, and are put right:

1. bfloat16. The CPU has no such products and widens them, their operands and what is gathered for them to float32. So
   float16, which it has, stands in for bfloat16 in the whole program: every array has the bytes that it would have.
2. Loops. Moving what does not change out of a loop trades memory for time; as the CPU compiler does it, whole stacks of
   float32 copies. These passes are off.
3. FLOPs. The compiler counts the body of a loop once; `hlo.count_text` counts it as often as it runs.
4. Attention. `jax.nn.dot_product_attention` holds the scores of a layer `[B, H, T, S]` on every platform where it does
   not call a fused kernel. `attention="fused"` compiles a stand-in that works in blocks of queries, as such a kernel.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np

from jpeft.core import compat, transform
from jpeft.core.frozen import Frozen
from jpeft.core.match import Pattern
from jpeft.core.method import Method
from jpeft.core.paths import flatten
from jpeft.core.planning import plan as make_plan
from jpeft.core.sharding import shardings
from jpeft.core.tokens import Tokens
from jpeft.errors import EstimateError
from jpeft.models.decoder import Decoder
from jpeft.models.sharding import placements
from jpeft.train import hlo, losses, optimizer, step, traffic
from jpeft.train.fused import fused_attention
from jpeft.train.sharding import batch_shardings, device_bytes, made_mesh
from jpeft.train.state import TrainState, state_shardings

ATTENTION = ("scores", "fused")
_STAND_IN = jnp.dtype("float16")
_OPTIONS: dict[str, Any] = {
    **compat.UNRUN,
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion,"
                              "change-op-data-type",
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one step takes, per device (the fullest one) unless it says otherwise; bytes and operations.

    Attributes:
        devices: how many.
        tokens: of a step, on all devices.
        parameters: of the model.
        trainable: trainable values.
        base: bytes of the frozen parameters.
        adapters: of the trainable ones, and of what a method keeps frozen beside them.
        optimizer: of its state.
        inputs: of the batch and of the step's scalars.
        activations: what the compiler needs beside its arguments: activations, gradients, gathered weights.
        arguments: the compiler's own sum of all arguments.
        scores: of the attention scores of one layer, in float32; they are part of the activations unless a fused kernel
            computes them. There may be several copies at a time.
        flops: of the matrix products, loops counted by their trips.
        product_bytes: that the products read and write.
        moved: what a device sends to others.
        full: how many bfloat16 products one product of the program costs, by its dtype.
        notes: what could not be divided, and the like.
        seconds: what it took to find out.
    """

    devices: int
    tokens: int
    parameters: int
    trainable: int
    base: int
    adapters: int
    optimizer: int
    inputs: int
    activations: int
    arguments: int
    scores: int
    flops: int
    product_bytes: int
    moved: tuple[traffic.Moved, ...]
    full: float
    notes: tuple[str, ...]
    seconds: float

    @property
    def total(self) -> int:
        """Bytes that the device must have."""
        return self.base + self.adapters + self.optimizer + self.inputs + self.activations

    @property
    def sent(self) -> int:
        """Bytes that the device sends to others."""
        return sum(one.sent for one in self.moved)


@dataclasses.dataclass(frozen=True)
class Job:
    """A step to estimate.

    Attributes:
        model: the model; its dtype is that of compute and of the frozen parameters, its remat policy counts.
        rules: pattern -> method, as of `jpeft.plan`.
        mesh: axis -> number of devices, in order.
        batch: sequences of a step, on all devices.
        length: tokens of a sequence.
        optimizer: the optimiser, with a learning rate.
        attention: one of `ATTENTION`.
        tokens: where the token axis is, for methods with virtual tokens.
    """

    model: Any
    rules: Mapping[Pattern, Method]
    mesh: Mapping[str, int]
    batch: int
    length: int
    optimizer: optimizer.Optimizer
    attention: str = "scores"
    tokens: Tokens | None = None


class Abstract:
    """A job without arrays: the step and its arguments as `jax.ShapeDtypeStruct`, each with its sharding."""

    def __init__(self, job: Job):
        if not isinstance(job.model, Decoder) or job.model.config.task != "causal-lm":
            raise EstimateError(f"the model is a {type(job.model).__name__}, only causal language models are estimated")
        self.job, self.mesh = job, made_mesh(job.mesh)
        dtype = jnp.dtype(job.model.dtype or jnp.float32)
        self.dtype = _STAND_IN if dtype == jnp.bfloat16 else dtype
        self.model = dataclasses.replace(job.model, dtype=self.dtype)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, self.dtype), self.model.shapes())
        paths, leaves, treedef = flatten(shapes)
        self.where = placements(shapes, self.mesh)
        self.base = _at(treedef.unflatten(leaves), treedef.unflatten([self.where.shardings[path] for path in paths]))
        self.batch = self._batch()
        self.plan = make_plan(self._apply(), self.base, (self.batch["tokens"],), job.rules, tokens=job.tokens,
                              example_kwargs=losses.model_inputs(self.batch))
        self.args = *self._arguments(), self.batch

    def _batch(self) -> dict[str, Any]:
        shape = self.job.batch, self.job.length
        kinds = {"tokens": jnp.int32, "labels": jnp.int32, "weights": jnp.float32}
        batch = {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}
        return _at(batch, batch_shardings(batch, self.mesh))

    def _apply(self) -> Callable[..., Any]:
        plain = self.model.apply
        if self.job.attention == "fused":
            plain = fused_attention(plain)

        def loss(params: Any, tokens: Any, **named: Any) -> Any:
            return plain(params, tokens, **named).loss

        return loss

    def _arguments(self) -> tuple[TrainState, Frozen]:
        trainable, theta = self.plan.theta_shapes()
        over, frozen = shardings(self.plan, self.base)
        self.tx, self.rate = optimizer.make(self.job.optimizer, 1000, trainable, self.plan)
        key: Any = jax.eval_shape(lambda: jax.random.key(0))
        count: Any = jax.ShapeDtypeStruct((), jnp.int32)
        shapes = TrainState(count, trainable, jax.eval_shape(self.tx.init, trainable), key)
        self.places = state_shardings(trainable, over, self.tx)
        return _at(shapes, self.places), Frozen(self.base, _at(theta, frozen.theta))

    def kept(self) -> list[Any]:
        """Return the leaves of the base that the step reads: all but those that a method may drop from memory."""
        dropped = {e.path for e in self.plan.entries if getattr(e.method, "drops_base", False)}
        paths, leaves, _ = flatten(self.base)
        return [leaf for path, leaf in zip(paths, leaves, strict=True) if path not in dropped]

    def step(self) -> Any:
        """Return the compiled training step of this job, as a run has it."""
        adapted = transform.adapt(self._apply(), self.plan)
        has_penalty = any(type(e.method).penalty is not Method.penalty for e in self.plan.entries)
        penalty = (lambda t, f: transform.penalty(self.plan, t, f)) if has_penalty else None

        def apply(trainable: Any, frozen: Any, batch: Any, key: Any) -> Any:
            return adapted(trainable, frozen, batch["tokens"], **losses.model_inputs(batch))

        return step.compiled_step(losses.causal_lm(apply, penalty=penalty), self.tx, schedule=self.rate)

    def compiled(self) -> Any:
        """Compile the step for the devices of the mesh, with what is said at the top of this file."""
        flat = jax.tree.leaves(self.args)
        places = jax.tree.leaves(self.places)
        with jax.set_mesh(self.mesh):
            closed = compat.any_algorithm(jax.make_jaxpr(self.step())(*self.args))
            out = [*places, *[None] * (len(closed.out_avals) - len(places))]
            run = jax.jit(jec.jaxpr_as_fun(closed), donate_argnums=tuple(range(len(places))), out_shardings=out)
            lowered = run.lower(*flat)
        try:
            return lowered.compile(compiler_options=_OPTIONS)
        except jax.errors.JaxRuntimeError as error:
            raise EstimateError(f"the compiler refused the step: {' '.join(str(error).split())[:300]}") from error


def estimate(job: Job) -> Estimate:
    """Say what a training step takes: memory, operations, and what the devices exchange.

    Nothing is allocated. It needs as many devices as the mesh has, which may be simulated ones:
    `XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu`.

    Args:
        job: the step.

    Raises:
        EstimateError: the compiler refuses.
        ShardingError: there are too few devices, or the mesh does not divide the batch.
        NoMatchError, MethodConfigError: as of `jpeft.plan`.

    Example:
        >>> from jpeft.methods import LoRA
        >>> from jpeft.models.decoder import Decoder, DecoderConfig
        >>> model = Decoder(DecoderConfig(64, 32, 2, 2, 1, 16, 64, 128), dtype=jnp.float32)
        >>> adam = optimizer.Optimizer("adam", 1e-3)
        >>> found = estimate(Job(model, {"attention": LoRA(rank=2)}, {"fsdp": 1}, 2, 16, adam))
        >>> found.trainable, found.base == 4 * found.parameters
        (896, True)
    """
    start = time.perf_counter()
    made = Abstract(job)
    compiled = made.compiled()
    memory = compiled.memory_analysis()
    module = hlo.parse(text := compiled.as_text())
    state, frozen, batch = made.args
    c = job.model.config
    first = next(iter(made.batch.values()))
    rows, length = first.sharding.shard_shape(first.shape)
    heads = c.heads // dict(made.mesh.shape).get("tensor", 1)
    theta = device_bytes(state.trainable) + device_bytes(frozen.theta)
    return Estimate(
        devices=made.mesh.size, tokens=job.batch * job.length,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(made.base)), trainable=made.plan.count(),
        base=device_bytes(made.kept()), adapters=theta, optimizer=device_bytes(state.opt_state),
        inputs=device_bytes((batch, state.step)) + 8,
        activations=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        arguments=memory.argument_size_in_bytes, scores=4 * rows * heads * length * job.length,
        flops=hlo.count_text(text).total, product_bytes=traffic.product_bytes(module),
        moved=tuple(traffic.collectives(module, made.mesh.size)), full=made.dtype.itemsize / 2,
        notes=(*job.model.notes, *made.where.notes), seconds=time.perf_counter() - start)


def _at(shapes: Any, where: Any) -> Any:
    """Return shapes that know where they lie."""
    return jax.tree.map(lambda struct, place: jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=place),
                        shapes, where)


def search(job: Job, memory: float, most: int = 2**20) -> tuple[Job, Estimate, int]:
    """Find the largest batch whose step fits into a memory; its own batch is not looked at.

    Memory grows almost linearly with the batch: the next one to compile is read off the line through the last two.

    Args:
        job: the step; the batch grows by as many sequences as devices divide it.
        memory: bytes of a device.
        most: sequences at most.

    Returns:
        The job with that batch, its estimate, and how many batches were compiled.

    Raises:
        EstimateError: not even the smallest batch fits.
    """
    rows = int(np.prod([n for axis, n in job.mesh.items() if axis in ("data", "fsdp")], dtype=np.int64))
    known: dict[int, Estimate] = {}

    def at(parts: int) -> int:
        if parts not in known:
            known[parts] = estimate(dataclasses.replace(job, batch=parts * rows))
        return known[parts].total

    if at(1) > memory:
        raise EstimateError(f"a batch of {rows} sequences of {job.length} tokens takes {at(1) / 1e9:.1f} GB of each "
                            f"device, {memory / 1e9:.1f} GB are there; divide the model over more devices, shorten the "
                            "sequences, or use remat 'full'")
    fits, over, limit = 1, max(most // rows, 1) + 1, 2
    while over - fits > 1:
        guess = min(max(limit, fits + 1), over - 1)
        fits, over = (guess, over) if at(guess) <= memory else (fits, guess)
        a, b = sorted(known)[:2] if over not in known else (fits, over)
        slope = (at(b) - at(a)) / (b - a)
        limit = int(fits + (memory - at(fits)) / slope) if slope > 0 else 2 * fits
    return dataclasses.replace(job, batch=fits * rows), known[fits], len(known)
