"""Helpers shared by the tests: closeness per leaf, seeded values, float64 contexts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def x64(on: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which float64 is available (or not)."""
    return jax.enable_x64(on)


@functools.cache
def quick_compile() -> dict[str, Any]:
    """Return compiler options under which XLA compiles in half the time, where this jaxlib knows them."""
    options = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0.0, compiler_options=options).lower().compile()
    except Exception:  # jaxlib says "no such option" with a type of its own
        return {}
    return options


def is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def randomise(tree: Any, seed: int = 0, scale: float = 0.3) -> Any:
    """Return `tree` with every floating leaf replaced by `scale * normal`: same shape, dtype and sharding."""
    rng = np.random.RandomState(seed)

    def one(leaf: Any) -> Any:
        if not is_float(leaf):
            return leaf
        value = (scale * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
        return jax.device_put(value, leaf.sharding) if getattr(leaf, "committed", False) else jnp.asarray(value)

    return jax.tree.map(one, tree)


def distance(a: Any, b: Any) -> float:
    """Return max|a-b| / max|b| of two arrays; 0 where both are zero, inf where only `b` is or a value is not finite."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.size == 0:
        return 0.0
    gap, size = np.abs(a - b).max(), np.abs(b).max()
    if not (np.isfinite(gap) and np.isfinite(size)):
        return float("inf")
    return float(gap / size) if size else (0.0 if gap == 0 else float("inf"))


def assert_close(a: Any, b: Any, tol: float, what: str = "") -> None:
    """Assert that two pytrees agree: structure, shapes, dtypes, and max|a-b| <= tol * max|b| in each leaf."""
    ours, oracle = jax.tree_util.tree_flatten_with_path(a), jax.tree_util.tree_flatten_with_path(b)
    assert ours[1] == oracle[1], f"{what}: structures differ: {ours[1]} != {oracle[1]}"
    for (path, x), (_, y) in zip(ours[0], oracle[0], strict=True):
        name = f"{what}{jax.tree_util.keystr(path)}"
        assert jnp.shape(x) == jnp.shape(y), f"{name}: shape {jnp.shape(x)} != {jnp.shape(y)}"
        assert jnp.result_type(x) == jnp.result_type(y), f"{name}: dtype {jnp.result_type(x)} != {jnp.result_type(y)}"
        if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        error = distance(x, y)
        assert error <= tol, f"{name}: max|a-b|/max|b| = {error:.3g} > {tol:.3g}"


def formula_value(method: Any, site: Any) -> int:
    """Return what a method's `formula` says of the trained values on one leaf, all layers of its stack."""
    if len(method.parts) > 1:
        return sum(formula_value(part, site) for _, part in method.parts)
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    names = {**fields, "in": site.in_size, "out": site.out_size, "size": math.prod(site.shape) // site.stack_size,
             **method.numbers(site), "min": min, "len": len}
    text = re.sub(r"\bin\b", "inputs", method.formula)
    names["inputs"] = names.pop("in")

    def value(text: str) -> int:
        found = eval(text, {"__builtins__": {}}, names)
        assert found == int(found), f"{method} on {site.path}: {text} = {found}"
        return int(found)

    shared = re.findall(r"\[(.*?)\]", text)
    own = value(re.sub(r"\[.*?\]", "0", text))
    return site.stack_size * own + sum(map(value, shared))
