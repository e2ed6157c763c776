"""What every model of the zoo offers, whatever its family."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jpeft.errors import ModelConfigError
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

    def placed(self, places: Mapping[str, int]) -> Self:
        """Return the model with leaves that no checkpoint has and a method asks for (`Method.places`).

        Raises:
            ModelConfigError: models of this kind have no such leaves.
        """
        missing = sorted(set(places) - {field.name for field in dataclasses.fields(self.config)})
        if missing:
            raise ModelConfigError(f"a method asks for places of {missing[0]!r}, and this {type(self).__name__} has "
                                   "none; use a decoder, or another method")
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **places))

    def with_places(self, params: Params, places: Mapping[str, int]) -> tuple[Self, Params]:
        """Return `placed(places)` and its params: the new leaves, as its module starts them, beside the old ones.

        Args:
            params: of this model.
            places: as of `placed`.

        Raises:
            ModelConfigError: as of `placed`.
        """
        model = self.placed(places)
        old = flatten_dict(params)
        dtype = next(iter(old.values())).dtype
        new = jax.jit(lambda key: {path: leaf.astype(dtype) for path, leaf in flatten_dict(model._init(key)).items()
                                   if path not in old})(jax.random.key(0))
        return model, unflatten_dict({**old, **new})

    def _init(self, key: jax.Array) -> Params:
        return self.module().init(key, jnp.zeros((1, 2), jnp.int32))["params"]
