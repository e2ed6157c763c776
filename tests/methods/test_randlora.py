"""RandLoRA against its sum, on both sides of square; its bases."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import LINEAR, PLAIN, Layout, check, prepare, sample

import jpeft
from jpeft.errors import MethodConfigError

WIDE = Layout("wide", (4, 10), (0,), (1,), (), (3, 4), lambda w, x: x @ w)


def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    a, b = theta["a0"].T, theta["b0"]
    terms = [b[:, n] @ jnp.diag(theta["lambda"][n]) @ a @ jnp.diag(theta["gamma"][n]) for n in range(b.shape[1])]
    change = theta["scale"] * sum(terms)
    return w + (change.T if w.shape[0] <= w.shape[1] else change)


@pytest.mark.parametrize(**sample(LINEAR[4], *LINEAR, WIDE))
def test_equation(layout: Layout) -> None:
    check(jpeft.RandLoRA(rank=4, randlora_alpha=2), layout, equation)


def test_bases() -> None:
    r = prepare(jpeft.RandLoRA(rank=4), PLAIN)
    assert {k: v.shape for k, v in r.theta.items() if k != "scale"} == {
        "a0": (6, 4), "b0": (8, 2, 4), "lambda": (2, 4), "gamma": (2, 6)}
    drawn = prepare(jpeft.RandLoRA(rank=4, save_projection=False), PLAIN)
    assert set(drawn.frozen.theta["w"]) == {"scale"}
    np.testing.assert_array_equal(jpeft.merge(r.plan, r.spread, r.frozen)["w"],
                                  jpeft.merge(drawn.plan, r.spread, drawn.frozen)["w"])
    site = r.plan.entries[0].site
    for fields, values in (({"sparse": True}, {0.0, 3**0.5}), ({"very_sparse": True}, {0.0, 6**0.25})):
        b = np.abs(jpeft.RandLoRA(rank=4, **fields)._bases(site)["b0"])
        assert {round(float(v), 5) for v in b.flat} == {round(v, 5) for v in values}


def test_one_kind_of_sparsity() -> None:
    with pytest.raises(MethodConfigError, match="set one"):
        jpeft.RandLoRA(sparse=True, very_sparse=True)
