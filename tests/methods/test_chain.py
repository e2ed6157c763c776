"""Chains: the order of nesting, their theta, and what they refuse."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from layouts import CONV, LINEAR, LOOKUP, PLAIN, RAGGED, Layout, check, each, prepare
from support import assert_close

import jpeft
from jpeft.errors import MethodConfigError

PAIR = jpeft.Chain((jpeft.LoRA(rank=2, alpha=3), jpeft.IA3()))


def pair(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
    change = theta["0.a"].reshape(-1, 2) @ theta["0.b"].reshape(2, -1)
    return (w + theta["0.scale"] * change) * theta["1.l"].reshape(1, -1)


@pytest.mark.parametrize(**each(PLAIN, LINEAR[5], RAGGED, CONV[1], *LOOKUP))
def test_a_later_method_acts_on_the_result(layout: Layout) -> None:
    check(PAIR, layout, pair)


def test_the_other_order() -> None:
    def equation(theta: dict[str, jax.Array], w: jax.Array) -> jax.Array:
        return w * theta["0.l"] + theta["1.scale"] * theta["1.a"] @ theta["1.b"]

    check(jpeft.Chain((jpeft.IA3(), jpeft.LoRA(rank=2))), PLAIN, equation)


def test_arrays_first_expressions_then_outputs() -> None:
    method = jpeft.Chain((jpeft.FourierFT(n_frequency=4), jpeft.Chain((jpeft.LoRA(rank=1), jpeft.OFT(blocks=2))),
                          jpeft.Pfeiffer(bottleneck=2)))
    r = prepare(method, PLAIN)
    assert r.theta.keys() == {"0.c", "0.loc", "0.scale", "1.0.a", "1.0.b", "1.0.scale", "1.1.q",
                            "2.down", "2.b_down", "2.up", "2.b_up"}
    assert method.hooks
    assert not method.dense
    assert_close(jpeft.adapt(lambda p, x: x @ p["w"], r.plan)(r.start, r.frozen, r.x), r.x @ r.frozen.base["w"], 1e-5)


def test_json_and_totals() -> None:
    r = prepare(PAIR, LINEAR[4])
    assert jpeft.Plan.from_json(json.loads(json.dumps(r.plan.to_json()))) == r.plan
    assert r.plan.count() == 3 * (2 * 16 + 8)
    assert PAIR.uses == {"linear", "conv", "embedding", "tied"}
    assert PAIR.recommended_lr == jpeft.LoRA.recommended_lr
    assert jpeft.Chain([jpeft.LoRA(rank=2, alpha=3), jpeft.IA3()]) == PAIR
    assert hash(PAIR) == hash(jpeft.Chain(PAIR.methods))


def test_layer_ranges_and_ranks_pass_through() -> None:
    ragged = jpeft.Chain((jpeft.LoRA(rank=(2, 0, 1)), jpeft.IA3()))
    r = prepare(ragged, LINEAR[4])
    assert r.plan.count() == 3 * 16 + 3 * 8
    layout = LINEAR[4]
    plan = jpeft.plan(lambda p, x: layout.apply(p["w"], x), r.frozen.base, (r.x,), {jpeft.layers("w", [1]): PAIR})
    assert plan.count() == 2 * 16 + 8
    frozen = jpeft.init(plan, r.frozen.base, jax.random.key(0))[1]
    merged = jpeft.merge(plan, prepare(PAIR, layout).spread, frozen)["w"]
    base = r.frozen.base["w"]
    assert_close(merged[jnp.asarray([0, 2])], base[jnp.asarray([0, 2])], 0.0)
    assert float(jnp.max(jnp.abs(merged[1] - base[1]))) > 0.01


MISTAKES: dict[str, tuple[Any, str]] = {
    "none": ((), "holds 0 methods"),
    "one": ((jpeft.LoRA(),), "Chain of LoRA holds 1 methods"),
    "a class": ((jpeft.LoRA(), jpeft.IA3), "give instances"),
    "an output before a weight": ((jpeft.Pfeiffer(), jpeft.LoRA()), "cannot be nested in this order"),
    "an expression before an array": ((jpeft.LoRA(), jpeft.FourierFT()), "cannot be nested in this order"),
    "Full later": ((jpeft.FourierFT(), jpeft.Full()), "Full after another method"),
    "DoRA later": ((jpeft.IA3(), jpeft.DoRA()), "DoRA after another method"),
    "no common leaf": ((jpeft.BitFit(), jpeft.LoRA()), "BitFit needs bias; LoRA needs conv or"),
    "two prompts": ((jpeft.PromptTuning(), jpeft.PromptTuning()), "virtual tokens before its last"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    methods, words = MISTAKES[mistake]
    with pytest.raises(MethodConfigError, match=words) as caught:
        jpeft.Chain(methods)
    assert "\n" not in str(caught.value)
