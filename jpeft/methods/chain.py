"""Several methods on one leaf."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jpeft.core.method import Method, Theta
from jpeft.core.ops import Op
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError


@dataclasses.dataclass(frozen=True)
class Chain(Method):
    """Put several methods on one leaf, each on the result of those before it.

    `W' = f_n(.. f_2(f_1(W)))`. Theta holds the entries of every method, `0.a`, `0.b`, `1.l`, ..; each sees its own.
    Methods that return a plain array (`FourierFT`, `Full`, ..) come before those that return an expression (`LoRA`,
    `OFT`, `IA3`, ..), methods that act on the output (`Pfeiffer`, `PrefixTuning`, ..) come last.

    Args:
        methods: two or more methods.

    Raises:
        MethodConfigError: methods that cannot be nested in this order, or share no use.

    Example:
        >>> import jax.numpy as jnp, jpeft
        >>> rules = {"w": jpeft.Chain((jpeft.LoRA(rank=2), jpeft.IA3()))}
        >>> jpeft.plan(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}, (jnp.ones((2, 8)),), rules).count()
        28
    """

    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))
        names = [type(m).__name__ for m in self.methods]
        what = f"Chain of {', '.join(names)}" if names else "Chain"
        if len(names) < 2:
            raise MethodConfigError(f"{what} holds {len(names)} methods; give two or more, or the method itself")
        if any(not isinstance(m, Method) for m in self.methods):
            raise MethodConfigError(f"{what} holds something that is no method; give instances, as jpeft.LoRA(rank=8)")
        stages = [2 if m.hooks else 0 if m.dense else 1 for m in self.methods]
        if stages != sorted(stages):
            raise MethodConfigError(f"{what} cannot be nested in this order; put methods that return an array "
                                    "(FourierFT) first and those that change the output (Pfeiffer, prompts) last")
        late = [type(m).__name__ for m in self.methods[1:] if m.leads]
        if late:
            raise MethodConfigError(f"{what} has {late[0]} after another method, but it starts from the frozen "
                                    "weight; put it first")
        if any(m.virtual_tokens for m in self.methods[:-1]):
            raise MethodConfigError(f"{what} has virtual tokens before its last method; put the prompt or prefix last")
        uses = frozenset.intersection(*(m.uses for m in self.methods))
        if not uses:
            needs = (f"{type(m).__name__} needs {' or '.join(sorted(m.uses))}" for m in self.methods)
            raise MethodConfigError(f"{what} can ride on no leaf: {'; '.join(needs)}; drop one")
        shared = {"uses": uses, "call": frozenset().union(*(m.call for m in self.methods)),
                  "hooks": any(m.hooks for m in self.methods),
                  "recommended_lr": min(m.recommended_lr for m in self.methods)}
        for name, value in shared.items():
            object.__setattr__(self, name, value)

    @property
    def virtual_tokens(self) -> int:
        return self.methods[-1].virtual_tokens

    @property
    def positions(self) -> bool:
        return any(m.positions for m in self.methods)

    def sources(self, site: Site) -> tuple[str, ...]:
        return tuple(path for m in self.methods for path in m.sources(site))

    @property
    def leads(self) -> bool:
        return self.methods[0].leads

    @property
    def parts(self) -> tuple[tuple[str, Method], ...]:
        return tuple((f"{i}.{start}", part) for i, m in enumerate(self.methods) for start, part in m.parts)

    @property
    def tasks(self) -> int:
        return max(m.tasks for m in self.methods)

    @property
    def places(self) -> dict[str, int]:
        return {name: value for m in self.methods for name, value in m.places.items()}

    @property
    def dense(self) -> bool:
        return all(m.dense for m in self.methods)

    def check(self, site: Site) -> None:
        for m in self.methods:
            m.check(site)

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        pairs = [m.init(jax.random.fold_in(key, i), site, base) for i, m in enumerate(self.methods)]
        return _join(t for t, _ in pairs), _join(f for _, f in pairs)

    @property
    def calibration(self) -> frozenset[str]:
        return frozenset[str]().union(*(m.calibration for m in self.methods))

    def calibrate(self, key: jax.Array, site: Site, base: jax.Array, start: tuple[Theta, Theta],
                  data: dict[str, jax.Array]) -> tuple[Theta, Theta]:
        pairs = [m.calibrate(jax.random.fold_in(key, i), site, base, (_own(start[0], i), _own(start[1], i)), data)
                 for i, m in enumerate(self.methods)]
        return _join(t for t, _ in pairs), _join(f for _, f in pairs)

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        for i, m in enumerate(self.methods):
            base = m.build(site, base, _own(theta, i), None if key is None else jax.random.fold_in(key, i))
        return base

    def penalty(self, site: Site, theta: Theta) -> jax.Array | None:
        found = [m.penalty(site, _own(theta, i)) for i, m in enumerate(self.methods)]
        terms = [p for p in found if p is not None]
        return sum(terms[1:], terms[0]) if terms else None

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return _join(m.neutral(site, _own(theta, i)) for i, m in enumerate(self.methods))

    def live(self, site: Site) -> dict[str, Any]:
        return _join(m.live(site) for m in self.methods)

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return _join(m.axes(site) for m in self.methods)

    def flops(self, site: Site) -> tuple[int, int]:
        pairs = [m.flops(site) for m in self.methods]
        return sum(row for row, _ in pairs), sum(once for _, once in pairs)


def _join(parts: Any) -> dict[str, Any]:
    return {f"{i}.{k}": v for i, part in enumerate(parts) for k, v in part.items()}


def _own(theta: Theta, i: int) -> Theta:
    return {k.removeprefix(f"{i}."): v for k, v in theta.items() if k.startswith(f"{i}.")}
