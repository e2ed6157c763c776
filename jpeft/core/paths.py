"""Paths: one string per leaf of any pytree, the same for every framework that holds the same names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax

from jpeft.errors import PathError

KeyPath = tuple[Any, ...]

_BOXES = frozenset({("flax", "Variable"), ("flax", "AxisMetadata"), ("haliax", "NamedArray")})
_VALUE_NAMES = frozenset({"value", "get_value", "raw_value"})
_LAYER = re.compile(r"(?:.*(?:layer|block|blk|stage|cell)s?|h|encoder|decoder|transformer)_?(\d+)", re.IGNORECASE)


def flatten(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[tuple[str, ...], list[Any], jax.tree_util.PyTreeDef]:
    """Flatten a pytree and name every leaf.

    Dict keys, sequence indices, dataclass fields and flat indices become segments joined by `/`. Inside a segment `~`
    is written `~0` and `/` is written `~1` (as in JSON Pointer, RFC 6901). What a box of Flax or Haliax adds (`.value`
    of an `nnx.Variable` or of `nn.Partitioned`, the index of a `NamedArray`) is dropped, so `nnx.State` and a plain
    dict give one path.
    The path of a tree that is one array is the empty string.

    Args:
        tree: any pytree.
        is_leaf: as in `jax.tree_util.tree_flatten`.

    Returns:
        `(paths, leaves, treedef)`, in the order of `jax.tree_util.tree_flatten`.

    Raises:
        PathError: two leaves have one path.

    Example:
        >>> flatten({"layers": [{"w": 1.0}, {"w": 2.0}], "a/b": 3.0})[0]
        ('a~1b', 'layers/0/w', 'layers/1/w')
    """
    keyed, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    boxes = _box_paths(tree, is_leaf)
    paths: dict[str, KeyPath] = {}
    for keys, _ in keyed:
        path = "/".join(_segment(k) for i, k in enumerate(keys) if not (_is_value(k) and keys[:i] in boxes))
        if path in paths:
            first, second = (jax.tree_util.keystr(k) for k in (paths[path], keys))
            raise PathError(f"two leaves have the path {path!r}: {first} and {second}; rename one of the keys")
        paths[path] = keys
    return tuple(paths), [leaf for _, leaf in keyed], treedef


def names(path: str) -> list[str]:
    """Split a path into names, flat keys with `/` or `.` inside too: `model.layers.0/w` -> `model, layers, 0, w`."""
    return re.split(r"[/.]", path.replace("~1", "/"))


def layer_index(path: str) -> int | None:
    """Return the layer number that a path of an unrolled model names, or None.

    It is read off the first segment that is all digits (`layers/3/kernel`, `h/3/attn/kernel`) or is the name of a layer
    container with a number (`layers_3`, `block3`, `h_3`, `TransformerBlock_3`, `LlamaDecoderLayer_3`). Other numbered
    names (`Dense_3`, `conv2`, `LayerNorm_0`) name no layer. A segment with an escaped `/` (Haiku modules) or with dots
    (`model.layers.3.mlp.up_proj.weight`) counts as several.

    Example:
        >>> [layer_index(p) for p in ("layers/3/w", "TransformerBlock_2/Dense_0/kernel", "Dense_0/kernel")]
        [3, 2, None]
    """
    for segment in names(path):
        if segment.isdecimal():
            return int(segment)
        if match := _LAYER.fullmatch(segment):
            return int(match[1])
    return None


def _segment(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            key = getattr(key, attribute)
            break
    return str(key).replace("~", "~0").replace("/", "~1")


def _is_box(node: Any) -> bool:
    """Tell whether `node` is a box of Flax or Haliax around an array, without importing either."""
    return any((c.__module__.split(".")[0], c.__name__) in _BOXES for c in type(node).__mro__)


def _is_value(key: Any) -> bool:
    if isinstance(key, jax.tree_util.GetAttrKey):
        return key.name in _VALUE_NAMES
    return isinstance(key, jax.tree_util.FlattenedIndexKey)


def _box_paths(tree: Any, is_leaf: Callable[[Any], bool] | None) -> frozenset[KeyPath]:
    """Return the key paths of the outermost boxes in a tree."""
    stop = _is_box if is_leaf is None else lambda node: is_leaf(node) or _is_box(node)
    keyed, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)
    return frozenset(keys for keys, leaf in keyed if _is_box(leaf))
