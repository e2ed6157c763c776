"""The protocol that every method follows, on one page; `Identity` is the worked example.

A method is a frozen dataclass whose fields are its configuration. It knows one leaf (a `Site`) and nothing of models,
frameworks or quantisation. It says three things: which arrays it trains (`init`), what the leaf is worth with them
(`build`), and how that looks as a plain array (`merge`, derived from `build`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jpeft.core import maps, ops
from jpeft.core.ops import Op
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError, NotMergeable, PlanError, nearest

Theta = dict[str, jax.Array]


class Call(NamedTuple):
    """What one call says to the methods; a pytree. `key=None` means evaluation: no dropout.

    Attributes:
        key: a PRNG key; every leaf, layer, use and shard folds its own number into it.
        task: number of the task, or one for each row of the batch `[B]`, for methods that learn several.
        adapter: adapter index, for banks of stacked adapters.
        lengths: lengths of the real tokens, for methods that act from a position on.
        continued: True where the tokens go on after others that a cache holds, the virtual ones among them: no virtual
            tokens are added. It is static: no array, and made inside a jitted function.
    """

    key: Any = None
    task: Any = None
    adapter: Any = None
    lengths: Any = None
    continued: Any = None


class Schedule(NamedTuple):
    """What a method does to its trained values between the steps of a training; pure functions for jit.

    Attributes:
        init: `trainable -> state`, a pytree of arrays, before the first step.
        update: `(trainable, grads, state, step) -> (drop, state)`, after an update of the optimiser: `drop` is
            `{path: {letter: bool array}}`, the values that become zero; `step` counts from 1.
    """

    init: Callable[[dict[str, Theta]], Any]
    update: Callable[[dict[str, Theta], dict[str, Theta], Any, Any], tuple[dict[str, dict[str, Any]], Any]]


@dataclasses.dataclass(frozen=True)
class Method:
    """Base class: every hook with its default. `uses` and `init` and `build` are what most methods write.

    Class attributes:
        uses: the uses of a leaf that the method can ride on.
        call: the fields of `Call` that the method reads.
        hooks: the method changes the output of the leaf's contraction, not the leaf.
        goes_on: of a method that acts by position: it acts on every token of a continued call; others are left out.
        recommended_lr: a sensible default learning rate for Adam.
        formula: the number of trained values of one leaf (of one layer of a stack), in Python's arithmetic over the
            method's fields, `in`, `out`, `size` (values of the leaf) and the letters of `numbers`. What layers of a
            stack share stands in square brackets.
        peft_type: what Hugging Face PEFT calls the method, if it has it.
    """

    registry: ClassVar[dict[str, type[Method]]] = {}
    uses: ClassVar[frozenset[str]] = frozenset({"linear"})
    call: ClassVar[frozenset[str]] = frozenset()
    hooks: ClassVar[bool] = False
    goes_on: ClassVar[bool] = False
    recommended_lr: ClassVar[float] = 1e-3
    formula: ClassVar[str] = ""
    peft_type: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Method.registry[cls.__name__] = cls

    @property
    def virtual_tokens(self) -> int:
        """Number of virtual tokens that the batch is padded with; 0 for most methods."""
        return 0

    @property
    def positions(self) -> bool:
        """True if `hook` must know the token axis; it needs `jpeft.Tokens` then, as virtual tokens do."""
        return False

    @property
    def after_residual(self) -> bool:
        """True if `hook` waits until the output has been added to the residual stream, and changes the sum."""
        return False

    def source(self, site: Site) -> str | None:
        """Path of the leaf (this one, or one contracted before it) whose input `hook` is given as `theta["x"]`."""
        return None

    def sources(self, site: Site) -> tuple[str, ...]:
        """All of them, of a method that holds others."""
        path = self.source(site)
        return () if path is None else (path,)

    @property
    def leads(self) -> bool:
        """True if `build` needs the frozen leaf itself: of several methods on one leaf it is the first."""
        return False

    @property
    def parts(self) -> tuple[tuple[str, Method], ...]:
        """The methods that this one consists of, each with what its letters begin with in theta."""
        return (("", self),)

    @property
    def dense(self) -> bool:
        """True if `build` returns a plain array: such a leaf needs no rule in the engine, whatever its use."""
        return False

    @property
    def tasks(self) -> int:
        """Number of tasks that `Call(task=...)` chooses from; 0 for most methods, which have no tasks."""
        return 0

    @property
    def places(self) -> dict[str, int]:
        """Fields of the configuration of a zoo model that make the leaves which the method trains; {}: it has them."""
        return {}

    def check(self, site: Site) -> None:
        """Raise `MethodConfigError` if the fields do not fit the site (rank larger than the kernel, ...)."""

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        """Return `(trainable, frozen)`, two flat dicts keyed by the paper's letters. Runs under jit."""
        raise MethodConfigError(f"{type(self).__name__} defines no init: write init(key, site, base)")

    @property
    def calibration(self) -> frozenset[str]:
        """What `calibrate` wants to know of the data: `inputs`, `outputs`, `gradient`, or nothing."""
        return frozenset()

    def calibrate(self, key: jax.Array, site: Site, base: jax.Array, start: tuple[Theta, Theta],
                  data: dict[str, jax.Array]) -> tuple[Theta, Theta]:
        """Return what `init` returned (`start`), of the same letters and shapes, but fitted to the data.

        Args:
            key: the key that `init` got.
            site: the leaf.
            base: the frozen array.
            start: `(trainable, frozen)`.
            data: `inputs` `[*stack, in, in]`, the sum of `x^T x` over the leaf's inputs; `outputs` `[*stack, V, out]`,
                the leaf's outputs for the first V tokens of a text, V being `virtual_tokens`; `gradient` of the loss,
                of the leaf's shape.
        """
        return start

    def build(self, site: Site, base: jax.Array, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        """Return what the leaf is worth: an array, or an expression from `jpeft.core.ops` around `base`.

        Runs once per call, on the whole leaf (all layers of a scanned stack), before any view or slice of it.

        Args:
            site: the leaf.
            base: the frozen array `[*site.shape]`.
            theta: trainable and frozen entries in one dict.
            key: this leaf's dropout key, or None in evaluation.

        The default, for methods with `hooks`, leaves the value alone and calls `hook` on the output of its contraction.
        """
        if self.hooks:
            return maps.hooked(base, theta, maps.Hook(self, site), site.stack_dims)
        raise MethodConfigError(f"{type(self).__name__} defines no build: write build(site, base, theta, key)")

    def hook(self, site: Site, theta: Theta, y: jax.Array, start: int) -> jax.Array:
        """Change an output `y`: `[..., out]`, or `[..., T, out]` with `virtual_tokens` or `positions`.

        Args:
            site: the leaf.
            theta: entries of one copy of the leaf; with `source` also `x` `[..., in]` (its rows are those of `y`), and
                what `call` names and the call gives: `lengths` `[B]`, `task` `[]` or `[B]`.
            y: the output, after its bias.
            start: first row of the method's virtual tokens; of a method that has none, of the real ones.
        """
        raise MethodConfigError(f"{type(self).__name__} sets hooks=True and defines no hook")

    def merge(self, site: Site, base: jax.Array, theta: Theta) -> jax.Array:
        """Return the plain array that does the same, or raise `NotMergeable(why)`. `base` is float32 or wider."""
        if self.hooks:
            raise NotMergeable(f"{type(self).__name__} on {site.path!r} acts on activations; keep the adapted function")
        return ops.materialise(self.build(site, base, theta, None))

    def penalty(self, site: Site, theta: Theta) -> jax.Array | None:
        """Return the method's regulariser (a scalar), or None."""
        return None

    @classmethod
    def schedule(cls, entries: Sequence[Any], total: int) -> Schedule | None:
        """Return what drops trained values in the course of a training, or None where nothing does.

        Args:
            entries: every `jpeft.core.plan.Entry` of a plan that has this method; ranks may compete between them.
            total: number of steps of the training.
        """
        return None

    def neutral(self, site: Site, theta: Theta) -> Theta:
        """Return values for trainable entries at which the method does nothing, for layers that a rule leaves out."""
        raise MethodConfigError(
            f"{type(self).__name__} cannot be limited to some layers of the stacked leaf {site.path!r}")

    def live(self, site: Site) -> dict[str, Any]:
        """Return, per trainable entry, a numpy 0/1 mask of the entries that can ever matter; {} means all."""
        return {}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        """Return, per theta entry, the leaf dim that each axis follows (None: replicated), for sharding.

        Every letter of theta is a key and every tuple is as long as the entry has axes.
        """
        raise MethodConfigError(f"{type(self).__name__} defines no axes")

    def numbers(self, site: Site) -> dict[str, int]:
        """Return what the letters of `formula` stand for on this leaf, besides fields, `in`, `out` and `size`."""
        return {}

    def flops(self, site: Site) -> tuple[int, int]:
        """Return `(per row, per call)`: the method's own forward dot FLOPs."""
        return 0, 0


@dataclasses.dataclass(frozen=True)
class Identity(Method):
    """Do nothing: `W' = W`, one trainable scalar that is never read."""

    uses: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding", "tied", "bias", "scale", "other"})

    def init(self, key: jax.Array, site: Site, base: jax.Array) -> tuple[Theta, Theta]:
        return {"nothing": jnp.zeros((), site.theta_dtype)}, {}

    def build(self, site: Site, base: jax.Array, theta: Theta, key: jax.Array | None) -> jax.Array | Op:
        return base

    def neutral(self, site: Site, theta: Theta) -> Theta:
        return {"nothing": theta["nothing"]}

    def axes(self, site: Site) -> dict[str, tuple[int | None, ...]]:
        return {"nothing": ()}


def encode(method: Method) -> dict[str, Any]:
    """Return a method as JSON data: its class name and its fields."""
    def value(x: Any) -> Any:
        return encode(x) if isinstance(x, Method) else [value(v) for v in x] if isinstance(x, tuple) else x

    fields = {f.name: value(getattr(method, f.name)) for f in dataclasses.fields(method)}
    return {"method": type(method).__name__, **fields}


def decode(data: dict[str, Any]) -> Method:
    """Inverse of `encode`.

    Raises:
        PlanError: the class or one of its fields is unknown.
    """
    def value(x: Any) -> Any:
        return decode(x) if isinstance(x, dict) else tuple(value(v) for v in x) if isinstance(x, list) else x

    name = data.get("method", "")
    if name not in Method.registry:
        raise PlanError(f"method {name!r} is unknown ({nearest(name, Method.registry)}); "
                        "import the module that defines it")
    try:
        return Method.registry[name](**{k: value(v) for k, v in data.items() if k != "method"})
    except TypeError as error:
        raise PlanError(f"fields of {name} do not fit: {error}; write the plan with this version") from error
