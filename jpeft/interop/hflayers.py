"""How Hugging Face configurations say which layers have a window and which have rotary positions, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jpeft.errors import ModelConfigError

_FULL, _LOCAL = "full_attention", "sliding_attention"
KEYS: Mapping[str, frozenset[str]] = {
    "none": frozenset(),
    "all": frozenset({"sliding_window"}),
    "switch": frozenset({"sliding_window", "use_sliding_window"}),
    "late": frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}),
    "every": frozenset({"sliding_window", "layer_types", "sliding_window_pattern", "_sliding_window_pattern"}),
    "nope": frozenset({"sliding_window", "use_sliding_window", "layer_types", "no_rope_layers",
                       "no_rope_layer_interval"}),
}
"""The keys of each way: no window; one for "all" layers; for all, if "switch"ed on; for the "late" layers, if switched
on; for all but "every" n-th layer; for the layers without rotary positions ("nope"), if switched on."""


class Which(NamedTuple):
    """Numbers of the layers that differ.

    Attributes:
        window: tokens that a layer with a window sees; None: no layer has one.
        local: the layers that have it.
        unrotated: the layers without rotary positions.
    """

    window: int | None = None
    local: tuple[int, ...] = ()
    unrotated: tuple[int, ...] = ()


def read(way: str, raw: Mapping[str, Any], where: str, layers: int, window: int | None, every: int = 0) -> Which:
    """Find out which layers differ.

    Args:
        way: a key of `KEYS`.
        raw: `config.json`.
        where: the file, for messages.
        layers: the number of layers.
        window: where `raw` has no `sliding_window`.
        every: n of "every", where `raw` does not say.

    Raises:
        ModelConfigError: a key has a wrong value, or keys contradict each other.
    """
    if way == "none":
        return Which()
    size = raw.get("sliding_window", window)
    if not (size is None or (isinstance(size, int) and not isinstance(size, bool) and size > 0)):
        raise ModelConfigError(f"{where}: sliding_window = {size!r} must be a positive integer or null")
    if way in ("switch", "late") and not _flag(raw, "use_sliding_window", where):
        size = None
    everyone = tuple(range(layers))
    unrotated: tuple[int, ...] = ()
    if way in ("all", "switch"):
        local = everyone if size is not None else ()
    elif way == "late":
        first = _count(raw, "max_window_layers", 28, where)
        local = everyone[first:] if size is not None else ()
    elif way == "every":
        n = _count(raw, "sliding_window_pattern", _count(raw, "_sliding_window_pattern", every, where), where)
        local = tuple(i for i in everyone if n and (i + 1) % n)
    else:
        unrotated = _unrotated(raw, where, layers)
        local = unrotated if _flag(raw, "use_sliding_window", where) and size is not None else ()
    local = _typed(raw, where, layers, local)
    if local and size is None:
        raise ModelConfigError(f"{where}: layer_types has layers with sliding_attention, but no sliding_window is set")
    return Which(size if local else None, local, unrotated)


def _flag(raw: Mapping[str, Any], name: str, where: str) -> bool:
    value = raw.get(name, False)
    if not isinstance(value, bool):
        raise ModelConfigError(f"{where}: {name} = {value!r} must be true or false")
    return value


def _count(raw: Mapping[str, Any], name: str, default: int, where: str) -> int:
    value = raw.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ModelConfigError(f"{where}: {name} = {value!r} must be an integer, 0 or more")
    return value


def _typed(raw: Mapping[str, Any], where: str, layers: int, local: tuple[int, ...]) -> tuple[int, ...]:
    kinds = raw.get("layer_types")
    if kinds is None:
        return local
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {_FULL, _LOCAL}:
        raise ModelConfigError(f"{where}: layer_types = {kinds!r} must name {_FULL} or {_LOCAL} for each of the "
                               f"{layers} layers")
    return tuple(i for i, kind in enumerate(kinds) if kind == _LOCAL)


def _unrotated(raw: Mapping[str, Any], where: str, layers: int) -> tuple[int, ...]:
    flags = raw.get("no_rope_layers")
    if flags is None:
        every = _count(raw, "no_rope_layer_interval", 4, where)
        return tuple(i for i in range(layers) if every and (i + 1) % every == 0)
    if not isinstance(flags, list) or len(flags) != layers or not set(flags) <= {0, 1}:
        raise ModelConfigError(f"{where}: no_rope_layers = {flags!r} must be 0 or 1 for each of the {layers} layers")
    return tuple(i for i, flag in enumerate(flags) if not flag)


def write(way: str, which: Which, layers: int) -> dict[str, Any]:
    """Return keys that `read` turns into `which`.

    Example:
        >>> write("late", Which(8, (1,)), 2)["layer_types"]
        ['full_attention', 'sliding_attention']
    """
    if way == "none":
        return {}
    said: dict[str, Any] = {"sliding_window": which.window}
    if "use_sliding_window" in KEYS[way]:
        said["use_sliding_window"] = which.window is not None
    if "layer_types" in KEYS[way]:
        said["layer_types"] = [_LOCAL if i in which.local else _FULL for i in range(layers)]
    if way == "nope":
        said["no_rope_layers"] = [int(i not in which.unrotated) for i in range(layers)]
    return said
