"""What every model of the zoo offers, whatever its family."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpeft.models.output import Output

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Model(abc.ABC):
    """A configuration and the pure functions that it defines; it holds no array.

    `apply` is a pure function of params and inputs: all that `jpeft.plan` and `jpeft.adapt` need.

    Attributes:
        config: a frozen dataclass of the family.
        dtype: dtype of compute; None: that of the params.
        remat: a key of `layers.REMAT`.
        notes: what reading the checkpoint decided that its user should know, a sentence each.
        origin: the `config.json` that the model was read from, as text; empty for a model that was not read.
    """

    config: Any
    dtype: Any = None
    remat: str = "none"
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    origin: str = dataclasses.field(default="", compare=False, repr=False)

    @abc.abstractmethod
    def apply(self, *args: Any, **kwargs: Any) -> Output:
        """Run the model: `apply(params, tokens, attention_mask=None, ...)`."""

    @abc.abstractmethod
    def module(self, train: bool = False) -> nn.Module:
        """Return the Linen module; `train` switches dropout on."""

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Params:
        """Return random params: the start of training from scratch, or what a test needs."""
        return jax.tree.map(lambda leaf: leaf.astype(dtype), jax.jit(self._init)(key))

    def shapes(self) -> Params:
        """Return the params' shapes as a tree of `jax.ShapeDtypeStruct`, at no cost."""
        return jax.eval_shape(self._init, jax.random.key(0))

    def _init(self, key: jax.Array) -> Params:
        return self.module().init(key, jnp.zeros((1, 2), jnp.int32))["params"]
