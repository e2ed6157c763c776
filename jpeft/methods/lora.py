"""LoRA: low-rank adaptation."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import ops
from jpeft.core.method import Method, Theta
from jpeft.core.ops import Op
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError
from jpeft.methods import _starts
from jpeft.methods._lowrank import by_layer, check_rate, dropout_key, rank_mask


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """Train a low-rank term beside a frozen weight.

    `W' = W + s A B`, `s = alpha / r` (or `alpha / sqrt(r)` with `rslora`); A `[*stack, *in, r]`, B `[*stack, r, *out]`.
    B starts at zero (of an embedding: A), so that training starts from the base. With the inits `pissa`, `olora`,
    `corda` and `lora_ga`, `W' = W + s (A B - A0 B0)`, A0 and B0 being frozen copies of the start: the base is not
    changed. The last four of the list start from data: give `jpeft.init` a `jpeft.Calibration`. With `loftq` alone
    `W' = Q + s A B`, close to W but not W: Q is W in 4 bits (NF4), frozen in theta as `q` and `absmax` and used in
    place of the leaf, so that A and B, which start from what Q lacks, are those for a model quantised like this.

    Args:
        rank: r, or one rank for each layer of a scanned stack (0: the layer is left out).
        alpha: numerator of the scale, which is a frozen scalar of theta: another alpha needs no retrace.
        rslora: divide by `sqrt(r)` (rank-stabilised).
        dropout: rate of inverted dropout on the input of the adapter path, active when `Call.key` is given.
        init_weights: `kaiming` (A uniform), `gaussian`, `orthogonal`, `pissa` (principal singular vectors; as
            `pissa_niter_4`, by a fast random projection with 4 subspace iterations), `olora` (QR), `loftq` (five rounds
            of quantising and of fitting A and B to what is lost, or as many as `loftq_iter_1` says; arXiv 2310.08659),
            `eva` (A: principal directions of the leaf's inputs, 2410.07170), `corda` (principal part of W as the inputs
            see it; `corda_kpm`: the least part, which keeps what the inputs show; 2406.05223), `lora_ga` (A and B along
            the gradient of the loss; 2407.05000).

    Raises:
        MethodConfigError: a rank below 1 or above the smaller side of the kernel (`lora_ga`: half of it), an unknown
            init, one from data where the leaf is no contraction weight, or `loftq` on some of the layers only.

    Source: arXiv 2106.09685; rsLoRA 2312.03732; PiSSA 2404.02948; OLoRA 2406.01775.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> apply, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}
        >>> jpeft.plan(apply, params, (jnp.ones((2, 8)),), {"w": jpeft.LoRA(rank=2)}).count()
        24
    """

    rank: int | tuple[int, ...] = 8
    alpha: float = 8.0
    rslora: bool = False
    dropout: float = 0.0
    init_weights: str = "kaiming"

    uses: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding", "tied"})
    recommended_lr: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "rank * (in + out)"
    peft_type: ClassVar[str | None] = "LORA"

    def __post_init__(self) -> None:
        if isinstance(self.rank, list):
            object.__setattr__(self, "rank", tuple(self.rank))
        if self.init_weights not in _starts.INITS and not re.fullmatch(_starts.COUNTED, self.init_weights):
            raise MethodConfigError(f"{type(self).__name__}(init_weights={self.init_weights!r}) is unknown; "
                                    f"use one of {', '.join(_starts.INITS)}")
        check_rate(self, self.dropout)

    @property
    def width(self) -> int:
        """The largest rank: the size of the rank axis."""
        return max(self.rank) if isinstance(self.rank, tuple) else self.rank

    @property
    def keeps_start(self) -> bool:
        """Whether frozen copies of the start, `a0` and `b0`, are subtracted."""
        return self.init_weights.startswith(("pissa", "olora", "corda", "lora_ga"))

    @property
    def leads(self) -> bool:
        return self.init_weights.startswith("loftq")

    @property
    def calibration(self) -> frozenset[str]:
        return frozenset({_starts.DATA[self.init_weights]} if self.init_weights in _starts.DATA else ())

    def check(self, site: Site) -> None:
        name, ranks = type(self).__name__, self.rank if isinstance(self.rank, tuple) else (self.rank,)
        most = min(site.in_size, site.out_size)
        if min(ranks) < (0 if len(ranks) > 1 else 1) or self.width < 1 or self.width > most:
            raise MethodConfigError(f"{name}(rank={self.rank}) does not fit {site.path!r} of {site.in_size} inputs and "
                                    f"{site.out_size} outputs; use a rank from 1 to {most}, or exclude the leaf")
        if isinstance(self.rank, tuple) and (not site.stack_dims or len(ranks) != site.shape[site.stack_dims[0]]):
            layers = site.shape[site.stack_dims[0]] if site.stack_dims else "no"
            raise MethodConfigError(f"{name} has {len(ranks)} ranks, but {site.path!r} has {layers} stacked layers; "
                                    "give one rank for each, or one for all")
        _starts.check(self, site)

    def _mask(self, site: Site) -> np.ndarray | None:
        """0/1 `[*stack, r]`: which columns are live."""
        return rank_mask(self.rank, site) if isinstance(self.rank, tuple) else None

    def _scale(self, site: Site) -> np.ndarray:
        ranks = np.asarray(self.rank, np.float64)
        scale = self.alpha / np.maximum(np.sqrt(ranks) if self.rslora else ranks, 1)
        return scale if scale.ndim == 0 else by_layer(scale, site)

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        dtype, r = site.theta_dtype, self.width
        frozen: Theta = {"scale": jnp.asarray(self._scale(site), dtype)}
        if isinstance(self.rank, tuple):
            frozen["mask"] = jnp.asarray(rank_mask(self.rank, site), dtype)
        if self.init_weights.startswith(("pissa", "olora")):
            a, b = _starts.from_base(self.init_weights, key, site.matrix(base.astype(dtype)), r, frozen["scale"])
        elif self.init_weights.startswith("loftq"):
            rounds = int(self.init_weights.removeprefix("loftq_iter_")) if "_" in self.init_weights else 5
            q, largest, a, b = _starts.loftq(site.matrix(base.astype(dtype)), r, frozen["scale"], rounds)
            frozen |= {"q": q, "absmax": largest}
        else:
            a, b = _starts.random(self.init_weights, key, site, r)
        return self._start(site, a, b, frozen)

    def _start(self, site: Site, a: jax.Array, b: jax.Array, frozen: Theta) -> tuple[Theta, Theta]:
        """Theta that starts at A `[*stack, in, r]`, B `[*stack, r, out]`, with copies where they are subtracted."""
        start = {"a": self._fold(site, a, "a"), "b": self._fold(site, b, "b")}
        kept = {f"{k}0": jnp.array(v, copy=True) for k, v in start.items()} if self.keeps_start else {}
        return start, {**frozen, **kept}

    def calibrate(self, key: jax.Array, site: Site, base: jax.Array, start: tuple[Theta, Theta],
                  data: dict[str, jax.Array]) -> tuple[Theta, Theta]:
        (trainable, frozen), r, dtype = start, self.width, site.theta_dtype
        data = {k: v.astype(dtype) for k, v in data.items()}
        if self.init_weights == "lora_ga":
            return self._start(site, *_starts.lora_ga(key, site.matrix(data["gradient"]), r), frozen)
        if self.init_weights == "eva":
            return {**trainable, "a": self._fold(site, _starts.eva(data["inputs"], r), "a")}, frozen
        if self.calibration:
            matrix, least = site.matrix(base.astype(dtype)), self.init_weights == "corda_kpm"
            return self._start(site, *_starts.corda(data["inputs"], matrix, r, frozen["scale"], least), frozen)
        return start

    def _fold(self, site: Site, x: jax.Array, letter: str) -> jax.Array:
        shape = (*site.in_shape, self.width) if letter == "a" else (self.width, *site.out_shape)
        return jnp.reshape(x, (*site.stack_shape, *shape))

    def term(self, site: Site, theta: Theta, key: jax.Array | None, a: str = "a", b: str = "b",
             sign: float = 1.0) -> ops.Product:
        """The additive term `s A B` as an expression."""
        right, stack = theta[b], len(site.stack_dims)
        scale = theta["scale"] * jnp.asarray(sign, theta["scale"].dtype)
        right = right * scale.reshape(scale.shape + (1,) * (right.ndim - scale.ndim)).astype(right.dtype)
        if "mask" in theta:
            mask = theta["mask"].astype(right.dtype)
            right = right * mask.reshape(mask.shape + (1,) * (right.ndim - stack - 1))
        return ops.product(site.shape, (theta[a], (*site.stack_dims, *site.in_dims, "r")),
                           (right, (*site.stack_dims, "r", *site.out_dims)), rate=self.dropout,
                           key=dropout_key(site, key, self.dropout))

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        if "q" in theta:
            matrix = _starts.unpack(theta["q"], theta["absmax"], (*site.stack_shape, site.in_size, site.out_size))
            base = site.unmatrix(matrix).astype(base.dtype)
        parts = [base, self.term(site, theta, key)]
        if "a0" in theta:
            parts.append(self.term(site, theta, None, "a0", "b0", -1.0))
        return ops.add(*parts)

    def neutral(self, site: Site, theta: Theta) -> Theta:
        if "q" in theta:
            raise MethodConfigError(f"{type(self).__name__}(init_weights={self.init_weights!r}) quantises every layer "
                                    f"of {site.path!r}; it cannot be limited to some, use another init")
        return {k: theta[f"{k}0"] if f"{k}0" in theta else jnp.zeros_like(theta[k]) for k in ("a", "b")}

    def live(self, site: Site) -> dict[str, Any]:
        mask = self._mask(site)
        if mask is None:
            return {}
        a = mask.reshape((*site.stack_shape, *(1,) * len(site.in_dims), self.width))
        b = mask.reshape((*site.stack_shape, self.width, *(1,) * len(site.out_dims)))
        return {"a": np.broadcast_to(a, (*site.stack_shape, *site.in_shape, self.width)),
                "b": np.broadcast_to(b, (*site.stack_shape, self.width, *site.out_shape))}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        a, b = (*site.stack_dims, *site.in_dims, None), (*site.stack_dims, None, *site.out_dims)
        scale = site.stack_dims if isinstance(self.rank, tuple) else ()
        return {"a": a, "b": b, "a0": a, "b0": b, "scale": scale, "mask": (*site.stack_dims, None),
                "q": (*site.stack_dims, None, None), "absmax": (*site.stack_dims, None)}

    def flops(self, site: Site) -> tuple[int, int]:
        terms = 2 if self.keeps_start else 1
        ins = 0 if site.use == "embedding" else site.in_size * site.groups
        return terms * 2 * self.width * (ins + site.out_size), 0
