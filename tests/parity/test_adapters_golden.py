"""Bottleneck adapters, prefixes and MAM against AdapterHub's `adapters` on torch: recorded outputs and gradients.

See `adapters_golden.py`. What that library does otherwise: in its `SeqBnConfig` an adapter reads what comes out of the
layer norm behind its projection, where `Pfeiffer` reads what comes out of the projection (the row sets
`original_ln_before=False`); its `gelu` is the exact one; real tokens keep their positions behind a prefix, where here
they move on, as behind a cache in transformers (the rows pass positions that begin at -V).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="needs flax, which the models are written in")

from models.encoder_cases import inputs, write
from parity.adapters_golden import CASE, GOLDEN, ROWS, draw, weights
from support import assert_close

import jpeft
from jpeft.interop.pretrained import from_pretrained

OUT, DOWN = "layers/attention/out/kernel", "layers/mlp/down/kernel"
KEY, VALUE = "layers/attention/key/kernel", "layers/attention/value/kernel"
PLACES = {OUT: "attention.output.adapters", DOWN: "output.adapters"}
Numbers = Mapping[str, np.ndarray]


def layers(numbers: Numbers, place: str, name: str) -> np.ndarray:
    """One parameter of the adapters at a place, stacked over the layers."""
    return np.stack([numbers[f"encoder.layer.{i}.{place}.x.{name}"] for i in range(2)])


def bottleneck(numbers: Numbers, path: str) -> dict[str, np.ndarray]:
    get = lambda name: layers(numbers, PLACES[path], name)  # noqa: E731
    return {"down": get("adapter_down.0.weight").swapaxes(1, 2), "b_down": get("adapter_down.0.bias"),
            "up": get("adapter_up.weight").swapaxes(1, 2), "b_up": get("adapter_up.bias")}


def scaled(numbers: Numbers, path: str) -> dict[str, np.ndarray]:
    return {**bottleneck(numbers, path), "s": layers(numbers, PLACES[path], "scaling").reshape(2, -1)}


def learned(numbers: Numbers, path: str) -> dict[str, np.ndarray]:
    return {**scaled(numbers, path), "s": layers(numbers, PLACES[path], "scaling").reshape(2)}


def products(numbers: Numbers, path: str) -> dict[str, np.ndarray]:
    """The rule is one for the whole model there, and one for each leaf here."""
    get = lambda name: layers(numbers, PLACES[path], name)  # noqa: E731
    return {"a": numbers["shared_parameters.x.phm_rule"],
            "b_down": get("adapter_down.0.b"), "b_up": get("adapter_up.b"),
            **{f"{k}_{ours}": get(f"adapter_{at}.W_{theirs}") for k, at in (("down", "down.0"), ("up", "up"))
               for ours, theirs in (("s", "left"), ("t", "right"))}}


def prefix(numbers: Numbers, path: str) -> dict[str, np.ndarray]:
    """`[V, layers, key or value, H, K]` in one vector."""
    flat = next(v for k, v in numbers.items() if k.endswith("control_trans"))
    return {"p": flat.reshape(3, 2, 2, 2, 8)[:, :, int(path == VALUE)].swapaxes(0, 1)}


def beside(learned: bool = False) -> jpeft.ParallelAdapter:
    return jpeft.ParallelAdapter(bottleneck=4, input_of="../up/kernel", scaling=2.0, learned=learned)


Theta = Callable[[Numbers, str], dict[str, np.ndarray]]
HOULSBY, PREFIX = jpeft.Houlsby(bottleneck=4), jpeft.PrefixTuning(length=3)
COMPACTER = jpeft.Compacter(bottleneck=4, phm_dim=2)
OURS: dict[str, dict[str, tuple[jpeft.Method, Theta]]] = {
    "houlsby": {OUT: (HOULSBY, bottleneck), DOWN: (HOULSBY, bottleneck)},
    "pfeiffer": {DOWN: (jpeft.Pfeiffer(bottleneck=4), bottleneck)},
    "adapter plus": {DOWN: (jpeft.AdapterPlus(bottleneck=4), scaled)},
    "parallel": {DOWN: (beside(), bottleneck)},
    "learned": {DOWN: (beside(learned=True), learned)},
    "compacter": {OUT: (COMPACTER, products), DOWN: (COMPACTER, products)},
    "prefix": {KEY: (PREFIX, prefix), VALUE: (PREFIX, prefix)},
    "mam": {KEY: (PREFIX, prefix), VALUE: (PREFIX, prefix), DOWN: (beside(), bottleneck)},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found, params, _ = from_pretrained(write(CASE, tmp_path_factory.mktemp("adapters")))
    return found, params


@pytest.fixture(scope="module")
def recorded() -> Any:
    return np.load(GOLDEN)


@pytest.mark.parametrize("row", [
    pytest.param(name, marks=() if name == "pfeiffer" else pytest.mark.slow) for name in ROWS])
def test_equals_the_recorded_outputs(model: Any, recorded: Any, row: str) -> None:
    (encoder, params), batch = model, inputs(CASE)
    base = encoder.apply(params, **batch).hidden
    rules = {path: method for path, (method, _) in OURS[row].items()}
    tokens = jpeft.Tokens(ids="tokens", mask="attention_mask", positions="positions")
    if KEY in rules:
        batch["positions"] = np.broadcast_to(np.arange(9, dtype=np.int32) - 3, (3, 9))
    plan = jpeft.plan(encoder.apply, params, (), rules, example_kwargs=batch, tokens=tokens)
    start, frozen = jpeft.init(plan, params, jax.random.key(0))
    slope = {k.removeprefix(f"{row}|"): recorded[k] for k in recorded.files if k.startswith(f"{row}|")}
    value = {name: draw(row, name, grad.shape) for name, grad in slope.items()}
    theta, want = ({path: {k: jnp.asarray(v) for k, v in make(numbers, path).items()}
                    for path, (_, make) in OURS[row].items()} for numbers in (value, slope))
    assert jax.tree.map(jnp.shape, theta) == jax.tree.map(jnp.shape, start)
    adapted = jpeft.adapt(encoder.apply, plan)

    @jax.jit
    def run(theta: Any) -> Any:
        def loss(t: Any) -> Any:
            hidden = adapted(t, frozen, **batch).hidden
            return jnp.sum(hidden * weights(hidden.shape)), hidden

        return jax.grad(loss, has_aux=True)(theta)

    grads, hidden = run(theta)
    assert float(jnp.abs(hidden - base).max()) > 0.1
    assert_close(hidden, jnp.asarray(recorded[f"{row}|hidden"]), 1e-5)
    if row == "compacter":
        assert_close(grads[OUT].pop("a") + grads[DOWN].pop("a"), want[OUT].pop("a"), 1e-5)
        want[DOWN].pop("a")
    assert_close(grads, want, 1e-5)
