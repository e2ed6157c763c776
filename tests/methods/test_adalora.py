"""AdaLoRA against its equation; which ranks it keeps, against the paper's schedule and scores written out in numpy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layouts import CONV, LINEAR, PLAIN, Layout, check, prepare, sample
from support import assert_close, randomise

import jpeft
from jpeft.errors import CallError, MethodConfigError

L, I, R, O, STEPS = 3, 6, 4, 5, 12  # noqa: E741
ADA = jpeft.AdaLoRA(init_r=R, target_r=2, tinit=2, tfinal=3, deltaT=2, total_step=STEPS)


def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    r = theta["a"].shape[-1]
    return w + theta["scale"] * theta["a"].reshape(-1, r) @ jnp.diag(theta["e"] * theta["mask"]) \
        @ theta["b"].reshape(r, -1)


@pytest.mark.parametrize(**sample(LINEAR[4], *LINEAR, CONV[0]))
def test_equation(layout: Layout) -> None:
    check(jpeft.AdaLoRA(init_r=3, target_r=2), layout, equation)


def test_penalty() -> None:
    r = prepare(jpeft.AdaLoRA(init_r=3, target_r=2, orth_reg_weight=0.5), LINEAR[4])
    a, b = (np.asarray(r.theta[k], np.float64) for k in "ab")
    want = sum(np.sum((m.T @ m - np.eye(3)) ** 2) for m in (*a, *b.swapaxes(1, 2)))
    np.testing.assert_allclose(jpeft.penalty(r.plan, r.spread, r.frozen), 0.5 * want, rtol=1e-5)


def ready(rules: Any) -> tuple[jpeft.Plan, Any, jpeft.Frozen]:
    params = {"u": jnp.ones((L, I, I)), "w": jnp.ones((I, O))}

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, v: (h @ v, None), x, p["u"])[0] @ p["w"]

    plan = jpeft.plan(apply, params, (jnp.ones((2, I)),), rules)
    return plan, *jpeft.init(plan, params, jax.random.key(0))


class Reference:
    """The paper's algorithm, one triplet after the other."""

    def __init__(self) -> None:
        self.mean: dict[Any, float] = {}
        self.spread: dict[Any, float] = {}

    def score(self, key: Any, w: float, g: float, moving: bool) -> float:
        if moving:
            now = abs(w * g)
            self.mean[key] = 0.85 * self.mean.get(key, 0.0) + 0.15 * now
            self.spread[key] = 0.85 * self.spread.get(key, 0.0) + 0.15 * abs(now - self.mean[key])
        return self.mean[key] * self.spread[key]

    def keep(self, theta: Any, grads: Any, step: int) -> set[Any] | None:
        """The triplets that stay, or None between allocations."""
        end, scores = STEPS - 3, {}
        for path, layers in (("u", L), ("w", 1)):
            t, g = ({k: np.asarray(v, np.float64).reshape(layers, *v.shape[-(1 if k == "e" else 2):])
                     for k, v in tree[path].items()} for tree in (theta, grads))
            for layer in range(layers):
                for i in range(R):
                    s = lambda k, at: self.score((path, layer, k, at), t[k][at], g[k][at], step < end)  # noqa: B023, E731
                    scores[path, layer, i] = s("e", (layer, i)) \
                        + np.mean([s("a", (layer, n, i)) for n in range(t["a"].shape[1])]) \
                        + np.mean([s("b", (layer, i, n)) for n in range(t["b"].shape[2])])
        if not (2 < step < end and step % 2 == 0) and step != end:
            return None
        first, last = R * (L + 1), 2 * (L + 1)
        budget = int((first - last) * max(0.0, 1 - (step - 2) / (end - 2)) ** 3 + last)
        return set(sorted(scores, key=scores.__getitem__, reverse=True)[:budget])


def test_allocation_is_the_papers_and_is_traced_once() -> None:
    plan, trainable, frozen = ready({".*": ADA})
    state, reference, traces = jpeft.adalora_init(plan, trainable), Reference(), 0

    @jax.jit
    def update(*args: Any) -> Any:
        nonlocal traces
        traces += 1
        return jpeft.adalora_update(plan, *args)

    for step in range(1, STEPS + 1):
        trainable, grads = randomise(trainable, step), randomise(trainable, 100 + step)
        keep = reference.keep(trainable, grads, step)
        before = trainable
        trainable, frozen, state = update(trainable, frozen, grads, state, step)
        if keep is None:
            assert_close(trainable, before, 0.0)
        else:
            found = {(p, *((0,) if p == "w" else ()), *map(int, at)) for p in ("u", "w")
                     for at in zip(*np.nonzero(trainable[p]["e"]), strict=True)}
            assert found == keep
        alive = sum(float(frozen.theta[p]["mask"].sum()) for p in ("u", "w"))
        assert alive == ((L + 1) * R if step < STEPS - 3 else (L + 1) * 2)
    assert traces == 1


def test_layers_left_out_take_no_budget() -> None:
    method = jpeft.AdaLoRA(init_r=R, target_r=1, total_step=1)
    plan, trainable, frozen = ready({jpeft.layers("u", [0, 2]): method})
    grads = jax.tree.map(jnp.ones_like, trainable)
    state = jpeft.adalora_init(plan, trainable)
    mask = jpeft.adalora_update(plan, trainable, frozen, grads, state, 1)[1].theta["u"]["mask"]
    assert float(mask.sum()) == 2
    assert not np.any(mask[1])


def test_mistakes() -> None:
    plan, trainable, _ = ready({"w": jpeft.LoRA(rank=2)})
    with pytest.raises(CallError, match="no AdaLoRA"):
        jpeft.adalora_init(plan, trainable)
    plan, trainable, _ = ready({"w": jpeft.AdaLoRA(init_r=3, target_r=2)})
    with pytest.raises(MethodConfigError, match="total_step of the training"):
        jpeft.adalora_init(plan, trainable)
    for fields in ({"target_r": 13}, {"beta1": 1.0}, {"tinit": 5, "total_step": 5}):
        with pytest.raises(MethodConfigError, match="; use"):
            jpeft.AdaLoRA(**fields)
    with pytest.raises(MethodConfigError, match="init_r from 1 to 6"):
        prepare(jpeft.AdaLoRA(), PLAIN)


def test_an_optimiser_drops_the_same_ranks_and_is_traced_once() -> None:
    """`jpeft.optim.scheduled`, which learns the number of steps from the training, against `adalora_update`."""
    plan, trainable, frozen = ready({".*": dataclasses.replace(ADA, total_step=None)})
    known, theirs, _ = ready({".*": ADA})
    sgd, traces = optax.sgd(0.1), 0
    tx = jpeft.optim.scheduled(sgd, plan, STEPS)

    @jax.jit
    def step(ours: Any, state: Any, theirs: Any, frozen: Any, importance: Any, grads: Any, n: Any) -> Any:
        nonlocal traces
        traces += 1
        updates, state = tx.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        theirs = optax.apply_updates(theirs, sgd.update(grads, sgd.init(theirs), theirs)[0])
        return ours, state, *jpeft.adalora_update(known, theirs, frozen, grads, importance, n)

    state, importance = tx.init(trainable), jpeft.adalora_init(known, theirs)
    for n in range(1, STEPS + 1):
        grads = randomise(trainable, 100 + n)
        trainable, state, theirs, frozen, importance = step(trainable, state, theirs, frozen, importance, grads, n)
        want = {p: {**t, "e": t["e"] * frozen.theta[p]["mask"]} for p, t in theirs.items()}
        assert_close(trainable, want, 1e-6)
    assert sum(int(jnp.count_nonzero(t["e"])) for t in trainable.values()) == (L + 1) * 2
    assert traces == 1


def test_the_optimiser_reaches_into_a_chain() -> None:
    chain = jpeft.Chain((jpeft.AdaLoRA(init_r=R, target_r=1), jpeft.IA3()))
    plan, trainable, _ = ready({jpeft.layers("u", [0, 2]): chain})
    tx = jpeft.optim.scheduled(optax.sgd(0.1), plan, 1)

    @jax.jit
    def step(trainable: Any) -> Any:
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, trainable), tx.init(trainable), trainable)
        return optax.apply_updates(trainable, updates)

    after = step(trainable)["u"]
    assert int(jnp.count_nonzero(after["0.e"])) == 2
    assert not np.any(after["0.e"][1])
    assert np.all(np.asarray(after["1.l"]) != 1)


def test_mistakes_of_a_training() -> None:
    plan, trainable, _ = ready({"w": ADA})
    with pytest.raises(MethodConfigError, match=r"longer than the training of 5 steps.*leave total_step out"):
        jpeft.optim.scheduled(optax.sgd(0.1), plan, 5)
    tx = jpeft.optim.scheduled(optax.sgd(0.1), plan, STEPS)
    with pytest.raises(CallError, match="got no parameters"):
        tx.update(trainable, tx.init(trainable))
    other = ready({"w": jpeft.LoRA(rank=2)})[0]
    assert jpeft.optim.scheduled(tx, other, 5) is tx
