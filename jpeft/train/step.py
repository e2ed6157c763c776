"""The training step: loss, gradients of the trainable part, update. Pure, or (`compiled_step`) under `jax.jit`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jpeft.core import compat, transform
from jpeft.core.method import Call, Method
from jpeft.core.sharding import mesh_of
from jpeft.errors import LossFunctionError, TrainConfigError
from jpeft.train.scaling import Scaling, after, begin, keep
from jpeft.train.state import TrainState

Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Metrics]]
Step = Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]

OWN = ("loss", "grad_norm", "learning_rate", "loss_scale", "skipped")
SUMS = ("count", "correct", "loss_sum")
"""Metrics of a loss function that are sums over a batch; all others are means."""


def make_train_step(
    apply: Callable[..., Any], loss_fn: Callable[..., Any], tx: optax.GradientTransformation, *,
    schedule: optax.Schedule | None = None, accumulate: int = 1, clip: float | None = None, ema: float | None = None,
    axis_name: str | Sequence[str] = (), sums: Sequence[str] = SUMS, loss_scale: Scaling = None,
) -> Step:
    """Return `step(state, frozen, batch) -> (state, metrics)`: a pure function for anyone's loop.

    For `jax.jit` (with `donate_argnums=0`, and shardings where there are any), `jax.pmap`, `jax.shard_map`, `lax.scan`.
    Only `state.trainable` is differentiated; `frozen` is an argument, never copied. Step `n` hands out the key
    `fold_in(state.key, n)`. With `m` parts of a batch, from `accumulate` and from the devices of `axis_name`:

        loss = sum_m count_m loss_m / sum_m count_m,    the same for the gradients,

    count being the metric of that name (rows or tokens that are learnt; 1 where there is none). So the parts give what
    the whole batch gives, if the loss is a mean over what it counts.

    Args:
        apply: what `jpeft.adapt` returned, or any function `(trainable, frozen, *args, **kwargs)`.
        loss_fn: `(model, batch, key) -> loss` or `(loss, metrics)`, scalars, where `model(*args, **kwargs)` is `apply`
            with the parameters in place. An adapted function gets `peft=jpeft.Call(key=key)` unless one is passed; the
            regularisers of its methods are added to the loss, as the metric `penalty`; and `model.base(*args,
            **kwargs)` is the model without its adapter, the reference of `jpeft.train.objectives.preference`.
        tx: the optimiser.
        schedule: the learning rate by step, for the metric `learning_rate`.
        accumulate: parts that each batch is worked through in, one after the other: the memory of one part. Part `i`
            has the rows `i, i + accumulate, ...`, so that each device of a sharded batch works on rows of its own.
        clip: largest norm of the trainable gradients; they are scaled down to it.
        ema: decay of an average of the parameters, `state.ema = ema state.ema + (1 - ema) trainable`; the state must
            have been made with `create(..., ema=True)`.
        axis_name: of `jax.pmap`, or the axes of the batch inside `jax.shard_map`; none under `jax.jit` alone.
        sums: metrics that are sums over a batch; all others are means.
        loss_scale: for float16 compute, "dynamic" or a number: the loss is multiplied by it and the gradients are
            divided by it, in float32. A step whose gradients are not finite changes nothing but the scale
            (`jpeft.train.scaling`). The state must have been made with `create(..., loss_scale=...)`.

    Returns:
        The step; its metrics are `loss`, `grad_norm` (before clipping), `learning_rate` if there is a schedule,
        `loss_scale` (of the step) and `skipped` (1 if it was) if the loss is scaled, and those of `loss_fn`.

    Raises:
        TrainConfigError: an argument makes no sense; (when called) the batch or the state does not fit them.
        LossFunctionError: (when called) `loss_fn` returns something else.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft, optax
        >>> from jpeft.train import create, make_train_step
        >>> apply, params, x = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}, jnp.ones((2, 8))
        >>> plan = jpeft.plan(apply, params, (x,), {"w": jpeft.LoRA(rank=2)})
        >>> trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
        >>> tx = optax.adam(1e-2)
        >>> def loss_fn(model, batch, key):
        ...     return jnp.mean(model(batch) ** 2)
        >>> step = jax.jit(make_train_step(jpeft.adapt(apply, plan), loss_fn, tx), donate_argnums=0)
        >>> state, metrics = step(create(trainable, tx, jax.random.key(1)), frozen, x)
        >>> float(metrics["loss"])
        64.0
    """
    if not callable(apply) or not callable(loss_fn):
        raise TrainConfigError(f"apply is a {type(apply).__name__} and loss_fn a {type(loss_fn).__name__}, both must "
                               "be functions; call make_train_step(apply, loss_fn, tx)")
    plan = getattr(apply, "plan", None)
    regularised = plan is not None and any(type(e.method).penalty is not Method.penalty for e in plan.entries)

    def whole(trainable: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
        own = {} if plan is None else {"peft": Call(key=key)}

        def model(*args: Any, **kwargs: Any) -> Any:
            return apply(trainable, frozen, *args, **{**own, **kwargs})

        if plan is not None:
            vars(model)["base"] = functools.partial(vars(apply)["apply"], transform.base(plan, frozen))
        returned = loss_fn(model, batch, key)
        loss, metrics = _checked(returned if isinstance(returned, tuple) else (returned, {}))
        if plan is None or not regularised:
            return loss, metrics
        extra = transform.penalty(plan, trainable, frozen).astype(loss.dtype)
        return loss + extra, {**metrics, "penalty": extra}

    return pure_step(whole, tx, schedule=schedule, accumulate=accumulate, clip=clip, ema=ema, axis_name=axis_name,
                     sums=sums, loss_scale=loss_scale)


def compiled_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, *, schedule: optax.Schedule | None = None, donate: bool = True,
    like: TrainState | None = None, **options: Any,
) -> Any:
    """Return `pure_step(loss_fn, tx, ...)` under `jax.jit`.

    Args:
        loss_fn: as of `pure_step`.
        tx: the optimiser.
        schedule: the learning rate by step, for the metric `learning_rate`.
        donate: let the new state take the memory of the old one, which is then gone.
        like: a state, if it lies on a mesh: the new one lies as it does, and the metrics are on every device.
        **options: as of `make_train_step`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jpeft.train.state import create
        >>> def loss_fn(trainable, frozen, batch, key):
        ...     return jnp.mean((batch @ trainable["w"]) ** 2), {}
        >>> tx = optax.sgd(0.1)
        >>> step = compiled_step(loss_fn, tx)
        >>> state, metrics = step(create({"w": jnp.ones(2)}, tx, jax.random.key(0)), None, jnp.eye(2))
        >>> float(metrics["loss"]), state.trainable["w"].tolist()
        (1.0, [0.8999999761581421, 0.8999999761581421])
    """
    mesh = mesh_of(like)
    where: dict[str, Any] = {} if mesh is None else {"out_shardings": (
        jax.tree.map(lambda leaf: leaf.sharding, like), NamedSharding(mesh, PartitionSpec()))}
    step = pure_step(loss_fn, tx, schedule=schedule, **options)
    return jax.jit(step, donate_argnums=(0,) if donate else (), **where)


def pure_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, *, schedule: optax.Schedule | None = None, accumulate: int = 1,
    clip: float | None = None, ema: float | None = None, axis_name: str | Sequence[str] = (),
    sums: Sequence[str] = SUMS, loss_scale: Scaling = None,
) -> Step:
    """Return the step of `make_train_step` for a loss function that is handed all that there is.

    Args:
        loss_fn: `(trainable, frozen, batch, key) -> (loss, metrics)`: a scalar and a dict of scalars; those of
            `jpeft.train.losses`.
        tx: the optimiser.
        schedule, accumulate, clip, ema, axis_name, sums, loss_scale: as of `make_train_step`.

    Raises:
        TrainConfigError: an argument makes no sense; (when called) the batch or the state does not fit them.
        LossFunctionError: (when called) `loss_fn` returns something else.
    """
    _check(accumulate, clip, ema)
    begin(loss_scale)
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        if (ema is None) != (state.ema is None):
            raise TrainConfigError(f"ema = {ema} and the state has {'no' if state.ema is None else 'an'} average; make "
                                   "the state with create(..., ema=True), and the step with a decay")
        if (loss_scale is None) != (state.scale is None):
            has = "no" if state.scale is None else "a"
            raise TrainConfigError(f"loss_scale = {loss_scale} and the state has {has} scale; give both the same, "
                                   "create(..., loss_scale=...)")
        key, scale = jax.random.fold_in(state.key, state.step), state.scale
        loss, extra, grads = _gradients(loss_fn, state.trainable, frozen, batch, key, accumulate, axes, sums,
                                        None if scale is None else scale.value)
        norm = _norm(grads)
        if clip is not None:
            factor = jnp.minimum(1.0, clip / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
            grads = jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {"loss": loss, "grad_norm": norm}
        if schedule is not None:
            done = state.step if scale is None else state.step - scale.skipped
            metrics["learning_rate"] = jnp.asarray(schedule(done), jnp.float32)
        mean = None if ema is None else jax.tree.map(lambda e, t: (ema * e + (1 - ema) * t).astype(e.dtype), state.ema,
                                                     trainable)
        if scale is not None:
            finite = jnp.isfinite(norm)
            metrics |= {"loss_scale": scale.value, "skipped": jnp.where(finite, 0.0, 1.0)}
            trainable, opt_state, mean = keep(finite, (trainable, opt_state, mean),
                                              (state.trainable, state.opt_state, state.ema))
            scale = after(scale, finite, loss_scale)
        return TrainState(state.step + 1, trainable, opt_state, state.key, mean, scale), {**metrics, **extra}

    return step


def _gradients(loss_fn: LossFn, trainable: Any, frozen: Any, batch: Any, key: jax.Array, parts: int,
               axes: tuple[str, ...], sums: Sequence[str], scale: jax.Array | None,
               ) -> tuple[jax.Array, Metrics, Any]:
    """Return loss, metrics and gradients of a whole batch, which may come in parts."""
    def scaled(trainable: Any, batch: Any, key: jax.Array) -> Any:
        loss, extra = _checked(loss_fn(trainable, frozen, batch, key))
        if scale is None:
            return loss, (loss, extra)
        return loss.astype(jnp.promote_types(loss.dtype, jnp.float32)) * scale, (loss, extra)

    def value_and_grad(trainable: Any, batch: Any, key: jax.Array) -> Any:
        grads, said = jax.grad(scaled, has_aux=True)(trainable, batch, key)
        if scale is not None:
            grads = jax.tree.map(lambda g: (g / scale).astype(g.dtype), grads)
        return said, grads

    if parts == 1 and not axes:
        (loss, extra), grads = value_and_grad(trainable, batch, key)
        return loss, extra, grads
    # Of a parameter that is the same on all devices, shard_map would add up the gradients before they are weighed.
    local = jax.tree.map(lambda t: compat.pvary(t, axes) if axes else t, trainable)

    def times(x: Any, factor: Any, weight: jax.Array) -> jax.Array:
        """Nothing where nothing counts: a mean over no tokens may not be a number."""
        x = jnp.asarray(x)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return jnp.where(weight == 0, jnp.zeros_like(wide), wide * factor)

    def weighed(b: Any, k: jax.Array) -> tuple[Any, Any]:
        (loss, extra), grads = value_and_grad(local, b, k)
        weight = jnp.asarray(extra.get("count", 1.0), jnp.float32)
        said = {name: times(x, 1.0 if name in sums else weight, weight) for name, x in extra.items()}
        grads = jax.tree.map(lambda g: times(g, weight, weight), grads)
        return (weight, times(loss, weight, weight), said), grads

    if parts == 1:
        scalars, grads = weighed(batch, key)
    else:
        def add(total: Any, part: Any) -> tuple[Any, Any]:
            scalars, grads = weighed(part[0], jax.random.fold_in(key, part[1]))
            return jax.tree.map(jnp.add, total, grads), scalars

        zeros = jax.tree.map(lambda t: compat.pvary(
            jnp.zeros_like(t, jnp.promote_types(t.dtype, jnp.float32)), compat.varying_axes(t)), local)
        grads, each = jax.lax.scan(add, zeros, (jax.tree.map(lambda x: _split(x, parts), batch), jnp.arange(parts)))
        scalars = jax.tree.map(lambda x: jnp.sum(x, 0), each)
    if axes:
        scalars, grads = jax.lax.psum((scalars, grads), axes)
    weight, loss, extra = scalars
    share = 1.0 / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
    extra = {name: x if name in sums else x * share for name, x in extra.items()}
    return loss * share, extra, jax.tree.map(lambda g, t: (g * share).astype(t.dtype), grads, trainable)


def _split(x: Any, parts: int) -> jax.Array:
    """Return `[B, ...]` as `[parts, B / parts, ...]`, each part with rows from all over the batch."""
    rows = jnp.shape(x)[0] if jnp.ndim(x) else 0
    if not rows or rows % parts:
        raise TrainConfigError(f"accumulate = {parts} does not divide a batch of {rows} rows (an array of shape "
                               f"{jnp.shape(x)}); each array of the batch needs a first axis that it divides")
    return jnp.swapaxes(jnp.reshape(x, (rows // parts, parts, *jnp.shape(x)[1:])), 0, 1)


def _norm(grads: Any) -> jax.Array:
    """Return the global norm, in float32 or wider: the square of a float16 overflows at 256."""
    return optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), grads))


def _check(accumulate: Any, clip: Any, ema: Any) -> None:
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise TrainConfigError(f"accumulate = {accumulate!r} must be a number of parts, 1 or more")
    if clip is not None and not 0 < clip < float("inf"):
        raise TrainConfigError(f"clip = {clip!r} must be a number above 0, or None")
    if ema is not None and not 0 <= ema < 1:
        raise TrainConfigError(f"ema = {ema!r} must be a decay from 0 to below 1, or None")


def _checked(returned: Any) -> tuple[jax.Array, Metrics]:
    """Return what a loss function returned if a step can use it."""
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping)):
        raise LossFunctionError(
            f"loss_fn returned a {type(returned).__name__}, not (loss, metrics); return a scalar and a dict of scalars"
        )
    loss, metrics = returned
    for name, value in {"the loss": loss, **{repr(k): v for k, v in metrics.items()}}.items():
        if jnp.shape(value) != ():
            raise LossFunctionError(f"loss_fn returned {name} of shape {jnp.shape(value)}; reduce it to a scalar")
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise LossFunctionError(f"loss_fn returned a loss of dtype {jnp.result_type(loss)}; return a floating scalar")
    if taken := [name for name in OWN if name in metrics]:
        raise LossFunctionError(f"loss_fn returned the metric {taken[0]!r}, which the step itself reports; rename it")
    return loss, dict(metrics)
