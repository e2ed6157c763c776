"""Masks: split any pytree in two by rules on paths, and put it together again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from jpeft.core.paths import flatten
from jpeft.errors import NoMatchError, PartitionError, PlanError, nearest

Pattern = str | Callable[[str, Any], bool]


def mask(tree: Any, rules: Mapping[Pattern, bool] | Sequence[Pattern] | Pattern) -> Any:
    """Say, for every leaf, whether it is selected.

    Args:
        tree: any pytree.
        rules: pattern -> bool, in order: the first pattern that matches decides, and a leaf that none matches is
            False. A pattern is a regular expression that matches a whole path (see `jpeft.core.paths.flatten`), or a
            predicate `(path, leaf) -> bool`. Patterns without values (a sequence, or one pattern) mean True.

    Returns:
        A tree of `bool`, of the type of `tree`.

    Raises:
        NoMatchError: a pattern matches no leaf, or only leaves that earlier patterns have taken.
        PlanError: a pattern is not a regular expression, or its value not a bool.

    Example:
        >>> mask({"w": 1.0, "norm": {"scale": 2.0, "bias": 3.0}}, {".*/bias": False, "norm/.*": True})
        {'norm': {'bias': False, 'scale': True}, 'w': False}
    """
    if isinstance(rules, str) or callable(rules):
        rules = (rules,)
    ordered = dict(rules) if isinstance(rules, Mapping) else dict.fromkeys(rules, True)
    for pattern, value in ordered.items():
        if not isinstance(value, (bool, np.bool_)):
            raise PlanError(f"the mask rule {show(pattern)} has the value {value!r}; write True or False")
    paths, leaves, treedef = flatten(tree)
    values = list(ordered.values())
    chosen = first_match(tuple(ordered), paths, leaves)
    return treedef.unflatten([i is not None and bool(values[i]) for i in chosen])


def partition(tree: Any, mask: Any) -> tuple[Any, Any]:
    """Split a tree by a mask into `(selected, rest)`.

    Each half has the type and structure of `tree`, with `optax.MaskedNode()` (a node without leaves) in the place of a
    leaf that is in the other half: `jax.grad` and every Optax transformation see one half alone, and no slot is made
    for a hole.

    Args:
        tree: any pytree.
        mask: a tree of `bool` with the same paths, as `jpeft.mask` returns it.

    Raises:
        PartitionError: the mask has other paths than the tree, or holds something else than bools.

    Example:
        >>> partition({"a": 1.0, "b": 2.0}, {"a": True, "b": False})
        ({'a': 1.0, 'b': MaskedNode()}, {'a': MaskedNode(), 'b': 2.0})
    """
    paths, leaves, treedef = flatten(tree)
    mask_paths, flags, _ = flatten(mask)
    _same_paths(paths, mask_paths, "the tree", "the mask")
    by_path = dict(zip(mask_paths, flags, strict=True))
    for path, flag in by_path.items():
        if not isinstance(flag, (bool, np.bool_)):
            raise PartitionError(f"the mask holds {flag!r} at {path!r}; it must hold a Python bool for every leaf")
    hole = optax.MaskedNode()
    chosen = [(leaf, bool(by_path[path])) for path, leaf in zip(paths, leaves, strict=True)]
    selected = treedef.unflatten([leaf if keep else hole for leaf, keep in chosen])
    rest = treedef.unflatten([hole if keep else leaf for leaf, keep in chosen])
    return selected, rest


def combine(*parts: Any) -> Any:
    """Put the parts of a tree together: the inverse of `partition`.

    `combine(*partition(tree, mask))` is `tree` again: same structure, the same leaf objects. A part that was split
    further is combined by passing all the pieces at once, as a hole of the whole is a hole in each of them.

    Args:
        *parts: trees of one structure; every leaf is in exactly one of them and `optax.MaskedNode()` in the others.

    Raises:
        PartitionError: a leaf is in two parts or in none, or the structures differ.

    Example:
        >>> import optax
        >>> combine({"a": 1.0, "b": optax.MaskedNode()}, {"a": optax.MaskedNode(), "b": 2.0})
        {'a': 1.0, 'b': 2.0}
    """
    if not parts:
        raise PartitionError("combine got no tree; pass the parts that partition returned")
    flat = [flatten(part, is_leaf=is_hole) for part in parts]
    paths, _, treedef = flat[0]
    for n, (other_paths, _, other) in enumerate(flat[1:], start=2):
        _same_paths(paths, other_paths, "part 1", f"part {n}")
        if other != treedef:
            raise PartitionError(
                f"part 1 ({type(parts[0]).__name__}) and part {n} ({type(parts[n - 1]).__name__}) have the same paths "
                f"but other containers or static fields; combine the parts of one partition"
            )
    whole = []
    for path, *leaves in zip(paths, *(leaves for _, leaves, _ in flat), strict=True):
        here = [leaf for leaf in leaves if not is_hole(leaf)]
        if len(here) != 1:
            found = f"in {len(here)} parts" if here else "in no part"
            raise PartitionError(f"the leaf {path!r} is {found}; combine all parts of one partition, each of them once")
        whole.append(here[0])
    return treedef.unflatten(whole)


def is_hole(node: Any) -> bool:
    """Tell whether `node` stands for a leaf that is in another part."""
    return isinstance(node, optax.MaskedNode)


def first_match(patterns: Sequence[Pattern], names: Sequence[str], leaves: Sequence[Any]) -> list[int | None]:
    """Return, for every leaf, the index of the first pattern that matches it, or None.

    Raises:
        NoMatchError: a pattern wins no leaf.
        PlanError: a pattern is not a regular expression.

    Example:
        >>> first_match(["b", "[ab]"], ["a", "b", "c"], [1, 2, 3])
        [1, 0, None]
    """
    tests = [_compile(pattern) for pattern in patterns]
    named = list(zip(names, leaves, strict=True))
    chosen = [next((i for i, test in enumerate(tests) if test(*item)), None) for item in named]
    for i in sorted(set(range(len(tests))) - set(chosen)):
        late = [name for name, leaf in named if tests[i](name, leaf)]
        if late:
            raise NoMatchError(
                f"the rule {show(patterns[i])} comes too late: earlier rules take all of its leaves ({late[0]!r}, "
                f"{len(late)} in all); move it up or drop it"
            )
        pattern = patterns[i]
        hint = nearest(pattern if isinstance(pattern, str) else "", names)
        raise NoMatchError(f"the rule {show(patterns[i])} matches no leaf; a regex must match a whole path; {hint}")
    return chosen


def show(pattern: Pattern) -> str:
    """Return how a pattern is named in messages."""
    return repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__qualname__", repr(pattern))


def _compile(pattern: Pattern) -> Callable[[str, Any], bool]:
    if not isinstance(pattern, str):
        return lambda name, leaf: bool(pattern(name, leaf))
    try:
        regex = re.compile(pattern)
    except re.error as e:
        raise PlanError(f"the rule {pattern!r} is not a regular expression ({e}); escape its special characters") from e
    return lambda name, leaf: regex.fullmatch(name) is not None


def _same_paths(ours: Iterable[str], theirs: Iterable[str], our_name: str, their_name: str) -> None:
    ours, theirs = list(ours), list(theirs)
    for paths, others, name, other_name in ((ours, theirs, our_name, their_name), (theirs, ours, their_name, our_name)):
        only = sorted(set(paths) - set(others))
        if only:
            raise PartitionError(
                f"{name} has the leaf {only[0]!r} ({len(only)} such) and {other_name} has not; give both one structure"
            )
