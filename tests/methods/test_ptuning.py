"""P-Tuning: the encoders, written out step by step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, randomise, x64

import jpeft
from jpeft.errors import MethodConfigError

V, D, H = 3, 4, 2


def prepare(method: jpeft.PTuning, dtype: Any = jnp.float64) -> Any:
    apply = lambda p, ids: jnp.cumsum(p["embed"][ids], 1)  # noqa: E731
    base, ids = {"embed": randomise(jnp.zeros((9, D), dtype), 1)}, jnp.asarray([[1, 2], [3, 4]])
    plan = jpeft.plan(apply, base, (ids,), {"embed": method}, tokens=jpeft.Tokens(ids=0))
    start, frozen = jpeft.init(plan, base, jax.random.key(0))
    return plan, base, ids, jpeft.adapt(apply, plan), randomise(start, 2), frozen


def mlp(t: Any, x: np.ndarray, layers: int) -> np.ndarray:
    for i in range(1, layers + 1):
        x = x @ t[f"w{i}"] + t[f"b{i}"]
        x = x if i == layers else np.maximum(x, 0)
    return x


def lstm(t: Any, name: str, x: np.ndarray) -> np.ndarray:
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    h, cell, rows = np.zeros(H), np.zeros(H), []
    for row in x:
        z = row @ t[f"{name}_x"] + h @ t[f"{name}_h"] + t[f"{name}_b"]
        i, f, g, o = (z[k * H:(k + 1) * H] for k in range(4))
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(cell)
        rows.append(h)
    return np.stack(rows)


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_encoder(encoder: str) -> None:
    with x64():
        plan, base, ids, adapted, spread, frozen = prepare(jpeft.PTuning(length=V, encoder=encoder, hidden_size=H))
        t = {k: np.asarray(v) for k, v in spread["embed"].items()}
        x = t["e"]
        if encoder == "LSTM":
            for i in range(2):
                x = np.concatenate([lstm(t, f"forward_{i}", x), lstm(t, f"backward_{i}", x[::-1])[::-1]], 1)
            assert plan.count() == V * D + 2 * 4 * H * (D + H + 1) + 2 * 4 * H * (3 * H + 1) + 16 + 4 + 16 + D
        prompt = mlp(t, x, 3 if encoder == "MLP" else 2)
        want = jnp.sum(jnp.asarray(prompt), 0) + jnp.cumsum(base["embed"][ids], 1)
        assert_close(adapted(spread, frozen, ids), want, 1e-10)


@pytest.mark.slow
def test_what_is_saved_goes_on_training(tmp_path: Any) -> None:
    """The encoder is part of the file."""
    plan, base, ids, adapted, spread, frozen = prepare(jpeft.PTuning(length=V, encoder="LSTM"), jnp.float32)
    jpeft.save(tmp_path, plan, spread, frozen)
    _, trainable, rest = jpeft.load(tmp_path, base)
    assert_close(trainable, spread, 0.0)
    slope = jax.grad(lambda t: jnp.sum(adapted(t, rest, ids)))(trainable)
    assert all(bool(jnp.any(v != 0)) for v in slope["embed"].values())


@pytest.mark.parametrize(("fields", "words"), [
    ({"encoder": "GRU"}, "'MLP' or 'LSTM'"), ({"hidden_size": 0}, "positive"), ({"num_layers": 0}, "positive"),
    ({"length": 0}, "1 or more"), ({"init_weights": "vocabulary"}, "use 'random'")])
def test_fields(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodConfigError, match=words):
        jpeft.PTuning(**fields)
