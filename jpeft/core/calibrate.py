"""Statistics of the data, for methods whose start depends on it: what a leaf's inputs and outputs are, its gradient.

Inputs and outputs come out of a backward pass: a probe rides on the leaf, adds nothing, and says that its "gradient" is
`x^T x`, or what the projection makes of a text. So scans, remat and vmap, sharding and views of the leaf are those of
any method.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.core import maps, ops
from jpeft.core.frozen import Frozen
from jpeft.core.method import Method, Theta
from jpeft.core.ops import Op
from jpeft.core.plan import Entry, Plan
from jpeft.core.site import Site
from jpeft.core.trace import Apply, leaves_of
from jpeft.errors import CallError

Statistics = dict[str, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Data for methods whose start depends on it: `jpeft.init(plan, params, key, calibration=Calibration(..))`.

    Args:
        apply: pure function `apply(params, *args, **kwargs)`, the model or a loss of it. For methods that start from a
            gradient (`lora_ga`) it returns a scalar loss.
        batches: an iterable of batches, each the positional arguments as a tuple or keyword arguments as a mapping. Of
            methods that start from a text (`PrefixTuning`) it is one batch of one row, without virtual tokens.

    Example:
        >>> import jax, jax.numpy as jnp, jpeft
        >>> apply, params, x = (lambda p, x: x @ p["w"]), {"w": jnp.ones((8, 4))}, jnp.eye(8)[:2]
        >>> plan = jpeft.plan(apply, params, (x,), {"w": jpeft.LoRA(rank=2, init_weights="eva")})
        >>> data = jpeft.Calibration(apply, [(x,)])
        >>> trainable, frozen = jpeft.init(plan, params, jax.random.key(0), calibration=data)
        >>> float(jnp.abs(trainable["w"]["a"][2:]).max())
        0.0
    """

    apply: Apply
    batches: Iterable[tuple[Any, ...] | Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Probe(Method):
    """`W' = W`; the derivative of c `[*stack, in, in]` is the sum of `x^T x` over the inputs that anything depends on.

    Inputs whose output has no influence on the function's own (padding, in attention under a mask) are left out. The
    derivative of t `[*stack, n, out]` are the outputs, bias included, for the first n tokens of a text.

    Args:
        inputs: whether there is c.
        outputs: n; 0: there is no t.
    """

    inputs: bool = True
    outputs: int = 0

    uses: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "hooks", self.outputs > 0)

    @property
    def positions(self) -> bool:
        return self.outputs > 0

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        shapes = {"c": (site.in_size,) * 2} if self.inputs else {}
        shapes |= {"t": (self.outputs, site.out_size)} if self.outputs else {}
        return {k: jnp.zeros((*site.stack_shape, *shape), site.theta_dtype) for k, shape in shapes.items()}, {}

    def build(self, site: Site, base: Any, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        if self.inputs:
            watch, own = functools.partial(_watch, site.out_size), {"c": theta["c"]}
            base = ops.add(base, maps.linear(site.shape, own, watch, site.stack_dims, site.in_dims, site.out_dims))
        if self.outputs:
            base = maps.hooked(base, {"t": theta["t"]}, maps.Hook(self, site), site.stack_dims)
        return base

    def hook(self, site: Site, theta: Theta, y: jax.Array, start: int) -> jax.Array:
        rows, length = math.prod(y.shape[:-2]), y.shape[-2]
        if rows != 1 or length < self.outputs:
            raise CallError(f"a start from a text needs one row of {self.outputs} tokens or more, and {site.path!r} is "
                            f"applied to {rows} of {length}; give Calibration(apply, [(ids,)]) with ids [1, T]")
        return _heard(theta["t"].astype(y.dtype), y)


def _watch(outputs: int, theta: maps.Arrays, x: jax.Array) -> jax.Array:
    return _silent(outputs, theta["c"], x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _silent(outputs: int, c: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.zeros((*x.shape[:-1], outputs), x.dtype)


def _silent_forward(outputs: int, c: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _silent(outputs, c, x), x


def _silent_backward(outputs: int, x: jax.Array, slope: jax.Array) -> tuple[jax.Array, jax.Array]:
    seen = jnp.where(jnp.any(slope != 0, -1, keepdims=True), x, jnp.zeros((), x.dtype))
    rows = jnp.reshape(seen, (-1, x.shape[-1]))
    return jnp.matmul(rows.T, rows, precision="highest"), jnp.zeros_like(x)


_silent.defvjp(_silent_forward, _silent_backward)


@jax.custom_vjp
def _heard(t: jax.Array, y: jax.Array) -> jax.Array:
    return y


def _heard_forward(t: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    return y, jnp.reshape(y, y.shape[-2:])[:t.shape[0]]


def _heard_backward(seen: jax.Array, slope: jax.Array) -> tuple[jax.Array, jax.Array]:
    return seen, slope


_heard.defvjp(_heard_forward, _heard_backward)


def statistics(adapt: Callable[[Apply, Plan], Callable[..., Any]], plan: Plan, params: Any,
               calibration: Calibration) -> Statistics:
    """Return, for each path, what its method wants: `inputs` (a sum), `outputs` (of a text), `gradient` (a mean).

    Args:
        adapt: `jpeft.adapt`.
        plan: the plan.
        params: the base parameters.
        calibration: the data.

    Raises:
        CallError: there are no batches, more than the text that is needed, one is no tuple or mapping, or a loss is
            needed and `apply` returns none.
    """
    kinds = ("inputs", "outputs", "gradient")
    wanted = {kind: [e for e in plan.entries if kind in e.method.calibration] for kind in kinds}
    entries = [Entry(e.site, Probe(e in wanted["inputs"], e.method.virtual_tokens if e in wanted["outputs"] else 0))
               for e in plan.entries if {"inputs", "outputs"} & e.method.calibration]
    probes = dataclasses.replace(plan, tokens=plan.tokens if wanted["outputs"] else None, entries=tuple(entries))
    probed = adapt(calibration.apply, probes)
    names, _, treedef = leaves_of(params)
    chosen = {e.path for e in wanted["gradient"]}

    def spread(theta: Any, base: Any, args: Any, kwargs: Any) -> jax.Array:
        outs = jax.tree.leaves(probed(theta, Frozen(base, {}), *args, **kwargs))
        outs = [y for y in outs if jnp.issubdtype(y.dtype, jnp.floating)]
        if not outs:
            raise CallError("the calibration function returns no floating-point array; return the model's output")
        keys = jax.random.split(jax.random.key(0), len(outs))
        return sum(jnp.vdot(jax.random.normal(k, y.shape, jnp.float32).astype(y.dtype), y).astype(jnp.float32)
                   for k, y in zip(keys, outs, strict=True)) + jnp.zeros((), jnp.float32)

    def loss(some: dict[str, Any], base: Any, args: Any, kwargs: Any) -> jax.Array:
        mixed = [some.get(n, leaf) for n, leaf in zip(names, jax.tree.leaves(base), strict=True)]
        value = calibration.apply(jax.tree.unflatten(treedef, mixed), *args, **kwargs)
        if not hasattr(value, "shape") or value.shape != ():
            raise CallError("a start from the gradient needs a loss, and the calibration function returns "
                            f"{getattr(value, 'shape', type(value).__name__)}; let it return a scalar")
        return value

    @jax.jit
    def step(base: Any, args: Any, kwargs: Any) -> Any:
        zeros = {p: {k: jnp.zeros(s.shape, s.dtype) for k, s in t.items()} for p, t in probes.theta_shapes()[0].items()}
        some = {n: leaf for n, leaf in zip(names, jax.tree.leaves(base), strict=True) if n in chosen}
        return (jax.grad(spread)(zeros, base, args, kwargs) if zeros else {},
                jax.grad(loss)(some, base, args, kwargs) if some else {})

    total: Any = None
    count = 0
    for batch in calibration.batches:
        if not isinstance(batch, (tuple, Mapping)):
            raise CallError(f"a calibration batch is a {type(batch).__name__}; give the arguments of the calibration "
                            "function as a tuple, or as a mapping of keywords")
        args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else (batch, {})
        now = step(params, args, kwargs)
        total = now if total is None else jax.tree.map(jnp.add, total, now)
        count += 1
    if total is None:
        raise CallError("calibration has no batches; give one or more (an iterator can be used only once)")
    if count > 1 and wanted["outputs"]:
        raise CallError(f"{wanted['outputs'][0].path!r} starts from one text, and calibration has {count} batches; "
                        "give one batch of one row")
    result: Statistics = {e.path: {} for e in plan.entries}
    for path, theta in total[0].items():
        result[path] |= {{"c": "inputs", "t": "outputs"}[letter]: value for letter, value in theta.items()}
    for path, slope in total[1].items():
        result[path]["gradient"] = slope / count
    return result
