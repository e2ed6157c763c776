"""Small models on meshes of simulated devices: the same training, laid out in every way that has a name."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from support import quick_compile

import jpeft
from jpeft.train import batch_shardings, create, make_train_step

LAYOUTS = ("DP", "FSDP", "TP", "FSDPxTP")
KV, VOCAB, ROWS, LENGTH = ".*/(key|value)/kernel", 64, 8, 7
METHODS: dict[str, dict[str, jpeft.Method]] = {
    "LoRA": {".*/(query|value|up|down)/kernel": jpeft.LoRA(rank=4, alpha=8)},
    "DoRA": {".*/(query|down)/kernel": jpeft.DoRA(rank=4, alpha=8)},
    "prefix": {KV: jpeft.PrefixTuning(length=4)},
    "bottleneck": {".*/down/kernel": jpeft.Pfeiffer(bottleneck=8, activation="gelu")},
}


def mesh(layout: str, devices: int, kind: AxisType = AxisType.Auto) -> Mesh:
    """Return the mesh of a layout over the first devices."""
    sizes = {"DP": {"data": devices}, "FSDP": {"fsdp": devices}, "TP": {"tensor": devices},
             "FSDPxTP": {"fsdp": math.ceil(devices / 2), "tensor": min(devices, 2)}}[layout]
    grid = np.array(jax.devices()[:devices]).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(kind,) * len(sizes))


@functools.cache
def decoder() -> Any:
    """A Llama of two layers whose every dim is divided by eight."""
    from jpeft.models.decoder import Decoder, DecoderConfig
    from jpeft.models.rope import Rope

    return Decoder(DecoderConfig(vocab_size=VOCAB, hidden_size=32, layers=2, heads=8, kv_heads=8, head_size=4,
                                 mlp_size=64, positions=32, rope=Rope()))


class Subject(NamedTuple):
    """A model to train: a pure function of params and tokens, its params, and a loss of `(model, batch, key)`."""

    apply: Any
    params: Any
    loss_fn: Any


@functools.cache
def zoo() -> Subject:
    """The decoder, with a loss that is weighed by its tokens."""
    model = decoder()

    def apply(params: Any, tokens: jax.Array, labels: jax.Array) -> jax.Array:
        return model.apply(params, tokens, labels=labels).loss

    def loss_fn(call: Any, batch: Any, key: jax.Array) -> Any:
        return call(batch["tokens"], batch["labels"]), {"count": jnp.sum(batch["labels"] >= 0)}

    return Subject(apply, model.init(jax.random.key(0)), loss_fn)


@functools.cache
def nnx() -> Subject:
    """Two blocks of NNX's own attention and an MLP, that guess the token before."""
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm = nnx.LayerNorm(32, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(8, 32, decode=False, rngs=rngs)
            self.up, self.down = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 32, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = jpeft.divide_rows(x)
            x = x + self.attention(self.norm(x))
            return x + self.down(nnx.gelu(self.up(x)))

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.embed = nnx.Embed(VOCAB, 32, rngs=rngs)
            self.first, self.second = Block(rngs), Block(rngs)
            self.head = nnx.Linear(32, VOCAB, rngs=rngs)

        def __call__(self, tokens: jax.Array) -> jax.Array:
            return self.head(self.second(self.first(self.embed(tokens))))

    call, params, rest = jpeft.from_nnx(Model(nnx.Rngs(0)))

    def apply(params: Any, tokens: jax.Array, labels: jax.Array) -> jax.Array:
        return call(params, rest, tokens)[0]

    def loss_fn(model: Any, batch: Any, key: jax.Array) -> Any:
        logits = model(batch["tokens"], batch["labels"])
        here = batch["labels"] >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(here, batch["labels"], 0))
        return jnp.sum(losses * here) / jnp.sum(here), {"count": jnp.sum(here)}

    return Subject(apply, params, loss_fn)


SUBJECTS = {"zoo": zoo, "nnx": nnx}


@functools.cache
def plan_of(subject: str, method: str) -> jpeft.Plan:
    made, batch = SUBJECTS[subject](), batches(1)[0]
    return jpeft.plan(made.apply, made.params, (batch["tokens"], batch["labels"]), METHODS[method],
                      tokens=jpeft.Tokens(ids=0, mask=None) if method == "prefix" else None)


def batches(count: int, rows: int = ROWS) -> list[dict[str, np.ndarray]]:
    """Batches whose rows have different numbers of labels."""
    rng = np.random.RandomState(0)
    found = []
    for _ in range(count):
        tokens = rng.randint(0, VOCAB, (rows, LENGTH)).astype(np.int32)
        first = rng.randint(1, LENGTH - 1, (rows, 1))
        found.append({"tokens": tokens, "labels": np.where(np.arange(LENGTH) < first, -1, tokens).astype(np.int32)})
    return found


class Run(NamedTuple):
    """What some steps gave.

    Attributes:
        losses: one for each step.
        compiled: the program of the step.
        plan: the plan.
        state, frozen: after the last step.
    """

    losses: np.ndarray
    compiled: Any
    plan: jpeft.Plan
    state: Any
    frozen: Any


@functools.cache
def train(subject: str, method: str, layout: str, devices: int, steps: int = 20, below: int = 0) -> Run:
    """Train on a mesh; every array is born where it belongs.

    Args:
        subject: a key of `SUBJECTS`.
        method: a key of `METHODS`.
        layout: one of `LAYOUTS`.
        devices: how many.
        steps: how many.
        below: `replicate_below` of `jpeft.shardings`.
    """
    made, plan, on = SUBJECTS[subject](), plan_of(subject, method), mesh(layout, devices)
    base = jpeft.base_shardings(made.params, on, plan=plan)
    params = jax.device_put(made.params, base)
    pair = jpeft.shardings(plan, base, replicate_below=below)
    trainable, frozen = jpeft.init(plan, params, jax.random.key(1), shardings=pair)
    tx = optax.adam(3e-3)
    state = create(trainable, tx, jax.random.key(2))
    where = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(jpeft.adapt(made.apply, plan), made.loss_fn, tx, clip=1.0)
    given = batches(steps)
    put = batch_shardings(given[0], on)
    everywhere = NamedSharding(on, PartitionSpec())
    with jax.set_mesh(on):
        lowered = jax.jit(step, donate_argnums=0, out_shardings=(where, everywhere)).lower(
            state, frozen, jax.device_put(given[0], put))
    compiled = lowered.compile(compiler_options=quick_compile())
    losses = []
    for batch in given:
        state, metrics = compiled(state, frozen, jax.device_put(batch, put))
        losses.append(float(metrics["loss"]))
    return Run(np.array(losses), compiled, plan, state, frozen)


def per_device(tree: Any) -> int:
    """Return the bytes of a tree on the device that holds most of it."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            for shard in leaf.addressable_shards:
                held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values(), default=0)
