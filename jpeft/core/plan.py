"""A plan: which method rides on which leaf. No arrays; immutable, hashable, JSON both ways."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jpeft.core.method import Method, Theta, decode, encode
from jpeft.core.site import Site
from jpeft.core.tokens import Tokens
from jpeft.errors import PathError, PlanError


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf and its method.

    Attributes:
        site: the leaf.
        method: the method.
        layers: the slices of the first stack dim that the method acts on; None: all.
        start: first row of its virtual tokens.
    """

    site: Site
    method: Method
    layers: tuple[int, ...] | None = None
    start: int = 0

    @property
    def path(self) -> str:
        return self.site.path

    def layer_mask(self, letter: str, ndim: int) -> np.ndarray | None:
        """0/1 over the stack axis of a theta entry, shaped to broadcast against it; None: all live."""
        if self.layers is None:
            return None
        dim = self.site.stack_dims[0] if self.site.stack_dims else 0
        axes = self.method.axes(self.site)[letter]
        if dim not in axes:
            raise PlanError(f"{type(self.method).__name__} shares {letter!r} of {self.path!r} between layers; "
                            "it cannot be limited to some")
        mask = np.zeros(self.site.shape[dim], bool)
        mask[list(self.layers)] = True
        return mask.reshape([-1 if i == axes.index(dim) else 1 for i in range(ndim)])

    def effective(self, theta: Theta) -> Theta:
        """Theta with the layers left out set to values at which the method does nothing."""
        if self.layers is None:
            return theta
        neutral = self.method.neutral(self.site, theta)
        result = dict(theta)
        for letter, value in neutral.items():
            mask = self.layer_mask(letter, theta[letter].ndim)
            assert mask is not None
            result[letter] = jax.numpy.where(mask, theta[letter], value.astype(theta[letter].dtype))
        return result

    def shapes(self) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
        """Shapes of the trainable and the frozen entries of theta."""
        return _shapes(self)

    def live(self) -> dict[str, np.ndarray]:
        """Per trainable entry with dead parts, a bool mask of its shape: which values can ever matter."""
        masks: dict[str, np.ndarray] = {}
        given = self.method.live(self.site)
        if self.layers is None and not given:
            return masks
        for letter, struct in self.shapes()[0].items():
            mask = np.ones(struct.shape, bool)
            if letter in given:
                mask &= np.asarray(given[letter], bool)
            layer = self.layer_mask(letter, len(struct.shape))
            if layer is not None:
                mask &= layer
            if not mask.all():
                masks[letter] = mask
        return masks

    def count(self) -> int:
        """Number of live trainable values."""
        masks = self.live()
        return sum(int(masks[k].sum()) if k in masks else int(np.prod(s.shape, dtype=np.int64))
                   for k, s in self.shapes()[0].items())


@functools.lru_cache(maxsize=4096)
def _shapes(entry: Entry) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
    base = jax.ShapeDtypeStruct(entry.site.shape, entry.site.dtype)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda k, b: entry.method.init(k, entry.site, b), key, base)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which method rides on which leaf of one set of parameters.

    Attributes:
        entries: the adapted leaves, in the order of the parameters.
        sites: every leaf of the parameters.
        tokens: which arguments carry the token axis, for methods that add virtual tokens.
        materialise: paths whose adapted weight may be formed whole.
        sited: paths with site semantics.
    """

    entries: tuple[Entry, ...]
    sites: tuple[Site, ...]
    tokens: Tokens | None = None
    materialise: tuple[str, ...] = ()
    sited: tuple[str, ...] = ()

    @property
    def virtual_tokens(self) -> int:
        """Length by which the batch is padded."""
        return max((e.start + e.method.virtual_tokens for e in self.entries), default=0)

    def entry(self, path: str) -> Entry:
        """The entry of one path."""
        return next(e for e in self.entries if e.path == path)

    def theta_shapes(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Shapes of the trainable partition and of `frozen.theta`, both `{path: {letter: struct}}`."""
        pairs = {e.path: e.shapes() for e in self.entries}
        return {p: t for p, (t, _) in pairs.items()}, {p: f for p, (_, f) in pairs.items() if f}

    def count(self) -> int:
        """Number of trainable values, dead ones (masked ranks and layers) left out."""
        return sum(e.count() for e in self.entries)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        sites = [s.to_json() for s in self.sites]
        entries = [{"path": e.path, "method": encode(e.method), "layers": e.layers and list(e.layers), "start": e.start}
                   for e in self.entries]
        return {"entries": entries, "sites": sites, "tokens": self.tokens and self.tokens.to_json(),
                "materialise": list(self.materialise), "sited": list(self.sited)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of `to_json`.

        Raises:
            PlanError: a method is unknown, or a field is missing.
        """
        try:
            sites = {s["path"]: Site.from_json(s) for s in data["sites"]}
            entries = tuple(
                Entry(sites[e["path"]], decode(e["method"]), None if e["layers"] is None else tuple(e["layers"]),
                      e["start"]) for e in data["entries"])
            tokens = None if data["tokens"] is None else Tokens.from_json(data["tokens"])
            return cls(entries, tuple(sites.values()), tokens, tuple(data["materialise"]),
                       tuple(data["sited"]))
        except (KeyError, TypeError) as error:
            raise PlanError(
                f"the plan's JSON is incomplete or of another version ({error!r}); write it with to_json") from error

    def check_params(self, names: Sequence[str], leaves: Sequence[Any]) -> None:
        """Raise `PathError` unless these leaves are the planned ones."""
        found = {n: tuple(v.shape) for n, v in zip(names, leaves, strict=True)}
        for site in self.sites:
            if found.get(site.path) != site.shape:
                have = f"shape {found[site.path]}" if site.path in found else "no such leaf"
                raise PathError(f"the plan has {site.path!r} with shape {site.shape}, the params have {have}; "
                                "pass the params that the plan was made for")
        extra = [n for n in names if n not in {s.path for s in self.sites}]
        if extra:
            raise PathError(f"the params have leaves that the plan lacks: {extra[:3]}; make a new plan for them")
