"""LoKr: a Kronecker product beside a frozen weight."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.core import maps, ops
from jpeft.core.einsum import Dot, arrange, pair
from jpeft.core.method import Method, Theta
from jpeft.core.ops import Op
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError

LETTERS = {"w1": (0, 2), "w2": (1, 3), "w2a": (1, 4), "w2b": (4, 3)}


@dataclasses.dataclass(frozen=True)
class LoKr(Method):
    """Train a Kronecker product of two small matrices beside a frozen weight.

    `W' = W + s kron(w1, w2)` for W `[in, out]`, `in = m n`, `out = p q`, `s = alpha / rank`: w1 `[*stack, m, p]` and
    w2 `[*stack, n, q]`. Where `rank < max(n, q) / 2`, `w2 = w2a w2b` with w2a `[*stack, n, rank]` and w2b
    `[*stack, rank, q]`; with `decompose_both` likewise w1. w1 (or w1b) starts at zero. The product is never formed:
    inputs are seen as `[m, n]` and meet the small matrices one by one, in the cheapest order.

    Args:
        rank: rank of the factors that are decomposed.
        alpha: numerator of the scale, which is a frozen scalar of theta: another alpha needs no retrace.
        decompose_both: decompose w1 too, where `rank < max(m, p) / 2`.
        factor: m and p, where they divide; else, and with -1, the largest divisor below it and below the square root.

    Raises:
        MethodConfigError: a rank below 1, or a factor that is 0 or below -1.

    Source: arXiv 2309.14859.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 6))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.LoKr(rank=1)}).count()
        11
    """

    rank: int = 8
    alpha: float = 8.0
    decompose_both: bool = False
    factor: int = -1

    uses: ClassVar[frozenset[str]] = frozenset({"linear"})
    recommended_lr: ClassVar[float] = 5e-3
    formula: ClassVar[str] = "m * p + rank * (n + q)"
    peft_type: ClassVar[str | None] = "LOKR"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise MethodConfigError(f"LoKr(rank={self.rank}) has no columns; use a rank of 1 or more")
        if self.factor < -1 or self.factor == 0:
            raise MethodConfigError(f"LoKr(factor={self.factor}) is no divisor; use 2 or more, or -1 (the square root)")

    def _sizes(self, site: Site) -> tuple[int, int, int, int]:
        """`m, n, p, q`."""
        return (*_split(site.in_size, self.factor), *_split(site.out_size, self.factor))

    def _shapes(self, site: Site) -> dict[str, tuple[int, int]]:
        """Shapes of the trained matrices, the one that starts at zero first."""
        m, n, p, q = self._sizes(site)
        r = self.rank
        first = {"w1b": (r, p), "w1a": (m, r)} if self.decompose_both and r < max(m, p) / 2 else {"w1": (m, p)}
        return first | ({"w2a": (n, r), "w2b": (r, q)} if r < max(n, q) / 2 else {"w2": (n, q)})

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        theta: Theta = {}
        for i, (letter, shape) in enumerate(self._shapes(site).items()):
            full, bound = (*site.stack_shape, *shape), 1.0 / math.sqrt(shape[0])
            theta[letter] = jnp.zeros(full, site.theta_dtype) if i == 0 else \
                jax.random.uniform(jax.random.fold_in(key, i), full, site.theta_dtype, -bound, bound)
        return theta, {"scale": jnp.asarray(self.alpha / self.rank, site.theta_dtype)}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        first = jnp.matmul(theta["w1a"], theta["w1b"], precision="highest") if "w1a" in theta else theta["w1"]
        factors = {"w1": first * theta["scale"]}
        factors |= {k: theta[k] for k in ("w2", "w2a", "w2b") if k in theta}
        term = maps.linear(site.shape, factors, self._kronecker(site), site.stack_dims, site.in_dims, site.out_dims)
        return ops.add(base, term)

    def _kronecker(self, site: Site) -> Kronecker:
        sizes = (*self._sizes(site), self.rank)
        names = ("w1", *(k for k in self._shapes(site) if k.startswith("w2")))
        return min((Kronecker(sizes, order) for order in itertools.permutations(names)), key=lambda k: k.cost())

    def neutral(self, site: Site, theta: Theta) -> Theta:
        letter = next(iter(self._shapes(site)))
        return {letter: jnp.zeros_like(theta[letter])}

    def numbers(self, site: Site) -> dict[str, int]:
        return dict(zip("mnpq", self._sizes(site), strict=True))

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return {**dict.fromkeys(self._shapes(site), (*site.stack_dims, None, None)), "scale": ()}

    def flops(self, site: Site) -> tuple[int, int]:
        m, _, p, _ = self._sizes(site)
        once = m * self.rank * p * site.stack_size if "w1a" in self._shapes(site) else 0
        return 2 * self._kronecker(site).cost(), 2 * once


@dataclasses.dataclass(frozen=True)
class Kronecker:
    """`x [..., m n] -> x kron(w1, w2) [..., p q]`, one matrix after the other; `sizes` are m, n, p, q, rank."""

    sizes: tuple[int, ...]
    order: tuple[str, ...]

    def cost(self) -> int:
        """Multiplications for one input row."""
        have, total = {0, 1}, 0
        for name in self.order:
            old, new = LETTERS[name]
            total += math.prod(self.sizes[c] for c in {*have, old, new})
            have = (have | {new}) - {old} if old in have else have | {old, new}
        return total

    def __call__(self, theta: maps.Arrays, x: jax.Array) -> jax.Array:
        lead = tuple(range(5, 5 + x.ndim - 1))
        y, letters = jnp.reshape(x, (*x.shape[:-1], *self.sizes[:2])), (*lead, 0, 1)
        dot = Dot(None, x.dtype, None, None, ((), (), ()), lambda a, w: a)
        for name in self.order:
            keep = tuple(c for c in (*letters, *LETTERS[name]) if c != LETTERS[name][0])
            y, letters = pair(y, letters, theta[name], LETTERS[name], keep, dot)
        y = arrange(y, letters, (*lead, 2, 3), {})
        return jnp.reshape(y, (*x.shape[:-1], self.sizes[2] * self.sizes[3]))


def _split(size: int, factor: int) -> tuple[int, int]:
    """Two divisors of `size`; the first is `factor`, or else the largest that is not above it or the square root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = next(d for d in range(most, 0, -1) if size % d == 0)
    return first, size // first
