from collections import namedtuple
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jpeft.core.partition import combine, mask, partition
from jpeft.errors import NoMatchError, PartitionError, PlanError

Pair = namedtuple("Pair", ["w", "bias"])


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    w: jax.Array
    bias: jax.Array


class Module(eqx.Module):
    w: jax.Array
    inner: Pair
    bias: jax.Array
    name: str = eqx.field(static=True, default="m")


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)])


def arrays(n):
    return [jnp.full((2, 3), float(i)) for i in range(n)]


def trees():
    a = arrays(4)
    return {
        "dict": {"l": {"w": a[0], "bias": a[1]}, "m": {"w": a[2], "bias": a[3]}},
        "list": [{"w": a[0]}, ({"bias": a[1]}, None)],
        "namedtuple": Pair(a[0], {"bias": a[1]}),
        "dataclass": {"x": Layer(a[0], a[1]), "y": Layer(a[2], a[3])},
        "equinox": Module(a[0], Pair(a[1], a[2]), a[3]),
        "nnx": nnx.state(Net(nnx.Rngs(0))),
        "array": np.ones(3),
    }


@pytest.mark.parametrize("kind", trees())
def test_round_trip(kind):
    tree = trees()[kind]
    flags = mask(tree, [lambda path, leaf: True] if kind == "array" else ["(.*/)?bias"])
    assert jax.tree.structure(flags) == jax.tree.structure(tree)
    assert {type(flag) for flag in jax.tree.leaves(flags)} == {bool}
    selected, rest = partition(tree, flags)
    assert type(selected) is type(rest) is type(tree) or kind == "array"
    n = [len(jax.tree.leaves(t)) for t in (selected, rest, tree)]
    assert n[0] + n[1] == n[2]
    assert n[0] == sum(jax.tree.leaves(flags))
    for whole in (combine(selected, rest), combine(rest, selected)):
        assert jax.tree.structure(whole) == jax.tree.structure(tree)
        assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(tree), strict=True))


def test_first_match_wins_and_default_is_false():
    tree = {"a": {"w": 1, "b": 2}, "c": {"w": 3, "b": 4}, "d": 5}
    got = mask(tree, {"a/b": False, ".*/b": True, lambda path, leaf: leaf == 3: True})
    assert got == {"a": {"w": False, "b": False}, "c": {"w": True, "b": True}, "d": False}
    assert mask(tree, "d") == mask(tree, ["d"]) == mask(tree, {"d": np.True_})
    assert not any(jax.tree.leaves(mask(tree, {})))


def test_mask_errors():
    tree = {"layer": {"kernel": 1, "bias": 2}}
    with pytest.raises(NoMatchError, match=r"'layer/kernal' matches no leaf.*'layer/kernel'"):
        mask(tree, ["layer/kernal"])
    with pytest.raises(NoMatchError, match="matches no leaf"):
        mask(tree, ["kernel"])
    with pytest.raises(NoMatchError, match=r"'layer/bias' comes too late.*'layer/bias'"):
        mask(tree, {".*": True, "layer/bias": False})
    with pytest.raises(NoMatchError, match=r"test_mask_errors.*matches no leaf"):
        mask(tree, [lambda path, leaf: False])
    with pytest.raises(PlanError, match="not a regular expression"):
        mask(tree, ["(.*"])
    with pytest.raises(PlanError, match="True or False"):
        mask(tree, {".*": 1})


def test_partition_errors():
    tree = {"a": 1.0, "b": {"c": 2.0}}
    with pytest.raises(PartitionError, match="the mask has the leaf 'd'"):
        partition(tree, {"a": True, "b": {"c": True}, "d": True})
    with pytest.raises(PartitionError, match="the tree has the leaf 'b/c'"):
        partition(tree, {"a": True})
    with pytest.raises(PartitionError, match="holds 1 at 'b/c'"):
        partition(tree, {"a": True, "b": {"c": 1}})


def test_combine_errors():
    tree = {"a": 1.0, "b": {"c": 2.0}}
    selected, rest = partition(tree, mask(tree, ["a"]))
    with pytest.raises(PartitionError, match="'a' is in 2 parts"):
        combine(tree, rest | {"a": 1.0})
    with pytest.raises(PartitionError, match="'b/c' is in no part"):
        combine(selected, selected | {"a": optax.MaskedNode()})
    with pytest.raises(PartitionError, match=r"part 1 has the leaf 'b/c' \(1 such\) and part 2 has not"):
        combine(selected, {"a": optax.MaskedNode()})
    with pytest.raises(PartitionError, match="other containers"):
        combine([1.0, optax.MaskedNode()], (optax.MaskedNode(), 1.0))
    with pytest.raises(PartitionError, match="no tree"):
        combine()


def test_parts_of_parts():
    tree = {"a": 1.0, "b": 2.0, "c": 3.0}
    first, rest = partition(tree, mask(tree, ["a"]))
    second, third = partition(rest, mask(rest, ["b"]))
    assert combine(third, first, second) == tree


def test_mask_of_another_container():
    state = nnx.state(Net(nnx.Rngs(0)))
    flags = mask(nnx.to_pure_dict(state), [".*/bias"])
    selected, rest = partition(state, flags)
    assert type(selected) is type(state)
    assert jax.tree.structure(combine(selected, rest)) == jax.tree.structure(state)


@pytest.mark.parametrize("kind", ["dict", "equinox", "nnx"])
def test_training_the_selected_half(kind):
    tree = trees()[kind]
    selected, rest = partition(tree, mask(tree, ["(.*/)?bias"]))
    tx = optax.chain(optax.clip_by_global_norm(1e9), optax.adam(0.1))
    state = tx.init(selected)

    def size(t):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(t))

    assert size(state) == 2 * size(selected) + 4

    @jax.jit
    def step(selected, state, rest):
        def loss(selected):
            return sum(((x - 1.5) ** 2).sum() for x in jax.tree.leaves(combine(selected, rest)))

        gradients = jax.grad(loss)(selected)
        updates, state = tx.update(gradients, state, selected)
        return optax.apply_updates(selected, updates), state

    after, _ = step(selected, state, rest)
    trained = combine(after, rest)
    flags = jax.tree.leaves(mask(tree, ["(.*/)?bias"]))
    for flag, new, old in zip(flags, jax.tree.leaves(trained), jax.tree.leaves(tree), strict=True):
        np.testing.assert_allclose(new, old + 0.1 * np.sign(1.5 - old) * flag, atol=1e-5)


def test_partition_inside_jit():
    tree = {"a": jnp.ones(2), "b": jnp.zeros(3)}

    @jax.jit
    def swap(tree):
        return combine(*partition(tree, mask(tree, lambda path, leaf: leaf.shape == (2,))))

    assert jax.tree.all(jax.tree.map(np.array_equal, swap(tree), tree))
