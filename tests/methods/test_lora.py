"""LoRA against its equation, in every layout; its inits, scales and ranks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import CONV, LINEAR, LOOKUP, PLAIN, RAGGED, Layout, check, dense, each, prepare
from support import assert_close, x64

import jpeft
from jpeft.errors import MethodConfigError


def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    a, b = theta["a"], theta["b"]
    r = a.shape[-1]
    change = a.reshape(-1, r) @ b.reshape(r, -1)
    if "a0" in theta:
        change = change - theta["a0"].reshape(-1, r) @ theta["b0"].reshape(r, -1)
    return w + theta["scale"] * change


@pytest.mark.parametrize(**each(*LINEAR, RAGGED, *CONV, *LOOKUP))
def test_equation(layout: Layout) -> None:
    check(jpeft.LoRA(rank=2, alpha=3), layout, equation)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(**each(PLAIN, LINEAR[5], CONV[0]))
def test_inits_from_the_weight(layout: Layout, init: str) -> None:
    """W does not change at the start; the frozen copies are the principal part of W, or columns of its QR."""
    method = jpeft.LoRA(rank=2, alpha=3, init_weights=init)
    check(method, layout, equation)
    with x64():
        r = prepare(method, layout, jnp.float64)
        assert_close(jpeft.merge(r.plan, r.start, r.frozen), r.frozen.base, 1e-12)
        assert_close({k: r.start["w"][k[0]] for k in ("a0", "b0")}, {k: r.theta[k] for k in ("a0", "b0")}, 0.0)

        def remainder(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
            part = w - equation({**theta, "a": theta["a0"], "b": theta["b0"], "a0": 0 * theta["a0"]}, 0 * w)
            return part @ part.T

        left = dense(r, layout, lambda theta, w: jnp.broadcast_to(jnp.trace(remainder(theta, w)), w.shape), r.theta)
        spectra = dense(r, layout, lambda theta, w: jnp.broadcast_to(
            jnp.sum(jnp.square(jnp.linalg.svd(w, compute_uv=False)[2:])), w.shape), r.theta)
        if init == "pissa":
            assert_close(left, spectra, 1e-10)
        else:
            q = np.asarray(r.theta["b0"])
            assert np.all(np.asarray(left) > np.asarray(spectra) - 1e-12)
            np.testing.assert_allclose(np.sum(np.square(q)), q.size / (q.shape[-1]), rtol=1e-10)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_inits_without_the_weight(init: str) -> None:
    r = prepare(jpeft.LoRA(rank=4, init_weights=init), PLAIN)
    a = np.asarray(r.start["w"]["a"])
    assert not np.any(r.start["w"]["b"])
    if init == "orthogonal":
        np.testing.assert_allclose(a.T @ a, np.eye(4), atol=1e-6)
    else:
        assert 0.5 < np.std(a) / {"kaiming": (3 * 8) ** -0.5, "gaussian": 1 / 4}[init] < 1.5


def test_an_embedding_starts_from_zero_rows() -> None:
    r = prepare(jpeft.LoRA(rank=2), LOOKUP[0])
    assert not np.any(r.start["w"]["a"])
    assert np.std(r.start["w"]["b"]) > 0.3


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_scale(rslora: bool, scale: float) -> None:
    r = prepare(jpeft.LoRA(rank=4, alpha=8, rslora=rslora), PLAIN)
    assert float(r.theta["scale"]) == scale


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_is_a_fraction(rate: float) -> None:
    with pytest.raises(MethodConfigError, match=r"not in \[0, 1\)"):
        jpeft.LoRA(dropout=rate)
