"""Bottleneck adapters beside a projection, or beside a whole sublayer."""

from __future__ import annotations

import dataclasses
import math
import posixpath
from typing import ClassVar

import jax
import jax.numpy as jnp

from jpeft.core.method import Theta
from jpeft.core.site import Site
from jpeft.errors import UnsupportedUse
from jpeft.methods.bottleneck import Pfeiffer


@dataclasses.dataclass(frozen=True)
class ParallelAdapter(Pfeiffer):
    """Train a small network beside a projection, or beside a whole sublayer.

    `y' = y + s (act(x D + b_D) U + b_U)`, x being the input of the projection, or, with `input_of`, of the leaf named
    there: the first projection of the same sublayer. D (`down`) `[*stack, in, h]`, uniform within `1 / sqrt(in)`; the
    other letters as in `Pfeiffer`, from zero. s `[*stack]` is frozen in theta, or trained.

    Args:
        reduction_factor: `h = out / reduction_factor`, rounded down, at least 1.
        bottleneck: h itself; it then replaces `reduction_factor`.
        activation: `relu`, `gelu`, `swish` or `tanh`.
        scaling: s, where it starts if it is trained; another scaling needs no retrace.
        learned: train s.
        input_of: path, relative to the folder of the leaf, of the leaf whose input is x: on `mlp/down/kernel`,
            `"../up/kernel"`; None: the leaf itself.

    Raises:
        MethodConfigError: as of `Pfeiffer`.
        UnsupportedUse: the leaf of `input_of` is not contracted before this one in the same block.

    Source: arXiv 2110.04366.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> params = {"up": {"kernel": jnp.ones((8, 32))}, "down": {"kernel": jnp.ones((32, 8))}}
        >>> apply = lambda p, x: x + jax.nn.relu(x @ p["up"]["kernel"]) @ p["down"]["kernel"]
        >>> rules = {"down/kernel": jpeft.ParallelAdapter(bottleneck=2, input_of="../up/kernel")}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), rules).count()
        42
    """

    reduction_factor: float = 2.0
    scaling: float = 4.0
    learned: bool = False
    input_of: str | None = None

    uses: ClassVar[frozenset[str]] = frozenset({"linear"})
    formula: ClassVar[str] = "h * (in + out + 1) + out + learned"

    def source(self, site: Site) -> str:
        here = site.path if self.input_of is None else posixpath.join(posixpath.dirname(site.path), self.input_of)
        return posixpath.normpath(here)

    def _inputs(self, site: Site) -> int:
        """Features of x: a sublayer has as many as the residual stream that it is added to."""
        return site.in_size if self.input_of is None else site.out_size

    def _down(self, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        bound = 1.0 / math.sqrt(shape[-2])
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        trainable, frozen = super().init(key, site, base)
        down = (*site.stack_shape, self._inputs(site), self.width(site))
        trainable["down"] = self._down(key, down, site.theta_dtype)
        scale = jnp.full(site.stack_shape, self.scaling, site.theta_dtype)
        return ({**trainable, "s": scale}, frozen) if self.learned else (trainable, {**frozen, "s": scale})

    def hook(self, site: Site, theta: Theta, y: jax.Array, start: int) -> jax.Array:
        x = theta["x"].astype(y.dtype)
        if x.shape[-1] != theta["down"].shape[0]:
            raise UnsupportedUse(f"ParallelAdapter on {site.path!r} expects {theta['down'].shape[0]} features from "
                                 f"{self.source(site)!r}, found {x.shape[-1]}; input_of is for sublayers whose input "
                                 "and output have one size")
        return y + theta["s"].astype(y.dtype) * self.inner(theta, x)

    def numbers(self, site: Site) -> dict[str, int]:
        return {"h": self.width(site), "in": self._inputs(site)}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        dims = site.in_dims if self.input_of is None else site.out_dims
        down = (*site.stack_dims, dims[0] if len(dims) == 1 else None, None)
        return {**super().axes(site), "down": down, "s": site.stack_dims}

    def flops(self, site: Site) -> tuple[int, int]:
        return 2 * (self._inputs(site) + site.out_size) * self.width(site), 0
