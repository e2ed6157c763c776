"""The optimiser by name: schedule, weight decay on matrices only, clipping, LoRA+."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax

from jpeft.core.plan import Plan
from jpeft.errors import TrainConfigError, nearest
from jpeft.optim import decay_mask, lora_plus, scheduled

NAMES = ("adamw", "adam", "sgd", "lion", "adafactor")
SCHEDULES = ("linear", "cosine", "constant")
_BETAS = {"lion": (0.9, 0.99)}


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Which optimiser and how its learning rate goes; checked when it is made.

    Attributes:
        name: "adamw", "adam", "sgd", "lion" or "adafactor".
        learning_rate: the peak; None: what the plan's methods recommend, the smallest where they differ.
        schedule: after the warm-up, "linear" or "cosine" to zero, or "constant".
        warmup: share of all steps (below 1), or number of steps (from 1), in which the learning rate rises.
        weight_decay: decoupled: a step subtracts `learning_rate * weight_decay * w`, from the entries that
            `jpeft.optim.decay_mask` names. Adam has none: that is AdamW.
        clip: largest global norm of the trainable gradients; None: no limit.
        betas: decay rates of Adam's or Lion's averages; the first is SGD's momentum; None: (0.9, 0.999), for Lion
            (0.9, 0.99), for SGD no momentum. Adafactor has none.
        eps: of Adam.
        lora_plus: how many times larger the learning rate of LoRA's `b` is; None: it is not.
        rates: path of a leaf -> the peak of what trains there, in place of `learning_rate`.

    Raises:
        TrainConfigError: a field has a value that makes no sense.
    """

    name: str = "adamw"
    learning_rate: float | None = None
    schedule: str = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None
    betas: tuple[float, float] | None = None
    eps: float = 1e-8
    lora_plus: float | None = None
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field, known in (("name", NAMES), ("schedule", SCHEDULES)):
            value = getattr(self, field)
            if value not in known:
                hint = nearest(str(value), known, 1)
                raise TrainConfigError(f"{field} = {value!r} is none of {', '.join(known)} ({hint})")
        for field in ("learning_rate", "clip", "eps", "lora_plus"):
            value = getattr(self, field)
            if value is not None and not 0 < value < float("inf"):
                raise TrainConfigError(f"{field} = {value!r} must be a number above 0")
        for path, value in self.rates.items():
            if not 0 < value < float("inf"):
                raise TrainConfigError(f"rates[{path!r}] = {value!r} must be a number above 0")
        if not 0 <= self.weight_decay < float("inf"):
            raise TrainConfigError(f"weight_decay = {self.weight_decay!r} must be 0 or more")
        if self.name == "adam" and self.weight_decay:
            raise TrainConfigError(
                f"adam has no weight decay and weight_decay = {self.weight_decay}; use adamw, or set it to 0")
        if not 0 <= self.warmup < float("inf") or (self.warmup > 1 and self.warmup != int(self.warmup)):
            raise TrainConfigError(f"warmup = {self.warmup!r} must be a share below 1 or a whole number of steps")
        if self.betas is not None and not (len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)):
            raise TrainConfigError(f"betas = {self.betas!r} must be two numbers in [0, 1)")


def make(
    optimizer: Optimizer, total_steps: int, trainable: Any, plan: Plan | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return the optimiser and its learning rate by step.

    Args:
        optimizer: what to make.
        total_steps: length of the schedule.
        trainable: the parameters, whose names say which decay and which are faster with LoRA+.
        plan: says which learning rate suits, if the optimiser does not, and what its methods do between steps
            (`jpeft.optim.scheduled`).

    Raises:
        MethodConfigError: a method's schedule does not fit `total_steps`.
        TrainConfigError: there is no learning rate, the warm-up is longer than the training, or a path of `rates` is
            none.
        NoMatchError: LoRA+ finds no entry `b` beside an `a`.

    Example:
        >>> import jax.numpy as jnp
        >>> tx, rate = make(Optimizer("sgd", 1.0, warmup=2), 6, {"w": jnp.ones(2)})
        >>> [round(float(rate(step)), 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    peak = optimizer.learning_rate
    if peak is None:
        rates = [entry.method.recommended_lr for entry in plan.entries] if plan is not None else []
        if not rates:
            raise TrainConfigError("learning_rate is not set and there is no plan that recommends one; set it")
        peak = min(rates)
    rate = schedule(optimizer.schedule, peak, optimizer.warmup, total_steps)
    base = _base(optimizer)
    if optimizer.lora_plus is not None:
        tx = lora_plus(rate, optimizer.lora_plus, trainable=trainable, base=base)
    else:
        tx = base(rate)
    if optimizer.rates:
        tx = optax.chain(tx, _scaled({path: own / peak for path, own in optimizer.rates.items()}, trainable))
    if optimizer.clip is not None:
        tx = optax.chain(optax.clip_by_global_norm(optimizer.clip), tx)
    return tx if plan is None else scheduled(tx, plan, total_steps), rate


def _scaled(factors: Mapping[str, float], trainable: Any) -> optax.GradientTransformation:
    """Return what scales the updates of some leaves: an update is proportional to the learning rate."""
    known = list(trainable) if isinstance(trainable, Mapping) else []
    for path in factors:
        if path not in known:
            raise TrainConfigError(f"rates has the path {path!r}, where nothing trains; {nearest(path, known)}")

    def scale(updates: Any, params: Any = None) -> Any:
        return {path: optax.tree.scale(factors.get(path, 1.0), update) for path, update in updates.items()}

    return optax.stateless(scale)


def schedule(kind: str, peak: float, warmup: float, total_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of updates so far; no step has rate zero.

    It rises to `peak` in the last of `w` warm-up steps, and would reach zero one step after the last.

    Args:
        kind: "linear", "cosine" or "constant".
        peak: the largest value.
        warmup: share of the steps, or their number.
        total_steps: number of steps.

    Raises:
        TrainConfigError: there are no steps, or fewer than the warm-up has.

    Example:
        >>> [round(float(schedule("cosine", 1.0, 0.5, 4)(step)), 3) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    if total_steps < 1:
        raise TrainConfigError(f"total_steps = {total_steps} must be 1 or more")
    steps = round(warmup * total_steps) if warmup < 1 else int(warmup)
    if steps > total_steps:
        raise TrainConfigError(f"warmup = {steps} steps is longer than the training of {total_steps}; shorten it")

    def rate(step: Any) -> Any:
        done = jnp.asarray(step, jnp.float32)
        left = jnp.clip((total_steps - done) / max(total_steps - steps, 1), 0.0, 1.0)
        shape = {"linear": left, "cosine": 0.5 - 0.5 * jnp.cos(jnp.pi * left), "constant": jnp.ones_like(left)}[kind]
        return peak * jnp.where(done < steps, (done + 1) / max(steps, 1), shape)

    return rate


def _base(optimizer: Optimizer) -> Callable[[Any], optax.GradientTransformation]:
    """Return what makes the optimiser, without clipping, from a learning rate."""
    b1, b2 = optimizer.betas or _BETAS.get(optimizer.name, (0.9, 0.999))
    decay = {"weight_decay": optimizer.weight_decay, "mask": decay_mask}
    if optimizer.name == "adamw":
        return functools.partial(optax.adamw, b1=b1, b2=b2, eps=optimizer.eps, **decay)
    if optimizer.name == "adam":
        return functools.partial(optax.adam, b1=b1, b2=b2, eps=optimizer.eps)
    if optimizer.name == "lion":
        return functools.partial(optax.lion, b1=b1, b2=b2, **decay)
    if optimizer.name == "sgd":
        scaled = optax.identity() if optimizer.betas is None else optax.trace(b1)
    else:
        scaled = optax.chain(optax.adafactor(), optax.scale(-1))
    return lambda rate: optax.chain(
        scaled, optax.add_decayed_weights(**decay), optax.scale_by_learning_rate(rate))
