"""Every model of the gallery: adapted equals merged, in values and gradients, and no adapted weight is ever formed."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from gallery import CASES, Case
from gallery.audit import dense_weights
from support import assert_close, is_float, quick_compile, randomise, x64

import jpeft

TOL = {"float64": 1e-10, "float32": 1e-5}
SAME = {"float64": 1e-12, "float32": 1e-6}
# Every case is planned and read in the default tier, every other one traced, every third compiled and compared.
ROWS = [pytest.param(c, t, id=f"{c.name}-{t}", marks=() if t == c.dtypes[0] and i % 3 == 0 else pytest.mark.slow)
        for i, c in enumerate(c for c in CASES if not c.error) for t in c.dtypes]
FIRST = [pytest.param(c, c.dtypes[0], id=c.name, marks=pytest.mark.slow if i % 2 else ())
         for i, c in enumerate(c for c in CASES if not c.error)]
ERRORS = [pytest.param(c, id=c.name) for c in CASES if c.error]
ROLES = [pytest.param(c, id=c.name) for c in CASES if c.expect]


class Ready(NamedTuple):
    """One case, planned and initialised; `start` is what init gives, `spread` has every entry random."""

    adapted: Callable[..., Any]
    args: tuple[Any, ...]
    start: Any
    spread: Any
    frozen: Any
    compare: Callable[..., Any]


def slope(leaf: jax.Array) -> jax.Array:
    return jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)


def measure(f: Callable[..., Any], reverse: bool, *primals: Any) -> tuple[Any, Any]:
    """Return `f(*primals)` and its derivatives: gradients of a weighted sum, or else the tangents of one jvp."""
    if not reverse:
        return jax.jvp(f, primals, jax.tree.map(slope, primals))

    def loss(*primals: Any) -> tuple[jax.Array, Any]:
        out = f(*primals)
        return sum(jnp.sum(slope(leaf) * leaf) for leaf in jax.tree.leaves(out) if is_float(leaf)), out

    return jax.grad(loss, argnums=tuple(range(len(primals))), has_aux=True)(*primals)[::-1]


def comparison(apply: Callable[..., Any], plan: Any, reverse: bool) -> Callable[..., Any]:
    """Return one jitted function: output and derivatives of the adapted and of the merged model, output of the base."""
    adapted = jpeft.adapt(apply, plan)

    def compare(trainable: Any, frozen: Any, args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        floats = {i: leaf for i, leaf in enumerate(leaves) if is_float(leaf)}

        def inputs(floats: dict[int, jax.Array]) -> Any:
            return jax.tree.unflatten(tree, [floats.get(i, leaf) for i, leaf in enumerate(leaves)])

        ours = measure(lambda t, x: adapted(t, frozen, *inputs(x)), reverse, trainable, floats)
        oracle = measure(lambda t, x: apply(jpeft.merge(plan, t, frozen), *inputs(x)), reverse, trainable, floats)
        return ours, oracle, apply(jpeft.base(plan, frozen), *args)

    return jax.jit(compare, compiler_options=quick_compile())


@functools.cache
def ready(case: Case, dtype: str) -> Ready:
    apply, params, args = case.make(jnp.dtype(dtype))
    plan = jpeft.plan(apply, params, args, case.rules)
    start, frozen = jpeft.init(plan, params, jax.random.key(0))
    compare = comparison(apply, plan, case.reverse)
    return Ready(jpeft.adapt(apply, plan), args, start, randomise(start, seed=1), frozen, compare)


@pytest.fixture(autouse=True)
def setting(request: pytest.FixtureRequest) -> Any:
    """Enter the dtype and the mesh of the case."""
    params = request.node.callspec.params
    with x64(params.get("dtype") == "float64"), params["case"].context():
        yield


@pytest.mark.parametrize(("case", "dtype"), ROWS)
def test_adapted_equals_merged(case: Case, dtype: str) -> None:
    r = ready(case, dtype)
    assert len(r.start) == case.n_adapted, f"adapted: {sorted(r.start)}"
    tol = case.tol or TOL[dtype]
    (out, slopes), (merged, oracle), base = r.compare(r.spread, r.frozen, r.args)
    assert_close(out, merged, tol, "output")
    assert_close(slopes, oracle, tol, "derivative")
    with pytest.raises(AssertionError, match="max"):
        assert_close(out, base, 1e-3)


@pytest.mark.parametrize(("case", "dtype"), ROWS)
def test_nothing_changes_at_init(case: Case, dtype: str) -> None:
    r = ready(case, dtype)
    (out, _), _, base = r.compare(r.start, r.frozen, r.args)
    assert_close(out, base, case.tol or SAME[dtype], "output")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), [row for row in FIRST if row.values[0].reverse])
def test_every_leaf_learns(case: Case, dtype: str) -> None:
    r = ready(case, dtype)
    (_, (gradient, _)), _, _ = r.compare(r.spread, r.frozen, r.args)
    for path, entries in gradient.items():
        still = any(re.fullmatch(p, path) for p in case.still)
        for letter, value in entries.items():
            assert bool(jnp.any(value != 0)) != still, f"{path}: gradient of {letter}"


@pytest.mark.parametrize(("case", "dtype"), FIRST)
def test_no_dense_weight(case: Case, dtype: str) -> None:
    r = ready(case, dtype)
    assert dense_weights(r.adapted, r.spread, r.frozen, *r.args) == []


@pytest.mark.parametrize("case", ROLES)
def test_roles(case: Case) -> None:
    apply, params, args = case.make(jnp.float32)
    sites = jpeft.inspect(apply, params, args)
    for path, (ins, outs, stack, use) in case.expect.items():
        site = sites[path]
        assert not site.problems, site
        for name, want, got in (
            ("use", use, site.use),
            ("in", ins, site.in_dims),
            ("out", outs, site.out_dims),
            ("stack", stack, site.stack_dims),
        ):
            assert want is None or want == got, f"{path}: {name} is {got}, not {want}: {site}"


@pytest.mark.parametrize("case", ERRORS)
def test_documented_errors(case: Case) -> None:
    apply, params, args = case.make(jnp.float32)

    def attempt() -> None:
        plan = jpeft.plan(apply, params, args, case.rules)
        trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
        jax.eval_shape(jpeft.adapt(apply, plan), trainable, frozen, *args)

    with pytest.raises(getattr(jpeft.errors, case.error or "")) as caught:
        attempt()
    missing = [word for word in case.words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert "\n" not in str(caught.value)
