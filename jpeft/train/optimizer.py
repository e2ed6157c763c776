"""The optimiser by name: schedule, weight decay on matrices only, clipping, LoRA+, rates of single leaves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jpeft.core.plan import Plan
from jpeft.errors import TrainConfigError, nearest
from jpeft.optim import decay_mask, lora_plus, scheduled

NAMES = ("adamw", "adam", "sgd", "lion", "adafactor", "muon", "schedule_free")
SCHEDULES = ("linear", "cosine", "constant", "wsd")
WSD_DECAY = 0.2  # of all steps, where nothing else is said
RMS = 0.2  # of Muon's updates, that of AdamW's, so that the same learning rates suit (arXiv:2502.16982)
_BETAS = {"lion": (0.9, 0.99), "schedule_free": (0.9, 0.999)}


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Which optimiser and how its learning rate goes; checked when it is made.

    Attributes:
        name: "adamw", "adam", "sgd", "lion", "adafactor", "muon" or "schedule_free". Muon (arXiv:2502.16982) makes the
            momentum of each matrix orthogonal, one of a stack at a time, scaled so that the learning rates of AdamW
            suit; the matrices are what `jpeft.optim.decay_mask` names, and AdamW trains the rest. "schedule_free"
            (arXiv:2405.15682) is AdamW with an average in place of a schedule: `state.evaluated` is what to evaluate
            and keep.
        learning_rate: the peak; None: what the plan's methods recommend, the smallest where they differ.
        schedule: after the warm-up, "linear" or "cosine" to zero, "constant", or "wsd" (warm-up, stable, decay:
            constant, then linear to zero).
        warmup: share of all steps (below 1), or number of steps (from 1), in which the learning rate rises.
        weight_decay: decoupled: a step subtracts `learning_rate * weight_decay * w`, from the entries that
            `jpeft.optim.decay_mask` names. Adam has none: that is AdamW.
        clip: largest global norm of the trainable gradients; None: no limit.
        betas: decay rates of Adam's or Lion's averages; the first is SGD's momentum, and the share of the average in
            "schedule_free"; None: (0.9, 0.999), for Lion (0.9, 0.99), for SGD no momentum. Adafactor has none, and
            Muon's own momentum is 0.95.
        eps: of Adam and Muon.
        lora_plus: how many times larger the learning rate of LoRA's `b` is; None: it is not.
        rates: path of a leaf -> the peak of what trains there, in place of `learning_rate`.
        decay: of "wsd": share of all steps (below 1), or number of steps (from 1), in which it falls; None: 0.2.

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
    decay: float | None = None

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
        for field in ("warmup", "decay"):
            value = getattr(self, field)
            if value is not None and not (0 <= value < float("inf") and (value < 1 or value == int(value))):
                raise TrainConfigError(f"{field} = {value!r} must be a share below 1 or a whole number of steps")
        if self.decay is not None and self.schedule != "wsd":
            raise TrainConfigError(f"decay = {self.decay} is of the schedule wsd, and this is {self.schedule}; drop it")
        if self.name == "schedule_free" and self.schedule != "constant":
            raise TrainConfigError(f"schedule_free averages in place of a schedule, and schedule = {self.schedule!r}; "
                                   "set it to 'constant'")
        if self.name == "schedule_free" and self.betas is not None and not self.betas[0]:
            raise TrainConfigError("schedule_free divides by the first of betas, which is 0; set it above 0, as to 0.9")
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
        TrainConfigError: there is no learning rate, the warm-up is longer than the training, a path of `rates` is
            none, or a method of the plan drops values between steps, of which "schedule_free" has an average.
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
    rate = schedule(optimizer.schedule, peak, optimizer.warmup, total_steps,
                    WSD_DECAY if optimizer.decay is None else optimizer.decay)
    base = _base(optimizer, plan)
    if optimizer.lora_plus is not None:
        tx = lora_plus(rate, optimizer.lora_plus, trainable=trainable, base=base)
    else:
        tx = base(rate)
    if optimizer.rates:
        tx = optax.chain(tx, _scaled({path: own / peak for path, own in optimizer.rates.items()}, trainable))
    if optimizer.name == "schedule_free":
        tx = optax.contrib.schedule_free(tx, rate, b1=(optimizer.betas or _BETAS["schedule_free"])[0])
    if optimizer.clip is not None:
        tx = optax.chain(optax.clip_by_global_norm(optimizer.clip), tx)
    made = tx if plan is None else scheduled(tx, plan, total_steps)
    if made is not tx and optimizer.name == "schedule_free":
        raise TrainConfigError("a method of the plan drops values between steps, which the average of schedule_free "
                               "would bring back; use adamw")
    return made, rate


def _scaled(factors: Mapping[str, float], trainable: Any) -> optax.GradientTransformation:
    """Return what scales the updates of some leaves: an update is proportional to the learning rate."""
    known = list(trainable) if isinstance(trainable, Mapping) else []
    for path in factors:
        if path not in known:
            raise TrainConfigError(f"rates has the path {path!r}, where nothing trains; {nearest(path, known)}")

    def scale(updates: Any, params: Any = None) -> Any:
        return {path: optax.tree.scale(factors.get(path, 1.0), update) for path, update in updates.items()}

    return optax.stateless(scale)


def schedule(kind: str, peak: float, warmup: float, total_steps: int, decay: float = WSD_DECAY) -> optax.Schedule:
    """Return the learning rate as a function of the number of updates so far; no step has rate zero.

    It rises to `peak` in the last of `w` warm-up steps, and would reach zero one step after the last.

    Args:
        kind: "linear", "cosine", "constant" or "wsd".
        peak: the largest value.
        warmup: share of the steps, or their number.
        total_steps: number of steps.
        decay: of "wsd", the same of the last steps, in which it falls.

    Raises:
        TrainConfigError: there are no steps, or fewer than warm-up and decay have.

    Example:
        >>> [round(float(schedule("cosine", 1.0, 0.5, 4)(step)), 3) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    if total_steps < 1:
        raise TrainConfigError(f"total_steps = {total_steps} must be 1 or more")
    steps, falling = (round(x * total_steps) if x < 1 else int(x) for x in (warmup, decay))
    if steps > total_steps:
        raise TrainConfigError(f"warmup = {steps} steps is longer than the training of {total_steps}; shorten it")
    if kind == "wsd" and steps + falling > total_steps:
        raise TrainConfigError(f"warmup = {steps} and decay = {falling} steps are longer than the training of "
                               f"{total_steps}; shorten one")

    def rate(step: Any) -> Any:
        done = jnp.asarray(step, jnp.float32)
        left = jnp.clip((total_steps - done) / max(total_steps - steps, 1), 0.0, 1.0)
        shape = {"linear": left, "cosine": 0.5 - 0.5 * jnp.cos(jnp.pi * left), "constant": jnp.ones_like(left),
                 "wsd": jnp.clip((total_steps - done) / max(falling, 1), 0.0, 1.0)}[kind]
        return peak * jnp.where(done < steps, (done + 1) / max(steps, 1), shape)

    return rate


def _base(optimizer: Optimizer, plan: Plan | None) -> Callable[[Any], optax.GradientTransformation]:
    """Return what makes the optimiser, without clipping, from a learning rate."""
    b1, b2 = optimizer.betas or _BETAS.get(optimizer.name, (0.9, 0.999))
    decay = {"weight_decay": optimizer.weight_decay, "mask": decay_mask}
    if optimizer.name == "adamw":
        return functools.partial(optax.adamw, b1=b1, b2=b2, eps=optimizer.eps, **decay)
    if optimizer.name == "adam":
        return functools.partial(optax.adam, b1=b1, b2=b2, eps=optimizer.eps)
    if optimizer.name == "lion":
        return functools.partial(optax.lion, b1=b1, b2=b2, **decay)
    if optimizer.name == "muon":
        return functools.partial(
            optax.contrib.muon, eps=optimizer.eps, weight_decay=optimizer.weight_decay, weight_decay_mask=decay_mask,
            adam_b1=b1, adam_b2=b2, consistent_rms=RMS,
            muon_weight_dimension_numbers=functools.partial(muon_dimensions, plan=plan))
    if optimizer.name == "schedule_free":  # its average takes the place of Adam's first one
        scaled = optax.scale_by_rms(b2, optimizer.eps, eps_in_sqrt=False, bias_correction=True)
    elif optimizer.name == "sgd":
        scaled = optax.identity() if optimizer.betas is None else optax.trace(b1)
    else:
        scaled = optax.chain(optax.adafactor(), optax.scale(-1))
    return lambda rate: optax.chain(
        scaled, optax.add_decayed_weights(**decay), optax.scale_by_learning_rate(rate))


def muon_dimensions(trainable: Any, plan: Plan | None = None) -> Any:
    """Say which axes of each entry are the two sides of a matrix, for `optax.contrib.muon`; all others are a stack.

    What `jpeft.optim.decay_mask` names is a matrix; of an entry of a plan, the axes that follow the inputs of its leaf
    are one side, those that follow the outputs the other, and the rank is the one that is missing: `[L, in, r]` is `L`
    matrices. Without a plan the last two axes are the sides. What has no two sides is None: AdamW trains it.

    Args:
        trainable: `{path: {letter: array}}`, or any other pytree.
        plan: whose entries they are.

    Example:
        >>> import jax.numpy as jnp
        >>> muon_dimensions({"w": {"a": jnp.ones((3, 8, 2)), "m": jnp.ones((3, 8))}})["w"]
        {'a': MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,)), 'm': None}
    """
    known = {} if plan is None else {entry.path: entry for entry in plan.entries}

    def one(keys: Any, matrix: Any, leaf: Any) -> Any:
        if not matrix:
            return None
        entry = known.get(str(getattr(keys[0], "key", ""))) if len(keys) == 2 else None
        if entry is None:
            return optax.contrib.MuonDimensionNumbers((leaf.ndim - 2,), (leaf.ndim - 1,))
        site, follows = entry.site, entry.method.axes(entry.site)[keys[1].key]
        within = [i for i, dim in enumerate(follows) if dim not in site.stack_dims]
        ins = tuple(i for i in within if follows[i] in site.in_dims)
        outs = tuple(i for i in within if follows[i] in site.out_dims)
        rank = tuple(i for i in within if follows[i] is None)
        if len(rank) == 2 and not (ins or outs):
            ins, outs, rank = rank[:1], rank[1:], ()
        sides = (ins or rank, outs or (rank if ins else ()))
        whole = all(sides) and sorted(sides[0] + sides[1]) == within
        return optax.contrib.MuonDimensionNumbers(*sides) if whole else None

    return jax.tree_util.tree_map_with_path(one, decay_mask(trainable), trainable)
