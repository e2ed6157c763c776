"""Training on eight simulated devices is training on one, and what moves between them is adapters, never the base."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
from collectives import copied, moves
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import distance

import jpeft
from jpeft.train import create, make_train_step

pytest.importorskip("flax", reason="needs flax, which the models are written in")
pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

QUICK = (("zoo", "LoRA", "FSDP"),)
GRID = [*(("zoo", m, lay) for m in meshes.METHODS for lay in meshes.LAYOUTS),
        *(("nnx", m, lay) for m, lay in zip(meshes.METHODS, meshes.LAYOUTS, strict=True))]
SCALARS = 64  # bytes: the loss, its count, the norm of the gradients


@pytest.mark.parametrize(("subject", "method", "layout"), [
    pytest.param(*cell, id="-".join(cell), marks=() if cell in QUICK else pytest.mark.slow) for cell in GRID])
def test_twenty_steps_on_a_mesh_are_those_of_one_device(subject: str, method: str, layout: str) -> None:
    alone = meshes.train(subject, method, "DP", 1)
    spread = meshes.train(subject, method, layout, 8)
    assert distance(spread.losses, alone.losses) <= 1e-5
    assert len(spread.losses) == 20
    assert np.ptp(alone.losses) > 1e-3, "nothing was learnt"
    for x, y in zip(jax.tree.leaves(spread.state.trainable), jax.tree.leaves(alone.state.trainable), strict=True):
        assert distance(x, y) <= 1e-3


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def local(tree: Any) -> set[tuple[int, ...]]:
    """Shapes of the stacked leaves of a base, whole and as one device holds them."""
    return whole(tree) | {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(tree["layers"])
                          if leaf.ndim > 2}


def whole(tree: Any) -> set[tuple[int, ...]]:
    return {leaf.shape for leaf in jax.tree.leaves(tree["layers"]) if leaf.ndim > 2}


@pytest.mark.parametrize("layout", ["DP", pytest.param("FSDP", marks=pytest.mark.slow)])
def test_only_gradients_of_the_adapter_are_summed_over_devices(layout: str) -> None:
    run = meshes.train("zoo", "LoRA", layout, 8)
    text = run.compiled.as_text()
    summed = sum(move.nbytes for move in moves(text) if move.kind in ("all-reduce", "reduce-scatter"))
    assert nbytes(run.state.trainable) <= summed <= nbytes(run.state.trainable) + SCALARS
    if layout == "DP":
        assert {move.kind for move in moves(text)} == {"all-reduce"}
    assert not whole(run.frozen.base).intersection(copied(text))


@pytest.mark.parametrize("layout", ["FSDP", pytest.param("FSDPxTP", marks=pytest.mark.slow)])
def test_no_stacked_leaf_is_gathered_outside_the_scan_or_copied(layout: str) -> None:
    """Weights are gathered in the scan, a layer at a time, by the rows of the batch that stay where they are."""
    run = meshes.train("zoo", "LoRA", layout, 8)
    text, stacked = run.compiled.as_text(), local(run.frozen.base)
    found = moves(text)
    outside = {array.dims for move in found if not move.looped for array in move.arrays}
    assert not stacked & outside
    # The CPU compiler lays out a device's own eighth anew where a product wants it; nothing larger is copied.
    assert not whole(run.frozen.base).intersection(copied(text))
    inside = [move for move in found if move.looped and move.kind == "all-gather"]
    assert inside
    assert not {array.dims for move in inside for array in move.arrays} & stacked
    assert meshes.per_device(run.frozen.base) < 0.3 * nbytes(run.frozen.base)


def test_the_optimiser_is_divided_as_the_adapter_is() -> None:
    run = meshes.train("zoo", "LoRA", "FSDP", 8)
    for path, letters in run.state.trainable.items():
        for letter, leaf in letters.items():
            assert run.state.opt_state[0].mu[path][letter].sharding == leaf.sharding
    assert meshes.per_device(run.state) < 0.8 * nbytes(run.state.trainable) * 3


def test_explicit_sharding_mode() -> None:
    """A model written for it: FSDPxTP with every entry of theta divided as its leaf is."""
    mesh = meshes.mesh("FSDPxTP", 8, AxisType.Explicit)
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"up": jax.random.normal(keys[0], (2, 16, 32)) / 4, "down": jax.random.normal(keys[1], (2, 32, 16)) / 4}
    x = np.random.RandomState(0).standard_normal((8, 16)).astype(np.float32)

    def model(out: Any) -> Any:
        def apply(p: Any, x: jax.Array) -> jax.Array:
            def body(h: jax.Array, w: Any) -> tuple[jax.Array, None]:
                y = jnp.einsum("bf,fd->bd", jnp.tanh(jnp.einsum("bd,df->bf", h, w["up"], out_sharding=out[0])),
                               w["down"], out_sharding=out[1])
                return h + y, None

            return jax.lax.scan(body, x, p)[0]

        return apply

    def losses(apply: Any, params: Any, x: Any) -> tuple[np.ndarray, Any]:
        plan = jpeft.plan(apply, params, (x,), {"up|down": jpeft.LoRA(rank=2)})
        pair = jpeft.shardings(plan, params, replicate_below=0)
        trainable, frozen = jpeft.init(plan, params, jax.random.key(1), shardings=pair)
        tx = optax.sgd(1e-1)
        state = create(trainable, tx, jax.random.key(2))
        step = jax.jit(make_train_step(jpeft.adapt(apply, plan), lambda call, b, key: jnp.mean(call(b) ** 2), tx))
        found = []
        for _ in range(20):
            state, metrics = step(state, frozen, x)
            found.append(float(metrics["loss"]))
        return np.array(found), state

    alone, _ = losses(model((None, None)), params, jnp.asarray(x))
    with jax.set_mesh(mesh):
        base = {"up": P(None, "fsdp", "tensor"), "down": P(None, "tensor", "fsdp")}
        placed = {k: jax.device_put(v, NamedSharding(mesh, base[k])) for k, v in params.items()}
        rows = jax.device_put(x, NamedSharding(mesh, P("fsdp")))
        spread, state = losses(model((P("fsdp", "tensor"), P("fsdp", None))), placed, rows)
    assert distance(spread, alone) <= 1e-5
    assert state.trainable["up"]["a"].sharding.spec == P(None, "fsdp", None)
    assert alone[-1] < 0.95 * alone[0]
