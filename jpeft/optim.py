"""What Optax must know of adapter parameters: which to decay, how to group them, LoRA+, and schedules of methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jpeft.core.method import Method, Schedule, Theta
from jpeft.core.partition import Pattern, first_match, is_hole
from jpeft.core.paths import flatten
from jpeft.core.plan import Entry, Plan
from jpeft.errors import CallError, NoMatchError

_VECTORS = frozenset({"m", "l", "s", "g", "d", "e", "la", "lb", "lambda", "gamma", "scale", "bias", "gate", "magnitude",
                      "alpha", "nothing"})
_VECTOR_LEAVES = frozenset({"bias", "scale"})


def decay_mask(trainable: Any) -> Any:
    """Say which trainable entries weight decay applies to: for `optax.adamw(..., mask=jpeft.optim.decay_mask)`.

    Matrices decay (LoRA's `a` and `b`, an adapter's `down` and `up`); what scales, shifts or gates does not, as
    pulling it to zero pulls the model away from the base or to a dead unit. An entry decays if all of this holds:

    * it has two axes or more;
    * its letter is not that of a vector: `m`, `l`, `s`, `g`, `d`, `e`, `la`, `lb`, `lambda`, `gamma`, `scale`, `bias`,
      `gate`, `magnitude`, `alpha`, alone or after a `_` (`down_bias`), nor `b` without an `a` beside it (a bias);
    * the leaf that it rides on is not called `bias` or `scale`.

    Names count, and not the number of axes alone, as a vector per layer of a scanned model has two axes.

    Args:
        trainable: `{path: {letter: array}}`, or any other pytree: the last segment of a leaf's path is its letter.
            Holes (`optax.MaskedNode`) stay holes.

    Returns:
        A tree of `bool` of the type of `trainable`.

    Example:
        >>> import jax.numpy as jnp
        >>> decay_mask({"w": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 4)), "m": jnp.ones((4, 1))}})
        {'w': {'a': True, 'b': True, 'm': False}}
    """
    names, leaves, treedef = _flatten(trainable)
    pairs = _with_partner(names)

    def decays(name: str, leaf: Any) -> bool:
        *_, parent, letter = ("", *name.split("/"))
        vector = letter.rpartition("_")[2] in _VECTORS or (letter == "b" and name not in pairs)
        return leaf.ndim >= 2 and not vector and parent not in _VECTOR_LEAVES

    return treedef.unflatten(
        [leaf if is_hole(leaf) else decays(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
    )


def labels(trainable: Any, rules: Mapping[Pattern, str], default: str = "default") -> Any:
    """Name the group that each trainable entry belongs to: the labels that `optax.partition` asks for.

    Args:
        trainable: `{path: {letter: array}}`, or any other pytree.
        rules: pattern -> label, in order: the first pattern that matches decides. A pattern is a regular expression
            that matches a whole name, `<path>/<letter>`, or a predicate `(name, leaf) -> bool`.
        default: label of an entry that no pattern matches.

    Returns:
        A tree of `str` of the type of `trainable`.

    Raises:
        NoMatchError: a pattern matches no entry, or only entries that earlier patterns have taken.
        PlanError: a pattern is not a regular expression.

    Example:
        >>> import jax.numpy as jnp
        >>> labels({"h/0/w": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 4))}}, {".*/b": "fast"}, default="slow")
        {'h/0/w': {'a': 'slow', 'b': 'fast'}}
    """
    names, leaves, treedef = _flatten(trainable)
    full = [(name, leaf) for name, leaf in zip(names, leaves, strict=True) if not is_hole(leaf)]
    chosen = first_match(tuple(rules), [name for name, _ in full], [leaf for _, leaf in full])
    groups = list(rules.values())
    found = {name: default if i is None else groups[i] for (name, _), i in zip(full, chosen, strict=True)}
    return treedef.unflatten([found.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)])


def lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    ratio: float = 16.0,
    *,
    trainable: Any = None,
    base: Callable[..., optax.GradientTransformation] = optax.adamw,
    **options: Any,
) -> optax.GradientTransformation:
    """Return LoRA+: an optimiser whose learning rate is `ratio` times larger for `b` than for the rest.

    For `dW = a b` (with `b` zero at the start) and an optimiser with updates `-lr * u`:

        a <- a - lr * u_a,    b <- b - ratio * lr * u_b.

    Feature learning in wide models needs `ratio >> 1`; the paper recommends 16 for Adam (Hayou et al.,
    arXiv:2402.12354). `b` is an entry of that letter with an entry `a` beside it; all others (magnitudes, biases, ...)
    get `learning_rate`.

    Args:
        learning_rate: a number, a traced scalar or an Optax schedule.
        ratio: learning rate of `b` over that of `a`.
        trainable: the parameters, if the groups are to be fixed (and checked) now and not at `init`.
        base: makes the optimiser of a group from a learning rate; any Optax optimiser.
        **options: passed to `base`, such as `weight_decay=0.1, mask=jpeft.optim.decay_mask`.

    Raises:
        NoMatchError: no entry is a `b` beside an `a` (here, or in `init`).

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": {"a": jnp.ones((4, 2)), "b": jnp.zeros((2, 4))}}
        >>> tx = lora_plus(1e-3, ratio=16.0, base=optax.sgd)
        >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> float(updates["w"]["a"][0, 0]), float(updates["w"]["b"][0, 0])
        (-0.0010000000474974513, -0.01600000075995922)
    """

    def faster(step: Any) -> Any:
        return ratio * learning_rate(step)

    fast = faster if callable(learning_rate) else ratio * learning_rate
    groups = {"b": base(fast, **options), "rest": base(learning_rate, **options)}
    return optax.partition(groups, _lora_labels if trainable is None else _lora_labels(trainable))


class Scheduled(NamedTuple):
    """State of `scheduled`: how many updates are done, the optimiser's state, and those of the methods."""

    step: jax.Array
    inner: Any
    methods: tuple[Any, ...]


class _Group(NamedTuple):
    """The leaves of one class of methods: `(path, what the letters begin with, entry)`, and what happens to them."""

    members: tuple[tuple[str, str, Entry], ...]
    schedule: Schedule

    def view(self, tree: Mapping[str, Theta]) -> dict[str, Theta]:
        return {e.path: {k.removeprefix(start): v for k, v in tree[path].items() if k.startswith(start)}
                for path, start, e in self.members}


def scheduled(tx: optax.GradientTransformation, plan: Plan, total_steps: int) -> optax.GradientTransformation:
    """Return `tx` with what the plan's methods do between steps: AdaLoRA drops the ranks that matter least.

    It is `tx` itself where no method does anything. All of it happens in `update`, under jit, without another trace;
    the state is part of the optimiser's, so a checkpoint holds it.

    Args:
        tx: the whole optimiser, clipping included.
        plan: made for the parameters that are trained; a method may be part of a `Chain`.
        total_steps: number of updates of the training.

    Raises:
        MethodConfigError: a method's schedule does not fit the training.
        CallError: (in `update`) the parameters are not given.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft, optax
        >>> params = {"w": jnp.ones((8, 4))}
        >>> rules = {"w": jpeft.AdaLoRA(init_r=3, target_r=1)}
        >>> plan = jpeft.plan(lambda p, x: x @ p["w"], params, (jnp.ones((2, 8)),), rules)
        >>> trainable, _ = jpeft.init(plan, params, jax.random.key(0))
        >>> tx = scheduled(optax.sgd(0.1), plan, total_steps=1)
        >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, trainable), tx.init(trainable), trainable)
        >>> int(jnp.count_nonzero(optax.apply_updates(trainable, updates)["w"]["e"]))
        1
    """
    kinds: dict[type[Method], list[tuple[str, str, Entry]]] = {}
    for e in plan.entries:
        for start, part in e.method.parts:
            site = dataclasses.replace(e.site, path=f"{e.path}/{start}") if start else e.site
            kinds.setdefault(type(part), []).append((e.path, start, Entry(site, part, e.layers)))
    found = [(members, kind.schedule([e for *_, e in members], total_steps)) for kind, members in kinds.items()]
    groups = [_Group(tuple(members), made) for members, made in found if made is not None]
    if not groups:
        return tx

    def init(trainable: Any) -> Scheduled:
        return Scheduled(jnp.zeros((), jnp.int32), tx.init(trainable),
                         tuple(g.schedule.init(g.view(trainable)) for g in groups))

    def update(grads: Any, state: Scheduled, trainable: Any = None) -> tuple[Any, Scheduled]:
        if trainable is None:
            raise CallError("update got no parameters, and a method of the plan changes them between steps; call "
                            "tx.update(grads, state, trainable)")
        updates, inner = tx.update(grads, state.inner, trainable)
        after, step, states = optax.apply_updates(trainable, updates), state.step + 1, []
        updates = {path: dict(theta) for path, theta in updates.items()}
        for g, old in zip(groups, state.methods, strict=True):
            drop, new = g.schedule.update(g.view(after), g.view(grads), old, step)
            states.append(new)
            for path, start, e in g.members:
                for letter, gone in drop[e.path].items():
                    k = f"{start}{letter}"
                    updates[path][k] = jnp.where(gone, -trainable[path][k], updates[path][k])
        return updates, Scheduled(step, inner, tuple(states))

    return optax.GradientTransformation(init, update)


def _lora_labels(trainable: Any) -> Any:
    names, leaves, _ = _flatten(trainable)
    pairs = _with_partner(names)
    if not any(name in pairs and not is_hole(leaf) for name, leaf in zip(names, leaves, strict=True)):
        raise NoMatchError("LoRA+ needs an entry 'b' beside an entry 'a' and finds none; use it with LoRA-like methods")
    return labels(trainable, {lambda name, _: name in pairs: "b"}, default="rest")


def _with_partner(names: tuple[str, ...]) -> frozenset[str]:
    """Return the names of the `b` that have an `a` beside them."""
    known = set(names)
    heads = (name.rpartition("/") for name in names)
    return frozenset(f"{head}{slash}b" for head, slash, letter in heads if letter == "b" and f"{head}{slash}a" in known)


def _flatten(tree: Any) -> tuple[tuple[str, ...], list[Any], jax.tree_util.PyTreeDef]:
    """Flatten with holes as leaves; a name is the raw keys joined by `/`, so that of theta is `<path>/<letter>`."""
    paths, leaves, treedef = flatten(tree, is_leaf=is_hole)
    return tuple(path.replace("~1", "/").replace("~0", "~") for path in paths), leaves, treedef
