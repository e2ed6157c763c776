"""Prompt tuning, and what all methods with virtual tokens share; prefixes are in `prefix`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jpeft.core import compat
from jpeft.core.method import Method, Theta
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError


class Virtual(Method):
    """A method that overwrites the rows of `length` virtual tokens in an output `[..., T, out]`."""

    hooks: ClassVar[bool] = True
    length: int

    @property
    def virtual_tokens(self) -> int:
        return self.length

    def _check_fields(self, init_weights: str, known: tuple[str, ...]) -> None:
        name = type(self).__name__
        if self.length < 1:
            raise MethodConfigError(f"{name}(length={self.length}) trains nothing; use 1 or more virtual tokens")
        if init_weights not in known:
            raise MethodConfigError(f"{name}(init_weights={init_weights!r}) is unknown; use one of {', '.join(known)}")


def overwrite(y: jax.Array, p: jax.Array, row: int, column: int = 0) -> jax.Array:
    """Put `p` `[V, C]` or `[B, V, C]` over the rows from `row` and the columns from `column` of `y` `[.., T, out]`."""
    (v, c), (t, n) = p.shape[-2:], y.shape[-2:]
    pads = ((row, t - row - v), (column, n - column - c))
    spread = jnp.broadcast_to(jnp.pad(p.astype(y.dtype), (*((0, 0),) * (p.ndim - 2), *pads)), y.shape)
    mine = jnp.broadcast_to(jnp.pad(jnp.ones((v, c), bool), pads), y.shape)
    return jnp.where(compat.match_sharding(mine, y), compat.match_sharding(spread, y), y)


@dataclasses.dataclass(frozen=True)
class PromptTuning(Virtual):
    """Train the embeddings of virtual tokens that stand before the real ones.

    `E([v_1 .. v_V, x]) = [P; E(x)]`, P (`p`) `[V, *out]`. The batch is padded on the left through `jpeft.Tokens`, and
    the outputs of the virtual tokens are stripped again; of a tied embedding, the output head is left alone.

    Args:
        length: V, the number of virtual tokens.
        init_weights: `random` (normal, deviation 0.02), `vocabulary` (V different random rows of the embedding), `text`
            (the rows of the first V tokens of `init_ids`, from the first again where they are fewer) or `labels` (for
            each class the mean of its rows; what is left of V as in `vocabulary`).
        init_ids: token ids: of a text, `(3, 4, 5)`; of the names of the classes, `((3,), (4, 5))`.

    Raises:
        MethodConfigError: length below 1, more rows wanted than the vocabulary has, an unknown init, or ids that it
            does not need, lacks, or that are none; more classes than V.

    Source: arXiv 2104.08691.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply = lambda p, ids: p["embed"][ids]
        >>> params, ids = {"embed": jnp.ones((20, 4))}, jnp.zeros((2, 6), int)
        >>> rules = {"embed": jpeft.PromptTuning(length=3)}
        >>> jpeft.plan(apply, params, (ids,), rules, tokens=jpeft.Tokens(ids=0)).count()
        12
    """

    length: int = 20
    init_weights: str = "random"
    init_ids: tuple[int | tuple[int, ...], ...] = ()

    uses: ClassVar[frozenset[str]] = frozenset({"embedding", "tied"})
    recommended_lr: ClassVar[float] = 3e-3
    formula: ClassVar[str] = "length * out"
    peft_type: ClassVar[str | None] = "PROMPT_TUNING"

    def __post_init__(self) -> None:
        ids = tuple(tuple(i) if isinstance(i, list | tuple) else i for i in self.init_ids)
        object.__setattr__(self, "init_ids", ids)
        self._check_fields(self.init_weights, ("random", "vocabulary", "text", "labels"))
        want = {"text": int, "labels": tuple}.get(self.init_weights)
        fits = not ids if want is None else bool(ids) and all(isinstance(i, want) and i != () for i in ids)
        if not fits or (want is tuple and len(ids) > self.length):
            shape = {"text": "the ids of a text, as (3, 4, 5)",
                     "labels": f"those of each class, at most {self.length}, as ((3,), (4, 5))"}
            raise MethodConfigError(f"{type(self).__name__}(init_weights={self.init_weights!r}, init_ids={ids}) cannot "
                                    f"start; give {shape.get(self.init_weights, 'no init_ids with it')}")

    def _groups(self) -> list[tuple[int, ...]]:
        """The tokens whose mean each of the first virtual tokens starts from."""
        groups = [i if isinstance(i, tuple) else (i,) for i in self.init_ids]
        repeats = -(-self.length // len(groups)) if self.init_weights == "text" else 1
        return (groups * repeats)[:self.length]

    def check(self, site: Site) -> None:
        name = type(self).__name__
        drawn = {"vocabulary": self.length, "labels": self.length - len(self.init_ids)}.get(self.init_weights, 0)
        if drawn > site.in_size:
            raise MethodConfigError(f"{name}(length={self.length}) cannot draw as many rows from {site.path!r} "
                                    f"of {site.in_size}; use init_weights='random'")
        outside = sorted({i for group in self._groups() for i in group if not 0 <= i < site.in_size})
        if outside:
            raise MethodConfigError(f"{name}(init_ids=...) has the ids {outside[:3]}, which are no rows of "
                                    f"{site.path!r}; use ids from 0 to {site.in_size - 1}")

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        shape, dtype = (self.length, *site.out_shape), site.theta_dtype
        if self.init_weights == "random":
            return {"p": 0.02 * jax.random.normal(key, shape, dtype)}, {}
        table, groups = site.matrix(base), self._groups()
        rows = [jnp.mean(table[jnp.asarray(group)].astype(dtype), axis=0) for group in groups]
        if len(groups) < self.length:
            drawn = jax.random.choice(key, site.in_size, (self.length - len(groups),), replace=False)
            rows += list(table[drawn].astype(dtype))
        return {"p": jnp.reshape(jnp.stack(rows), shape)}, {}

    def hook(self, site: Site, theta: Theta, y: jax.Array, start: int) -> jax.Array:
        if y.shape[-1] != site.out_size:
            return y
        return overwrite(y, jnp.reshape(theta["p"], (self.length, -1)), start)

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return {"p": (None, *site.out_dims)}
