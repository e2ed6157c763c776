"""Activations on a mesh: each device keeps the rows of its own, and fetches the weights that it needs.

Where rows and weights are divided over one mesh axis ("fsdp"), the compiler may as well gather the rows as the weights,
and does. Two constraints decide it: what goes through the layers is divided by rows, and the head is whole along the
width before the loss takes it apart in chunks (inside that loop it would be fetched for every chunk).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpeft.models import decoder, decoder_layers, encoder, t5

ROWS = ("data", "fsdp")
_LAYERS = (decoder_layers.Layer, encoder.Layer, t5.EncoderLayer, t5.DecoderLayer)


def over_rows(apply: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Return `model.apply` with its activations divided by rows over the axes "data" and "fsdp" of a mesh.

    Values are the same. Tokens are divided over the axis "sequence", if there is one.

    Args:
        apply: `apply` of a model of jpeft, or a function that calls it.
        mesh: its axes may be of type Auto alone.

    Example:
        >>> import jax.numpy as jnp
        >>> from jpeft.models.decoder import Decoder, DecoderConfig
        >>> model = Decoder(DecoderConfig(9, 8, 2, 2, 1, 4, 16, 32))
        >>> params, tokens = model.init(jax.random.key(0)), jnp.ones((4, 3), int)
        >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> apply = over_rows(model.apply, mesh)
        >>> apply(params, tokens).logits.shape
        (4, 3, 9)
    """
    rows = tuple(axis for axis in ROWS if axis in mesh.shape) or None
    own = NamedSharding(mesh, PartitionSpec(rows, "sequence" if "sequence" in mesh.shape else None))
    head = NamedSharding(mesh, PartitionSpec(None, "tensor" if "tensor" in mesh.shape else None))

    def placed(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(context.module, _LAYERS):
            x, *rest = call(jax.lax.with_sharding_constraint(args[0], own), *args[1:], **kwargs)
            return jax.lax.with_sharding_constraint(x, own), *rest
        if isinstance(context.module, decoder.Head):
            return jax.lax.with_sharding_constraint(call(*args, **kwargs), head)
        return call(*args, **kwargs)

    @functools.wraps(apply)
    def constrained(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(placed):
            return apply(*args, **kwargs)

    return constrained
