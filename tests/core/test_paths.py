from collections import OrderedDict, namedtuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jpeft.core.paths import flatten, layer_index
from jpeft.errors import PathError

Pair = namedtuple("Pair", ["left", "right"])


class Attention(eqx.Module):
    query: jax.Array
    key: jax.Array
    value: jax.Array


@jax.tree_util.register_pytree_node_class
class Opaque:
    def __init__(self, *children):
        self.children = children

    def tree_flatten(self):
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])
        self.value = nnx.Param(jnp.zeros(3))
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


@pytest.mark.parametrize(
    ("tree", "paths"),
    [
        (1.0, ("",)),
        ({}, ()),
        ({"b": [1.0, {"c": 2.0}], "a": None}, ("b/0", "b/1/c")),
        (Pair(1.0, (2.0, 3.0)), ("left", "right/0", "right/1")),
        ({"x/y": 1.0, "x~": 2.0, "~1": 3.0}, ("x~1y", "x~0", "~01")),
        ({"mlp/~/linear_0": {"w": 1.0}}, ("mlp~1~0~1linear_0/w",)),
        ({3: {(1, 2): 1.0}}, ("3/(1, 2)",)),
        (Attention(1.0, 2.0, 3.0), ("query", "key", "value")),
        (Opaque(1.0, {"w": 2.0}), ("0", "1/w")),
        ({"w": nnx.Param(1.0), "b": nnx.Param({"value": 2.0})}, ("b/value", "w")),
        ({"k": nn.Partitioned(1.0, names=("x",))}, ("k",)),
    ],
)
def test_paths(tree, paths):
    got, leaves, treedef = flatten(tree)
    assert sorted(got) == sorted(paths)
    assert jax.tree.structure(treedef.unflatten(leaves)) == jax.tree.structure(tree)
    assert leaves == jax.tree.leaves(tree)


def test_nnx_state_has_the_paths_of_its_pure_dict():
    model = Block(nnx.Rngs(0))
    for state in (nnx.state(model), nnx.state(model, nnx.Param)):
        assert flatten(state)[0] == flatten(nnx.to_pure_dict(state))[0]
    assert "layers/1/kernel" in flatten(nnx.state(model))[0]
    assert "value" in flatten(nnx.state(model))[0]
    assert "drop/rngs/key" in flatten(nnx.state(model))[0]
    assert set(flatten(model)[0]) == set(flatten(nnx.state(model))[0])


def test_a_named_array_of_haliax_is_a_box():
    @jax.tree_util.register_pytree_node_class
    class NamedArray:
        def __init__(self, array):
            self.array = array

        def tree_flatten(self):
            return (self.array,), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    tree = {"stacked": {"weight": NamedArray(1.0)}}
    assert flatten(tree)[0] == ("stacked/weight/0",)
    NamedArray.__module__ = "haliax.core"
    assert flatten(tree)[0] == ("stacked/weight",)


def test_is_leaf_stops_the_descent():
    assert flatten({"a": (1, 2), "b": [3]}, is_leaf=lambda x: isinstance(x, tuple))[0] == ("a", "b/0")


def test_two_leaves_with_one_path():
    with pytest.raises(PathError, match=r"path 'a/1': \['a'\]\[1\] and \['a'\]\['1'\]"):
        flatten({"a": OrderedDict([(1, 0.0), ("1", 0.0)])})
    assert flatten({"a/b": 1.0, "a": {"b": 2.0}})[0] == ("a/b", "a~1b")


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("layers/3/kernel", 3),
        ("params/transformer/h/11/attn/kernel", 11),
        ("params/layers_3/self_attn/q_proj/kernel", 3),
        ("TransformerBlock_2/Dense_0/kernel", 2),
        ("params/LlamaDecoderLayer_7/w", 7),
        ("encoderblock_1/MlpBlock_0/Dense_1/kernel", 1),
        ("block3/conv1/kernel", 3),
        ("h_4/w", 4),
        ("layers_2/experts/5/kernel", 2),
        ("encoder/block/3/layer/0/SelfAttention/q", 3),
        ("transformer~1~0~1layer_5~1linear/w", 5),
        ("model.layers.4.self_attn.q_proj.weight", 4),
        ("Dense_0/kernel", None),
        ("conv2/kernel", None),
        ("LayerNorm_0/scale", None),
        ("layer_norm/scale", None),
        ("embed/embedding", None),
        ("", None),
    ],
)
def test_layer_index(path, layer):
    assert layer_index(path) == layer
