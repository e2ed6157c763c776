"""ReFT: low-rank edits of the hidden representation at some positions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jpeft.core.method import Method, Theta
from jpeft.core.ops import Op
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError


@dataclasses.dataclass(frozen=True)
class DiReFT(Method):
    """Train a low-rank edit of the residual stream at the first and the last tokens.

    `h' = h + (h W + b) V` at the chosen positions: W (`w`) `[*stack, out, r]`, b `[*stack, r]`, V (`v`)
    `[*stack, r, out]`. h is the residual stream after the output of the leaf was added to it: put it on the last
    projection of each block, `{".*/mlp/down/kernel": jpeft.DiReFT()}`. V starts at zero.

    The plan needs `jpeft.Tokens`, which says where the token axis is, and of rows that are padded on the right
    `Call(lengths=...)` says where they end; without it the last tokens are those of the row. A token that is among the
    first and among the last counts as one of the first. It acts on activations and cannot be merged.

    Args:
        rank: r.
        prefix_positions: how many of the first tokens are edited; None: every token.
        suffix_positions: how many of the last.
        tied_weights: the last tokens share the edit of the first; else they have their own: `w_last`, ...
        residual: edit the residual stream; False: the output of the projection alone.

    Raises:
        MethodConfigError: no position, or a rank below 1 or above the output.
        PlanError: the plan has no `jpeft.Tokens`.
        UnsupportedUse: the output of the leaf is not added to a residual stream.

    Source: arXiv 2404.03592.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params, h = (lambda p, h: h + h @ p["w"]), {"w": jnp.ones((4, 4))}, jnp.ones((2, 6, 4))
        >>> rules = {"w": jpeft.DiReFT(rank=1)}
        >>> jpeft.plan(apply, params, (h,), rules, tokens=jpeft.Tokens(ids=0)).count()
        9
    """

    rank: int = 4
    prefix_positions: int | None = 3
    suffix_positions: int = 0
    tied_weights: bool = False
    residual: bool = True

    hooks: ClassVar[bool] = True
    call: ClassVar[frozenset[str]] = frozenset({"lengths"})
    recommended_lr: ClassVar[float] = 4e-3
    formula: ClassVar[str] = "edits * (2 * rank * out + rank)"

    def __post_init__(self) -> None:
        name, first, last = type(self).__name__, self.prefix_positions, self.suffix_positions
        if last < 0 or (first is not None and (first < 0 or first + last < 1)):
            raise MethodConfigError(f"{name}(prefix_positions={first}, suffix_positions={last}) edits no token; give a "
                                    "positive number, or prefix_positions=None for all")

    @property
    def positions(self) -> bool:
        return self.prefix_positions is not None

    @property
    def after_residual(self) -> bool:
        return self.residual

    def check(self, site: Site) -> None:
        if not 1 <= self.rank <= site.out_size:
            raise MethodConfigError(f"{type(self).__name__}(rank={self.rank}) does not fit {site.path!r} of "
                                    f"{site.out_size} outputs; use a rank from 1 to {site.out_size}")

    @property
    def _units(self) -> tuple[str, ...]:
        """Endings of the letters of each edit: of the first and of the last tokens."""
        if self.prefix_positions is None or self.suffix_positions == 0 or self.tied_weights:
            return ("",)
        return ("", "_last") if self.prefix_positions else ("_last",)

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        parts = [self._start(jax.random.fold_in(key, i), site) for i in range(len(self._units))]
        return {f"{k}{end}": v for end, part in zip(self._units, parts, strict=True) for k, v in part.items()}, {}

    def _start(self, key: jax.Array, site: Site) -> Theta:
        stack, d, r, dtype = site.stack_shape, site.out_size, self.rank, site.theta_dtype
        bound = 1.0 / math.sqrt(d)
        return {"w": jax.random.uniform(key, (*stack, d, r), dtype, -bound, bound), "b": jnp.zeros((*stack, r), dtype),
                "v": jnp.zeros((*stack, r, d), dtype)}

    def edit(self, theta: Theta, h: jax.Array, end: str) -> jax.Array:
        """What is added to `h` `[.., out]`."""
        w, b, v = (theta[f"{k}{end}"].astype(h.dtype) for k in ("w", "b", "v"))
        return (h @ w + b) @ v

    def hook(self, site: Site, theta: Theta, y: jax.Array, start: int) -> jax.Array:
        if self.prefix_positions is None:
            return y + self.edit(theta, y, "")
        at = jnp.arange(y.shape[-2]) - start
        stop = jnp.asarray(y.shape[-2] - start, at.dtype)
        if "lengths" in theta:
            lengths = theta["lengths"].astype(at.dtype)
            stop = jnp.reshape(lengths, (*lengths.shape, *(1,) * (y.ndim - 1 - lengths.ndim)))
        first = (at >= 0) & (at < self.prefix_positions) & (at < stop)
        last = (at >= jnp.maximum(stop - self.suffix_positions, 0)) & (at < stop) & ~first
        chosen = {self._units[0]: first | last} if len(self._units) == 1 else dict(
            zip(self._units, (first, last), strict=True))
        for end, here in chosen.items():
            y = y + jnp.where(here[..., None], self.edit(theta, y, end), jnp.zeros((), y.dtype))
        return y

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {f"v{end}": jnp.zeros_like(theta[f"v{end}"]) for end in self._units}

    def numbers(self, site: Site) -> dict[str, int]:
        return {"edits": len(self._units)}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        stack, out = site.stack_dims, site.out_dims[0] if len(site.out_dims) == 1 else None
        one = {"w": (*stack, out, None), "b": (*stack, None), "v": (*stack, None, out)}
        return {f"{k}{end}": v for end in self._units for k, v in one.items()}

    def flops(self, site: Site) -> tuple[int, int]:
        return len(self._units) * 4 * site.out_size * self.rank, 0


@dataclasses.dataclass(frozen=True)
class LoReFT(DiReFT):
    """Train an edit of the residual stream within a low-dimensional subspace, at the first and the last tokens.

    `h' = h + (h W + b - h R^T) R`, with the rows of R `[r, out]` orthonormal: an orthonormal basis of the columns of P
    (`p`) `[*stack, out, r]`, by Gram and Schmidt, once per call. W (`w`) `[*stack, out, r]` starts as `R^T` and b
    `[*stack, r]` at zero, so that training starts from the base (the authors draw W at random).

    Args:
        rank: see `DiReFT`.
        prefix_positions: see `DiReFT`.
        suffix_positions: see `DiReFT`.
        tied_weights: see `DiReFT`.
        residual: see `DiReFT`.

    Raises:
        MethodConfigError, PlanError, UnsupportedUse: as of `DiReFT`.

    Source: arXiv 2404.03592.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params, h = (lambda p, h: h + h @ p["w"]), {"w": jnp.ones((4, 4))}, jnp.ones((2, 6, 4))
        >>> rules = {"w": jpeft.LoReFT(rank=1)}
        >>> jpeft.plan(apply, params, (h,), rules, tokens=jpeft.Tokens(ids=0)).count()
        9
    """

    def _start(self, key: jax.Array, site: Site) -> Theta:
        stack, d, r, dtype = site.stack_shape, site.out_size, self.rank, site.theta_dtype
        basis = jax.random.orthogonal(key, d, stack, dtype)[..., :r]
        return {"p": basis, "w": jnp.array(basis, copy=True), "b": jnp.zeros((*stack, r), dtype)}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        bases = {f"p{end}": _orthonormal(theta[f"p{end}"]) for end in self._units}
        return super().build(site, base, {**theta, **bases}, key)

    def edit(self, theta: Theta, h: jax.Array, end: str) -> jax.Array:
        basis = theta[f"p{end}"].astype(h.dtype)
        return (h @ (theta[f"w{end}"].astype(h.dtype) - basis) + theta[f"b{end}"].astype(h.dtype)) @ basis.T

    def neutral(self, site: Site, theta: Theta) -> Theta:
        result: Theta = {}
        for end in self._units:
            basis = _orthonormal(theta[f"p{end}"])
            result |= {f"w{end}": basis, f"b{end}": jnp.zeros_like(theta[f"b{end}"])}
        return result

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        found = super().axes(site)
        return {k.replace("v", "p", 1): found[k.replace("v", "w", 1)] for k in found}


def _orthonormal(p: jax.Array) -> jax.Array:
    """The columns of `p`, made orthonormal one after the other: Q of its QR with a positive diagonal."""
    def step(q: jax.Array, one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        column, e = one
        rest = column - jnp.sum(q * jnp.sum(q * column[..., None], -2, keepdims=True), -1)
        rest = rest / jnp.linalg.norm(rest, axis=-1, keepdims=True)
        return q + rest[..., None] * e, None

    return lax.scan(step, jnp.zeros_like(p), (jnp.moveaxis(p, -1, 0), jnp.eye(p.shape[-1], dtype=p.dtype)))[0]
