"""LoRA on a quantised weight: NF4 and LoftQ's alternation, against both written out in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import LINEAR, PLAIN, Layout, check, prepare, sample
from support import x64

import jpeft
from jpeft.errors import MethodConfigError
from jpeft.methods import _nf4

R = 2


def nearest(w: np.ndarray) -> np.ndarray:
    """The 4-bit values that are nearest to `w` `[in, out]`, output after output in blocks of 64."""
    flat = w.T.reshape(-1)
    blocks = [flat[i:i + 64] for i in range(0, len(flat), 64)]
    sizes = [np.abs(b).max() for b in blocks]
    return np.concatenate([s * _nf4.VALUES[np.abs(b[:, None] / s - _nf4.VALUES).argmin(1)]
                           for b, s in zip(blocks, sizes, strict=True)]).reshape(w.shape[::-1]).T


def alternate(w: np.ndarray, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    part = np.zeros_like(w)
    for _ in range(rounds):
        q = nearest(w - part)
        u, s, vt = np.linalg.svd(w - q, full_matrices=False)
        part = u[:, :R] * s[:R] @ vt[:R]
    return q, part


@pytest.mark.parametrize("shape", [(24, 10), (5, 3)])
@pytest.mark.parametrize("rounds", [1, 3])
def test_alternation(shape: tuple[int, int], rounds: int) -> None:
    """Two blocks and a part of a third, and a part of one."""
    with x64():
        w = np.random.RandomState(0).standard_normal(shape)
        layout = Layout("any", shape, (0,), (1,), (), (2, shape[0]), PLAIN.apply)
        r = prepare(jpeft.LoRA(rank=R, alpha=3, init_weights=f"loftq_iter_{rounds}"), layout, jnp.float64)
        trainable, frozen = jpeft.init(r.plan, {"w": jnp.asarray(w)}, jax.random.key(0))
        q, part = alternate(w, rounds)
        t = frozen.theta["w"]
        np.testing.assert_allclose(t["scale"] * trainable["w"]["a"] @ trainable["w"]["b"], part, atol=1e-12)
        np.testing.assert_allclose(jpeft.merge(r.plan, trainable, frozen)["w"], q + part, atol=1e-12)
        assert t["q"].dtype == np.uint8
        assert t["q"].size == 32 * -(-w.size // 64)


def test_it_starts_closer_than_by_quantising_alone() -> None:
    w = np.random.RandomState(1).standard_normal((24, 10)).astype(np.float32)
    layout = Layout("any", w.shape, (0,), (1,), (), (2, 24), PLAIN.apply)
    gaps = []
    for init in ("loftq_iter_1", "loftq"):
        plan = prepare(jpeft.LoRA(rank=4, init_weights=init), layout).plan
        merged = jpeft.merge(plan, *jpeft.init(plan, {"w": jnp.asarray(w)}, jax.random.key(0)))["w"]
        gaps.append(float(np.linalg.norm(merged - w)))
    alone = float(np.linalg.norm(nearest(w) - w))
    assert gaps[1] < gaps[0] < alone
    assert gaps[1] < 0.6 * alone


@pytest.mark.parametrize(**sample(LINEAR[4], *LINEAR))
def test_equation(layout: Layout) -> None:
    """The leaf itself is read no more: only its dtype counts."""
    def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
        q = _nf4.dequantise(theta["q"], theta["absmax"], w.size).reshape(w.shape[::-1]).T
        return q + theta["scale"] * theta["a"].reshape(-1, R) @ theta["b"].reshape(R, -1)

    check(jpeft.LoRA(rank=R, alpha=3, init_weights="loftq_iter_1"), layout, equation)


def test_mistakes() -> None:
    with pytest.raises(MethodConfigError, match="use LoRA, or another init"):
        jpeft.DoRA(init_weights="loftq")
    with pytest.raises(MethodConfigError, match="is unknown; use one of"):
        jpeft.LoRA(init_weights="loftq_iter_0")
    with pytest.raises(MethodConfigError, match="put it first"):
        jpeft.Chain((jpeft.IA3(), jpeft.LoRA(init_weights="loftq")))
    with pytest.raises(MethodConfigError, match="has the ranks"):
        prepare(jpeft.LoRA(rank=(1, 2, 1), init_weights="loftq"), LINEAR[4])
    params, x = {"w": jnp.ones((3, 8, 8))}, jnp.ones((2, 8))
    with pytest.raises(MethodConfigError, match="cannot be limited to some"):
        jpeft.plan(lambda p, x: LINEAR[4].apply(p["w"], x), params, (x,),
                   {jpeft.layers("w", [0]): jpeft.LoRA(rank=2, init_weights="loftq")})
