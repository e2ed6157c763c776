import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jpeft import optim
from jpeft.core.partition import partition
from jpeft.errors import NoMatchError, PlanError


def theta():
    key = jax.random.key(0)
    shapes = {
        "h/0/q/kernel": {"a": (4, 2), "b": (2, 4), "m": (1, 4)},
        "h/1/q/kernel": {"a": (3, 4, 2), "b": (3, 2, 4)},
        "h/1/q/bias": {"b": (3, 4)},
        "h/1/scale": {"l": (3, 4)},
        "x~1y": {"down": (4, 2), "up": (2, 4), "gate": (), "down_bias": (3, 2)},
        "h/2/bias": {"w": (3, 4)},
    }
    return {
        path: {letter: jax.random.normal(key, shape) for letter, shape in letters.items()}
        for path, letters in shapes.items()
    }


FAST = {("h/0/q/kernel", "b"), ("h/1/q/kernel", "b")}
DECAYED = {*FAST, ("h/0/q/kernel", "a"), ("h/1/q/kernel", "a"), ("x~1y", "down"), ("x~1y", "up")}


def chosen(tree, value=True):
    return {(path, letter) for path, letters in tree.items() for letter, v in letters.items() if v == value}


def test_decay_mask():
    assert chosen(optim.decay_mask(theta())) == DECAYED


def test_decay_mask_of_model_parameters():
    params = {"layers": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4)), "scale": jnp.ones((3, 4))}}
    assert optim.decay_mask(params) == {"layers": {"kernel": True, "bias": False, "scale": False}}


def test_decay_mask_keeps_holes():
    tree = {"w": {"a": optax.MaskedNode(), "b": jnp.ones((2, 4))}, "c": {"b": jnp.ones((2, 4))}}
    assert optim.decay_mask(tree) == {"w": {"a": optax.MaskedNode(), "b": True}, "c": {"b": False}}


def test_labels():
    got = optim.labels(
        theta(), {"h/0/.*": "first", lambda name, leaf: leaf.ndim == 0: "gates", "x~1y/.*": "odd"}, "rest"
    )
    assert chosen(got, "first") == {("h/0/q/kernel", letter) for letter in "abm"}
    assert chosen(got, "gates") == {("x~1y", "gate")}
    assert chosen(got, "odd") == {("x~1y", "down"), ("x~1y", "up"), ("x~1y", "down_bias")}
    assert len(chosen(got, "rest")) == 5
    assert jax.tree.structure(got) == jax.tree.structure(theta())


def test_labels_errors():
    with pytest.raises(NoMatchError, match=r"'h/0/q/kernel/c' matches no leaf.*'h/0/q/kernel/"):
        optim.labels(theta(), {"h/0/q/kernel/c": "x"})
    with pytest.raises(NoMatchError, match="comes too late"):
        optim.labels(theta(), {".*": "x", ".*/b": "y"})
    with pytest.raises(PlanError, match="not a regular expression"):
        optim.labels(theta(), {"*": "x"})


def adamw(params, gradients, rates, decay, steps, b1=0.9, b2=0.999, eps=1e-8):
    """AdamW by hand on one array, `rates[t]` the learning rate of step t."""
    p, m, v = (np.asarray(x, np.float64) for x in (params, np.zeros(params.shape), np.zeros(params.shape)))
    g = np.asarray(gradients, np.float64)
    for t in range(1, steps + 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        update = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        p = p - rates[t - 1] * (update + decay * p)
    return p


def run(tx, params, gradients, steps):
    step = jax.jit(lambda p, s: (lambda u, s: (optax.apply_updates(p, u), s))(*tx.update(gradients, s, p)))
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.parametrize("early", [True, False])
def test_lora_plus_is_adamw_with_two_rates(early):
    params, schedule = theta(), optax.linear_schedule(1e-2, 0.0, 5)
    gradients = jax.tree.map(lambda x: jnp.cos(3 * x), params)
    tx = optim.lora_plus(
        schedule, ratio=8.0, trainable=params if early else None, weight_decay=0.1, mask=optim.decay_mask
    )
    trained, state = run(tx, params, gradients, 3)
    rates = np.array([1e-2, 0.8e-2, 0.6e-2])
    for path, letters in params.items():
        for letter, p in letters.items():
            expected = adamw(
                p,
                gradients[path][letter],
                rates * (8 if (path, letter) in FAST else 1),
                0.1 * ((path, letter) in DECAYED),
                3,
            )
            np.testing.assert_allclose(trained[path][letter], expected, rtol=2e-5, atol=2e-6)
    slots = sum(x.size for x in jax.tree.leaves(state) if x.ndim or x.dtype == jnp.float32)
    assert slots == 2 * sum(x.size for x in jax.tree.leaves(params))


def test_lora_plus_with_another_base_and_a_traced_rate():
    params = theta()
    ones = jax.tree.map(jnp.ones_like, params)

    @jax.jit
    def step(rate):
        tx = optim.lora_plus(rate, ratio=4.0, base=functools.partial(optax.sgd, momentum=0.9))
        return tx.update(ones, tx.init(params), params)[0]

    for path, letters in step(0.5).items():
        for letter, update in letters.items():
            np.testing.assert_allclose(update, -2.0 if (path, letter) in FAST else -0.5)


def test_lora_plus_on_a_part():
    params = theta()
    part, _ = partition(params, jax.tree.map(lambda x: x.ndim == 2, params))
    tx = optax.chain(optax.clip_by_global_norm(1e9), optim.lora_plus(1.0, ratio=4.0, base=optax.sgd))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, part), tx.init(part), part)
    assert jax.tree.structure(updates) == jax.tree.structure(part)
    assert float(updates["h/0/q/kernel"]["b"][0, 0]) == -4.0
    assert float(updates["h/1/q/bias"]["b"][0, 0]) == -1.0
    assert isinstance(updates["h/1/q/kernel"]["b"], optax.MaskedNode)


def test_lora_plus_needs_a_pair():
    vectors = {"w": {"l": jnp.ones(3)}, "v": {"b": jnp.ones(3)}}
    with pytest.raises(NoMatchError, match="'b' beside an entry 'a'"):
        optim.lora_plus(1e-3, trainable=vectors)
    with pytest.raises(NoMatchError, match="LoRA-like"):
        optim.lora_plus(1e-3).init(vectors)
