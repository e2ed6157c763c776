"""LoKr against the Kronecker product, in every layout and decomposition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from layouts import LINEAR, LOOKUP, Layout, check, each, prepare

import jpeft
from jpeft.errors import MethodConfigError


def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    first, second = (theta[n] if n in theta else theta[f"{n}a"] @ theta[f"{n}b"] for n in ("w1", "w2"))
    return w + theta["scale"] * jnp.kron(first, second)


@pytest.mark.parametrize(**each(*LINEAR))
def test_equation(layout: Layout) -> None:
    check(jpeft.LoKr(rank=1, alpha=2), layout, equation)


WIDE = Layout("wide", (36, 24), (0,), (1,), (), (2, 36), lambda w, x: x @ w)
FORMS = {
    "square": (jpeft.LoKr(rank=2, alpha=3), {"w1": (6, 4), "w2a": (6, 2), "w2b": (2, 6)}),
    "both": (jpeft.LoKr(rank=2, alpha=3, decompose_both=True),
             {"w1a": (6, 2), "w1b": (2, 4), "w2a": (6, 2), "w2b": (2, 6)}),
    "full": (jpeft.LoKr(rank=3, decompose_both=True), {"w1": (6, 4), "w2": (6, 6)}),
    "factor": (jpeft.LoKr(rank=2, factor=12), {"w1": (12, 12), "w2": (3, 2)}),
    "no divisor": (jpeft.LoKr(rank=20, factor=5), {"w1": (4, 4), "w2": (9, 6)}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    method, shapes = FORMS[form]
    check(method, WIDE, equation)
    r = prepare(method, WIDE)
    assert {k: v.shape for k, v in r.start["w"].items()} == shapes
    zero = [k for k, v in r.start["w"].items() if not jnp.any(v)]
    assert zero == ["w1b" if "w1b" in shapes else "w1"]


def test_the_cheapest_order_is_stated() -> None:
    """36 = 6 x 6 inputs, 24 = 4 x 6 outputs, rank 2: w2a first, then w1 on the two columns, then w2b."""
    r = prepare(jpeft.LoKr(rank=2), WIDE)
    assert r.plan.entries[0].method.flops(r.plan.entries[0].site) == (2 * (6 * 6 * 2 + 6 * 2 * 4 + 4 * 2 * 6), 0)


@pytest.mark.parametrize("fields", [{"rank": 0}, {"factor": 0}, {"factor": -2}])
def test_fields(fields: dict[str, int]) -> None:
    with pytest.raises(MethodConfigError, match="; use"):
        jpeft.LoKr(**fields)


def test_contractions_only() -> None:
    with pytest.raises(jpeft.errors.WrongUseError, match="it needs linear"):
        prepare(jpeft.LoKr(), LOOKUP[0])
