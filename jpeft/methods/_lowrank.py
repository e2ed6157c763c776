"""What the low-rank methods share: dropout keys, uniform starts, ranks by layer, projections of a seed."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.site import Site
from jpeft.errors import MethodConfigError

Layout = tuple[int | str, ...]


def dropout_key(site: Site, key: jax.Array | None, rate: float) -> tuple[jax.Array, Layout] | None:
    """Return the `key` argument of `ops.product`: one key for each copy in the stack, or None where nothing drops."""
    if key is None or rate == 0.0:
        return None
    data = jax.random.key_data(jax.random.split(key, site.stack_size) if site.stack_dims else key[None])
    return data.reshape((*site.stack_shape, data.shape[-1])), (*site.stack_dims, "key")


def uniform(key: jax.Array, shape: tuple[int, ...], fan: int, dtype: Any) -> jax.Array:
    """Draw from the uniform distribution within `1 / sqrt(fan)`, the default of a linear layer, in float32."""
    bound = 1.0 / math.sqrt(fan)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)


def rank_mask(ranks: tuple[int, ...], site: Site) -> np.ndarray:
    """0/1 `[*stack, r]`: of each layer, as many columns as its rank; r is the largest."""
    live = np.arange(max(ranks)) < np.asarray(ranks)[:, None]
    return np.stack([by_layer(column, site) for column in live.T], -1)


def by_layer(values: np.ndarray, site: Site) -> np.ndarray:
    """One value for each layer `[layers]` as one for each copy in the stack `[*stack]`, whose first axis they are."""
    return np.broadcast_to(values.reshape(-1, *(1,) * (len(site.stack_dims) - 1)), site.stack_shape)


def projection(seed: int, letter: int, rows: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draw `[rows, *shape]` from the uniform distribution of mean 0 and deviation 1.

    Row i depends on the seed, the letter and i alone: a matrix of more rows begins with the same ones, so leaves of
    different sizes see parts of one projection, as if they shared it.
    """
    key, top = jax.random.fold_in(jax.random.key(seed), letter), math.sqrt(3.0)

    def row(i: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32, -top, top)

    return jax.vmap(row)(jnp.arange(rows)).astype(dtype)


def check_rank(method: Any, site: Site, rank: int, most: int, field: str = "rank") -> None:
    """Raise `MethodConfigError` unless `1 <= rank <= most`."""
    if not 1 <= rank <= most:
        raise MethodConfigError(f"{type(method).__name__}({field}={rank}) does not fit {site.path!r} of "
                                f"{site.in_size} inputs and {site.out_size} outputs; use {field} from 1 to {most}, or "
                                "exclude the leaf")


def check_rate(method: Any, rate: float) -> None:
    """Raise `MethodConfigError` unless `0 <= rate < 1`."""
    if not 0.0 <= rate < 1.0:
        raise MethodConfigError(f"{type(method).__name__}(dropout={rate}) is not in [0, 1); give the rate that is "
                                "dropped")
