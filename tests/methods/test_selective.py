"""BitFit, LayerNormTuning and Full: which leaves, and what they hold."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, randomise

import jpeft
from jpeft.errors import MethodConfigError, WrongUseError

SHAPES = {"norm": {"scale": (6,), "bias": (6,)}, "dense": {"kernel": (6, 4), "bias": (4,)}, "conv": (3, 4, 4),
          "embed": (9, 6)}


def apply(params: Any, ids: jax.Array) -> jax.Array:
    h = params["embed"][ids]
    h = (h - jnp.mean(h, -1, keepdims=True)) * params["norm"]["scale"] + params["norm"]["bias"]
    h = h @ params["dense"]["kernel"] + params["dense"]["bias"]
    return jax.lax.conv_general_dilated(h, params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def make(rules: Any, dtype: Any = jnp.float32) -> tuple[Any, Any, Any, Any]:
    params = randomise(jax.tree.map(lambda s: jnp.zeros(s, dtype), SHAPES, is_leaf=lambda s: isinstance(s, tuple)), 1)
    plan = jpeft.plan(apply, params, (jnp.zeros((2, 3), jnp.int32),), rules)
    return plan, params, *jpeft.init(plan, params, jax.random.key(0))


@pytest.mark.parametrize(("rules", "paths"), [
    ({"bias": jpeft.BitFit()}, ["dense/bias", "norm/bias"]),
    ({"norm": jpeft.LayerNormTuning()}, ["norm/bias", "norm/scale"]),
    ({".*": jpeft.Full()}, ["conv", "dense/bias", "dense/kernel", "embed", "norm/bias", "norm/scale"]),
])
def test_leaves_and_sums(rules: Any, paths: list[str]) -> None:
    plan, params, start, frozen = make(rules)
    assert sorted(start) == paths
    spread, ids = randomise(start, 2), jnp.asarray([[1, 5, 0], [8, 8, 2]])
    want = dict(zip(jpeft.core.paths.flatten(params)[0], jax.tree.leaves(params), strict=True))
    for path, entries in spread.items():
        want[path] = entries["w"] if "w" in entries else want[path] + entries["d"]
    oracle = jax.tree.unflatten(jax.tree.structure(params), list(want.values()))
    assert_close(jpeft.merge(plan, spread, frozen), oracle, 1e-6)
    assert_close(jpeft.adapt(apply, plan)(spread, frozen, ids), jax.jit(apply)(oracle, ids), 1e-6)
    assert_close(jpeft.base(plan, frozen), params, 0.0)


@pytest.mark.parametrize("method", [jpeft.BitFit(), jpeft.Full()])
def test_a_bfloat16_leaf_has_a_float32_master(method: jpeft.Method) -> None:
    """Steps too small for bfloat16 add up, and the model still sees bfloat16."""
    plan, params, start, _ = make({"dense/bias": method}, jnp.bfloat16)
    entry = plan.entries[0]
    letter, value = next(iter(start["dense/bias"].items()))
    assert value.dtype == jnp.float32
    for _ in range(64):
        value = value + 2.0**-12
    assert_close(value, start["dense/bias"][letter] + 2.0**-6, 1e-6)
    seen = entry.method.build(entry.site, params["dense"]["bias"], {letter: value}, None)
    assert seen.dtype == jnp.bfloat16
    assert bool(jnp.all(seen > params["dense"]["bias"]))


def test_full_owns_its_buffers() -> None:
    """Training with donation leaves the caller's parameters alone."""
    _, params, start, frozen = make({".*": jpeft.Full()})
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((start, params))]
    assert len(set(pointers)) == len(pointers)
    jax.jit(lambda t: jax.tree.map(lambda w: w + 1, t), donate_argnums=0)(start)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, frozen.base)))


def test_full_does_not_read_the_base() -> None:
    plan, params, start, frozen = make({".*": jpeft.Full()})
    broken = frozen._replace(base=jax.tree.map(lambda w: jnp.full_like(w, np.nan), params))
    ids = jnp.asarray([[1, 5, 0], [8, 8, 2]])
    assert_close(jpeft.adapt(apply, plan)(start, broken, ids), jax.jit(apply)(params, ids), 1e-6)
    assert_close(jpeft.merge(plan, start, broken), params, 0.0)


def test_numbers_that_have_no_gradient() -> None:
    params, x = {"table": jnp.arange(4), "w": jnp.ones((4, 4))}, jnp.ones((2, 4))
    with pytest.raises(MethodConfigError, match="only floating-point leaves"):
        jpeft.plan(lambda p, x: x @ p["w"][p["table"]], params, (x,), {"table": jpeft.Full()})


def test_a_kernel_is_no_bias() -> None:
    with pytest.raises(WrongUseError, match="it needs bias"):
        make({"dense/kernel": jpeft.BitFit()})
