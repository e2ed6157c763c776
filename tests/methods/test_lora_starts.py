"""Starts of LoRA's factors from a random projection, from inputs and from a gradient; LoRA-FA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import LINEAR, LOOKUP, PLAIN, Layout, check, prepare, sample
from support import assert_close, randomise, x64

import jpeft
from jpeft.errors import CallError, MethodConfigError

L, D, O, N = 2, 8, 6, 40  # noqa: E741
PARAMS = {"u": (L, D, D), "w": (D, O)}


def apply(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(jax.checkpoint(lambda h, v: (h + jnp.tanh(h @ v), None)), x, p["u"])[0] @ p["w"]


def inputs(p: Any, x: jax.Array) -> list[jax.Array]:
    """What each layer of `u`, then `w`, sees."""
    seen = [x]
    for v in p["u"]:
        seen.append(seen[-1] + jnp.tanh(seen[-1] @ v))
    return seen


def loss(p: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(apply(p, x) - 1))


def begin(init: str, dtype: Any = jnp.float64, **fields: Any) -> tuple[jpeft.Plan, Any, Any, jpeft.Frozen, list[Any]]:
    params = randomise({k: jnp.zeros(s, dtype) for k, s in PARAMS.items()}, 1, 0.4)
    batches = [randomise(jnp.zeros((N, D), dtype), i, 1.0) * jnp.arange(1, D + 1, dtype=dtype) for i in (2, 3)]
    plan = jpeft.plan(apply, params, (batches[0],), {".*": jpeft.LoRA(rank=2, alpha=3, init_weights=init, **fields)})
    fn = loss if init == "lora_ga" else apply
    data = jpeft.Calibration(fn, [(batches[0],), {"x": batches[1]}])
    return plan, params, *jpeft.init(plan, params, jax.random.key(0), calibration=data), batches


def span(a: Any) -> np.ndarray:
    q = np.linalg.qr(np.asarray(a))[0]
    return q @ q.T


def test_randomised_svd_finds_the_principal_part() -> None:
    with x64():
        exact, fast = (prepare(jpeft.LoRA(rank=2, init_weights=i), PLAIN, jnp.float64)
                       for i in ("pissa", "pissa_niter_4"))
        for r in (exact, fast):
            assert_close(jpeft.merge(r.plan, r.start, r.frozen), r.frozen.base, 1e-12)
        parts = [np.asarray(r.start["w"]["a"] @ r.start["w"]["b"]) for r in (exact, fast)]
        np.testing.assert_allclose(parts[1], parts[0], atol=1e-10)
    with pytest.raises(MethodConfigError, match="pissa_niter_4"):
        jpeft.LoRA(init_weights="pissa_niter_x")


def test_eva_follows_the_inputs() -> None:
    with x64():
        _, params, trainable, _, batches = begin("eva")
        rows = [np.concatenate(pair) for pair in zip(*(inputs(params, x) for x in batches), strict=True)]
        for a, x in zip([*trainable["u"]["a"], trainable["w"]["a"]], rows, strict=True):
            top = np.linalg.svd(x)[2][:2].T
            np.testing.assert_allclose(span(a), span(top), atol=1e-8)
        assert not np.any(trainable["u"]["b"])


def test_inputs_that_nothing_depends_on_are_left_out() -> None:
    params, x = {"w": jnp.ones((4, 3))}, jnp.diag(jnp.arange(1.0, 5.0))
    first = lambda p, x: (x @ p["w"])[:2]  # noqa: E731
    plan = jpeft.plan(first, params, (x,), {"w": jpeft.LoRA(rank=1, init_weights="eva")})
    a = jpeft.init(plan, params, jax.random.key(0), calibration=jpeft.Calibration(first, [(x,)]))[0]["w"]["a"]
    np.testing.assert_allclose(np.abs(a[:, 0]), [0, 1, 0, 0], atol=1e-6)


@pytest.mark.parametrize("init", ["corda", "corda_kpm"])
def test_corda_splits_the_weight_as_the_inputs_see_it(init: str) -> None:
    with x64():
        plan, params, trainable, frozen, batches = begin(init)
        assert_close(jpeft.merge(plan, trainable, frozen), params, 1e-9)
        x = np.concatenate([inputs(params, b)[-1] for b in batches])
        c = x.T @ x
        c = c + 0.01 * np.trace(c) / D * np.eye(D)
        u, s, vt = np.linalg.svd(c @ np.asarray(params["w"]), full_matrices=False)
        part = slice(-2, None) if init == "corda_kpm" else slice(2)
        want = np.linalg.inv(c) @ (u[:, part] * s[part]) @ vt[part]
        np.testing.assert_allclose(1.5 * trainable["w"]["a"] @ trainable["w"]["b"], want, atol=1e-8)


def test_lora_ga_follows_the_gradient() -> None:
    with x64():
        plan, params, trainable, frozen, batches = begin("lora_ga")
        assert_close(jpeft.merge(plan, trainable, frozen), params, 1e-9)
        slopes = [jax.grad(loss)(params, x) for x in batches]
        slope = np.mean([s["w"] for s in slopes], 0)
        u, _, vt = np.linalg.svd(slope)
        np.testing.assert_allclose(span(trainable["w"]["a"]), span(u[:, :2]), atol=1e-8)
        np.testing.assert_allclose(span(trainable["w"]["b"].T), span(vt[2:4].T), atol=1e-8)
        np.testing.assert_allclose(np.sum(np.square(trainable["w"]["a"]), 0), np.full(2, O**0.5 / 16), rtol=1e-10)


def test_mistakes() -> None:
    with pytest.raises(CallError, match="pass calibration="):
        prepare(jpeft.LoRA(rank=2, init_weights="eva"), PLAIN)
    with pytest.raises(MethodConfigError, match="what a contraction weight sees"):
        prepare(jpeft.LoRA(rank=2, init_weights="eva"), LOOKUP[0])
    with pytest.raises(MethodConfigError, match="rank up to 3"):
        prepare(jpeft.LoRA(rank=4, init_weights="lora_ga"), PLAIN)
    x, params = jnp.ones((2, 8)), {"w": jnp.ones((8, 6))}
    model = lambda p, x: x @ p["w"]  # noqa: E731
    for init, batches, text in (("eva", [], "no batches"), ("eva", [x], "as a tuple"), ("lora_ga", [(x,)], "a scalar")):
        plan = jpeft.plan(model, params, (x,), {"w": jpeft.LoRA(rank=2, init_weights=init)})
        with pytest.raises(CallError, match=text):
            jpeft.init(plan, params, jax.random.key(0), calibration=jpeft.Calibration(model, batches))


def test_a_chain_passes_data_on() -> None:
    params, x = {"w": jnp.ones((8, 6))}, randomise(jnp.zeros((9, 8)), 2, 1.0)
    model = lambda p, x: x @ p["w"]  # noqa: E731
    chain = jpeft.Chain((jpeft.LoRAFA(rank=2, init_weights="eva"), jpeft.IA3()))
    plan = jpeft.plan(model, params, (x,), {"w": chain})
    frozen = jpeft.init(plan, params, jax.random.key(0), calibration=jpeft.Calibration(model, [(x,)]))[1]
    np.testing.assert_allclose(span(frozen.theta["w"]["0.a"]), span(np.linalg.svd(np.asarray(x))[2][:2].T), atol=1e-5)


@pytest.mark.parametrize(**sample(LINEAR[4], *LINEAR))
def test_lora_fa(layout: Layout) -> None:
    check(jpeft.LoRAFA(rank=2, alpha=3), layout, lambda t, w: w + t["scale"] * (
        t["a"].reshape(-1, 2) @ t["b"].reshape(2, -1)))
    assert set(prepare(jpeft.LoRAFA(rank=2), layout).start["w"]) == {"b"}
