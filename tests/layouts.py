"""One weight in every layout a model may store and use it in, and each method against its equation on all of them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import assert_close, randomise, x64

import jpeft

I, O, N, E = 8, 6, 3, 2  # inputs, outputs, stacked copies, rows  # noqa: E741
Equation = Callable[[dict[str, jax.Array], jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """A model of one leaf `w`.

    Attributes:
        name: the layout's name.
        shape: of the leaf.
        ins: its dims that are summed over.
        outs: its dims of the output.
        stack: its dims that hold copies.
        x: shape of the input, or None where it is token ids.
        apply: `(w, x) -> y`.
        use: what inspection must say.
    """

    name: str
    shape: tuple[int, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    stack: tuple[int, ...]
    x: tuple[int, ...] | None
    apply: Callable[[jax.Array, jax.Array], jax.Array]
    use: str = "linear"

    def __str__(self) -> str:
        return self.name


def _scan(w: jax.Array, x: jax.Array) -> jax.Array:
    return lax.scan(jax.checkpoint(lambda h, v: (h + jnp.tanh(h @ v), None)), x, w)[0]


def _conv(w: jax.Array, x: jax.Array, groups: int = 1) -> jax.Array:
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
                                    feature_group_count=groups)


def _sizes(x: jax.Array) -> jax.Array:
    return jnp.asarray([2, 0, len(x) - 2], jnp.int32)


PLAIN = Layout("plain", (I, O), (0,), (1,), (), (E, I), lambda w, x: x @ w)
LINEAR = [
    PLAIN,
    Layout("out-in", (O, I), (1,), (0,), (), (E, 4, I), lambda w, x: jnp.einsum("bti,oi->bto", x, w)),
    Layout("heads", (I, 2, 3), (0,), (1, 2), (), (E, I), lambda w, x: jnp.einsum("bi,ihk->bhk", x, w)),
    Layout("merge heads", (2, 4, O), (0, 1), (2,), (), (E, 2, 4), lambda w, x: jnp.einsum("bhk,hko->bo", x, w)),
    Layout("scanned", (N, I, I), (1,), (2,), (0,), (E, I), _scan),
    Layout("scanned axis 1", (I, N, I), (0,), (2,), (1,), (E, I), lambda w, x: _scan(jnp.moveaxis(w, 1, 0), x)),
    Layout("experts", (N, I, O), (1,), (2,), (0,), (N, E, I), lambda w, x: jnp.einsum("nei,nio->neo", x, w)),
]
RAGGED = Layout("ragged", (N, I, O), (1,), (2,), (0,), (5, I), lambda w, x: lax.ragged_dot(x, w, _sizes(x)))
CONV = [
    Layout("conv", (3, 2, I, O), (0, 1, 2), (3,), (), (E, 4, 4, I), _conv, "conv"),
    Layout("grouped conv", (3, 2, I // 2, O), (0, 1, 2), (3,), (), (E, 4, 4, I),
           functools.partial(_conv, groups=2), "conv"),
]
LOOKUP = [
    Layout("embedding", (10, O), (0,), (1,), (), None, lambda w, x: w[x], "embedding"),
    Layout("tied", (10, O), (0,), (1,), (), None, lambda w, x: jnp.tanh(w[x]) @ w.T, "tied"),
]


def each(*layouts: Layout) -> dict[str, Any]:
    """Arguments of `pytest.mark.parametrize`; of many layouts every other one is for the slow tier."""
    slow = pytest.mark.slow if len(layouts) > 6 else ()
    return {"argnames": "layout", "ids": str, "argvalues": [
        pytest.param(layout, marks=slow if i % 2 else ()) for i, layout in enumerate(layouts)]}


def sample(first: Layout, *more: Layout) -> dict[str, Any]:
    """The same, with all but the first in the slow tier."""
    return {"argnames": "layout", "argvalues": [first, *(
        pytest.param(m, marks=pytest.mark.slow) for m in more if m is not first)], "ids": str}


@dataclasses.dataclass(frozen=True)
class Ready:
    """One method on one layout; entries of `spread` are random."""

    plan: jpeft.Plan
    start: Any
    spread: Any
    frozen: jpeft.Frozen
    x: jax.Array

    @property
    def theta(self) -> dict[str, jax.Array]:
        return {**self.spread["w"], **self.frozen.theta.get("w", {})}


def prepare(method: jpeft.Method, layout: Layout, dtype: Any = jnp.float32) -> Ready:
    n_in = math.prod(layout.shape[d] for d in layout.ins)
    w = randomise(jnp.zeros(layout.shape, dtype), 1, 1 / math.sqrt(n_in))
    x = jnp.asarray([[1, 4, 4], [9, 0, 2]]) if layout.x is None else randomise(jnp.zeros(layout.x, dtype), 2, 1.0)
    plan = jpeft.plan(lambda p, x: layout.apply(p["w"], x), {"w": w}, (x,), {"w": method})
    site = plan.entries[0].site
    assert (site.use, site.in_dims, site.out_dims) == (layout.use, layout.ins, layout.outs)
    assert site.stack_dims == layout.stack
    start, frozen = jpeft.init(plan, {"w": w}, jax.random.key(0))
    return Ready(plan, start, randomise(start, 3), frozen, x)


def dense(r: Ready, layout: Layout, equation: Equation, theta: dict[str, jax.Array]) -> jax.Array:
    """Form `W'` by `equation(theta, W [in, out]) -> [in, out]`, copy by copy."""
    w, n = r.frozen.base["w"], len(layout.stack)
    order = (*layout.stack, *layout.ins, *layout.outs)
    moved = jnp.transpose(w, order)
    flat = jnp.reshape(moved, (-1, *(math.prod(layout.shape[d] for d in dims) for dims in (layout.ins, layout.outs))))
    axes = r.plan.entries[0].method.axes(r.plan.entries[0].site)
    own = {k for k in theta if n and axes[k][:n] == layout.stack}
    copies = [equation({k: v.reshape(-1, *v.shape[n:])[i] if k in own else v for k, v in theta.items()}, flat[i])
              for i in range(len(flat))]
    return jnp.transpose(jnp.reshape(jnp.stack(copies), moved.shape), np.argsort(order))


def check(method: jpeft.Method, layout: Layout, equation: Equation) -> None:
    """Assert that the adapted model is the plain one with `W'`, in values and gradients, and that `W'` is merged."""
    with x64():
        r = prepare(method, layout, jnp.float64)

        def ours(trainable: Any) -> tuple[jax.Array, jax.Array]:
            with jax.numpy_dtype_promotion("strict"):
                y = jpeft.adapt(lambda p, x: layout.apply(p["w"], x), r.plan)(trainable, r.frozen, r.x)
            return y, jpeft.merge(r.plan, trainable, r.frozen)["w"]

        def oracle(trainable: Any) -> tuple[jax.Array, jax.Array]:
            w = dense(r, layout, equation, {**trainable["w"], **r.frozen.theta.get("w", {})})
            return layout.apply(w, r.x), w

        @jax.jit
        def run(trainable: Any) -> Any:
            return [with_slopes(f, trainable) for f in (ours, oracle)]

        adapted, wanted = run(r.spread)
        assert_close(adapted, wanted, 1e-10)
        assert float(jnp.max(jnp.abs(wanted[0][1] - r.frozen.base["w"]))) > 1e-3


def with_slopes(f: Callable[[Any], Any], trainable: Any) -> tuple[Any, Any]:
    """Return the outputs of `f`, and the gradient of a weighted sum of the first of them."""

    def loss(t: Any) -> tuple[jax.Array, Any]:
        out = f(t)
        y = out[0]
        return jnp.sum(jnp.asarray(np.cos(np.arange(y.size)).reshape(y.shape), y.dtype) * y), out

    return jax.grad(loss, has_aux=True)(trainable)[::-1]
