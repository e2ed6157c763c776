"""VeRA against its equation, and the projections that all leaves share."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import LINEAR, PLAIN, Layout, check, prepare, sample
from support import assert_close

import jpeft
from jpeft.errors import MethodConfigError

VERA = jpeft.VeRA(rank=5, d_initial=0.3)


def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    a, b = theta["a0"].reshape(-1, 5), theta["b0"].reshape(5, -1)
    return w + a @ jnp.diag(theta["d"]) @ b @ jnp.diag(theta["b"].reshape(-1))


@pytest.mark.parametrize(**sample(LINEAR[4], *LINEAR))
def test_equation(layout: Layout) -> None:
    check(VERA, layout, equation)


def test_projections_drawn_again_are_those_that_were_saved() -> None:
    saved, drawn = (prepare(dataclasses.replace(VERA, save_projection=save), PLAIN) for save in (True, False))
    assert drawn.frozen.theta == {}
    merged = [jpeft.merge(r.plan, saved.spread, r.frozen)["w"] for r in (saved, drawn)]
    assert_close(merged[1], merged[0], 1e-6)  # two programs: they may round differently


def test_leaves_share_their_projections_up_to_scale() -> None:
    params = {"u": jnp.ones((8, 6)), "w": jnp.ones((6, 4))}
    plan = jpeft.plan(lambda p, x: x @ p["u"] @ p["w"], params, (jnp.ones((2, 8)),), {".*": VERA})
    theta = jpeft.init(plan, params, jax.random.key(3))[1].theta
    np.testing.assert_allclose(theta["u"]["a0"][:6] * 8**0.5, theta["w"]["a0"] * 6**0.5, rtol=1e-6)
    np.testing.assert_allclose(theta["u"]["b0"][:, :4], theta["w"]["b0"], rtol=1e-6)
    assert 0.7 < np.std(theta["u"]["a0"]) / (2 / 8) ** 0.5 < 1.3


@pytest.mark.parametrize("fields", [{"rank": 0}, {"dropout": 1.0}])
def test_fields(fields: dict[str, int]) -> None:
    with pytest.raises(MethodConfigError, match=r"; (use|give)"):
        jpeft.VeRA(**fields)
