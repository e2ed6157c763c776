"""Rotary positions as Hugging Face configurations say them, in the old keys and the new, and back in the old."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jpeft.errors import ModelConfigError, nearest
from jpeft.models.rope import Rope

KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
_LISTS = ("short_factor", "long_factor")
_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"})
_OF_KIND: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset({"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
                       "mscale", "mscale_all_dim", "truncate"}),
    "longrope": frozenset({"factor", "original_max_position_embeddings", "attention_factor", "short_factor",
                           "long_factor"}),
    "llama3": frozenset({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}),
}


def read(said: Mapping[str, Any] | None, where: str, *, theta: float, positions: int, fraction: float = 1.0,
         original: int | None = None) -> Rope:
    """Turn `rope_scaling` or `rope_parameters` into a `Rope`.

    Args:
        said: the value of the key; None or empty: plain rotary positions.
        where: the file, for messages.
        theta: where `said` has no `rope_theta`.
        positions: `max_position_embeddings`.
        fraction: where `said` has no `partial_rotary_factor`.
        original: `original_max_position_embeddings` where it stands beside `said`; it overrules what is inside.

    Raises:
        ModelConfigError: the type is not implemented, or has a key that is not, or lacks one.
    """
    said = said or {}
    kind = said.get("rope_type", said.get("type", "default"))
    kind = "longrope" if kind == "su" else kind
    if kind not in _OF_KIND:
        raise ModelConfigError(f"{where}: rope type {kind!r} is not implemented, only {', '.join(_OF_KIND)} "
                               f"({nearest(str(kind), _OF_KIND, 1)})")
    known = _COMMON | _OF_KIND[kind]
    wrong = [f"{name} = {value!r} is not implemented for rope type {kind} ({nearest(name, known, 1)})"
             for name, value in said.items() if name not in known and value is not None]
    wrong += [f"rope type {kind} needs {name}" for name in _needed(kind) if said.get(name) is None]
    wrong += [f"{name} = {value!r} must be a {'list of numbers' if name in _LISTS else 'number'}"
              for name, value in said.items() if name in known and not _right(name, value)]
    if wrong:
        raise ModelConfigError(f"{where}: {'; '.join(wrong)}")
    inside = said.get("original_max_position_embeddings") or positions
    context = int(original if original is not None else inside) if kind in ("yarn", "longrope", "llama3") else 0
    fields: dict[str, Any] = {"theta": float(said.get("rope_theta") or theta), "kind": kind, "original": context,
                              "fraction": float(said.get("partial_rotary_factor") or fraction)}
    if kind in ("linear", "dynamic", "llama3"):
        fields["factor"] = float(said["factor"])
    if kind == "llama3":
        fields.update(low=float(said["low_freq_factor"]), high=float(said["high_freq_factor"]))
    elif kind == "yarn":
        factor = float(said.get("factor") or positions / context)
        fields.update(factor=factor, magnitude=_yarn_magnitude(said, factor),
                      fast=float(said.get("beta_fast") or 32), slow=float(said.get("beta_slow") or 1),
                      truncate=bool(said.get("truncate", True)))
    elif kind == "longrope":
        fields.update(magnitude=_longrope_magnitude(said, positions, context),
                      short=tuple(map(float, said["short_factor"])), long=tuple(map(float, said["long_factor"])))
    return Rope(**fields)


def _needed(kind: str) -> tuple[str, ...]:
    return {"linear": ("factor",), "dynamic": ("factor",), "longrope": ("short_factor", "long_factor"),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(kind, ())


def _right(name: str, value: Any) -> bool:
    if value is None or name in ("rope_type", "type", "finetuned", "truncate"):
        return True
    if name in _LISTS:
        return isinstance(value, list) and all(isinstance(x, int | float) for x in value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _yarn_magnitude(said: Mapping[str, Any], factor: float) -> float:
    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if said.get("attention_factor") is not None:
        return float(said["attention_factor"])
    if said.get("mscale") and said.get("mscale_all_dim"):
        return grown(said["mscale"]) / grown(said["mscale_all_dim"])
    return grown(1.0)


def _longrope_magnitude(said: Mapping[str, Any], positions: int, context: int) -> float:
    if said.get("attention_factor") is not None:
        return float(said["attention_factor"])
    factor = float(said.get("factor") or positions / context)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))


def write(rope: Rope) -> dict[str, Any] | None:
    """Return `rope_scaling` for a `Rope`, without theta and fraction, which have keys of their own.

    Example:
        >>> write(Rope(kind="linear", factor=2.0)), write(Rope(theta=1e6))
        ({'rope_type': 'linear', 'factor': 2.0}, None)
    """
    if rope.kind == "default":
        return None
    said: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "longrope":
        said["factor"] = rope.factor
    if rope.original:
        said["original_max_position_embeddings"] = rope.original
    if rope.kind == "llama3":
        said.update(low_freq_factor=rope.low, high_freq_factor=rope.high)
    elif rope.kind == "yarn":
        said.update(attention_factor=rope.magnitude, beta_fast=rope.fast, beta_slow=rope.slow, truncate=rope.truncate)
    elif rope.kind == "longrope":
        said.update(attention_factor=rope.magnitude, short_factor=list(rope.short), long_factor=list(rope.long))
    return said
