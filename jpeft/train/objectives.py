"""What losses are made of besides cross-entropy: functions of arrays, which know no model, for any loss function.

Each returns one loss per row. `jpeft.train.losses` has the loss functions that are made of them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jpeft.errors import TrainConfigError

Variant = Literal["sigmoid", "ipo", "hinge"]
VARIANTS = ("sigmoid", "ipo", "hinge")


class Ranked(NamedTuple):
    """Rows whose right candidate competes with others: the loss of each `[B]`, and whether the right one came first."""

    losses: jax.Array
    right: jax.Array


class Preferred(NamedTuple):
    """Pairs of a chosen and a rejected answer: the loss of each `[B]`, and the margin between their rewards `[B]`."""

    losses: jax.Array
    margins: jax.Array


def contrastive(anchors: jax.Array, positives: jax.Array, negatives: jax.Array | None = None, *,
                weights: jax.Array | None = None, temperature: float = 0.05) -> Ranked:
    """Return how well each anchor finds its own positive among those of all rows (InfoNCE with in-batch negatives).

        loss_i = -log( exp(cos(a_i, p_i) / t) / sum_j (exp(cos(a_i, p_j) / t) + exp(cos(a_i, n_j) / t)) )

    The sum is over all rows that count, and n_j are the hard negatives of all rows. Source: arXiv 1807.03748 (the
    loss), arXiv 1705.00652 (the other rows as negatives).

    Args:
        anchors: `[B, D]`.
        positives: `[B, D]`: row i belongs to anchor i.
        negatives: `[B, D]`, or `[B, K, D]` for several each: similar to the anchors, and wrong.
        weights: `[B]`; rows of weight 0 compete with none; None: all count.
        temperature: t above.

    Raises:
        TrainConfigError: the temperature is not above 0.

    Example:
        >>> ranked = contrastive(jnp.eye(2), jnp.eye(2), temperature=1.0)
        >>> round(float(ranked.losses[0]), 4), ranked.right.tolist()
        (0.3133, [True, True])
    """
    if not temperature > 0:
        raise TrainConfigError(f"temperature = {temperature} must be above 0; 0.05 is usual")
    real = jnp.ones(anchors.shape[:1], bool) if weights is None else weights > 0
    candidates, counts = [unit(positives)], [real]
    if negatives is not None:
        wrong = negatives.reshape(real.shape[0], -1, negatives.shape[-1])
        candidates.append(unit(wrong).reshape(-1, wrong.shape[-1]))
        counts.append(jnp.repeat(real, wrong.shape[1]))
    scores = unit(anchors) @ jnp.concatenate(candidates).T / temperature
    scores = jnp.where(jnp.concatenate(counts), scores, -jnp.inf)
    own = jnp.where(real, jnp.diagonal(scores), 0.0)
    scores = jnp.where(real[:, None], scores, 0.0)
    return Ranked(jax.nn.logsumexp(scores, -1) - own, real & (jnp.argmax(scores, -1) == jnp.arange(len(real))))


def preference(chosen: jax.Array, rejected: jax.Array, reference_chosen: jax.Array, reference_rejected: jax.Array, *,
               beta: float = 0.1, label_smoothing: float = 0.0, variant: Variant = "sigmoid") -> Preferred:
    """Return how far a model prefers the chosen answers more than its reference does (DPO).

        m = (log p(chosen) - log p(rejected)) - (log q(chosen) - log q(rejected)),    margin = beta m

        sigmoid:  loss = -(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m)
        ipo:      loss = (m - 1 / (2 beta))^2
        hinge:    loss = max(0, 1 - beta m)

    p is the model and q the reference, e the label smoothing. Source: arXiv 2305.18290 (sigmoid), arXiv 2310.12036
    (ipo), arXiv 2305.10425 (hinge).

    Args:
        chosen: log-probabilities of the chosen answers under the model, summed over tokens, `[B]`.
        rejected: the same of the rejected ones.
        reference_chosen: the same under the reference.
        reference_rejected: the same under the reference.
        beta: how dear it is to leave the reference.
        label_smoothing: share of the pairs whose answers are assumed to be swapped, below 0.5.
        variant: one of the three above.

    Raises:
        TrainConfigError: an argument is out of its range, or of another variant.

    Example:
        >>> made = preference(jnp.array([-1.0]), jnp.array([-3.0]), jnp.array([-2.0]), jnp.array([-2.0]), beta=0.5)
        >>> float(made.margins[0]), round(float(made.losses[0]), 4)
        (1.0, 0.3133)
    """
    if variant not in VARIANTS:
        raise TrainConfigError(f"variant = {variant!r} is none of {', '.join(VARIANTS)}")
    if not beta > 0 or not 0 <= label_smoothing < 0.5:
        raise TrainConfigError(f"beta = {beta} must be above 0, and label_smoothing = {label_smoothing} in [0, 0.5)")
    if label_smoothing and variant != "sigmoid":
        raise TrainConfigError(f"label_smoothing = {label_smoothing} is for variant = 'sigmoid', not {variant!r}; "
                               "drop it")
    more = (chosen - rejected) - (reference_chosen - reference_rejected)
    margins = beta * more.astype(jnp.float32)
    if variant == "ipo":
        return Preferred(jnp.square(margins / beta - 1 / (2 * beta)), margins)
    if variant == "hinge":
        return Preferred(jax.nn.relu(1 - margins), margins)
    right, swapped = -jax.nn.log_sigmoid(margins), -jax.nn.log_sigmoid(-margins)
    return Preferred((1 - label_smoothing) * right + label_smoothing * swapped, margins)


def distillation(student: jax.Array, teacher: jax.Array, labels: jax.Array | None = None, *, temperature: float = 2.0,
                 alpha: float = 0.5) -> jax.Array:
    """Return how far a student is from its teacher, and from the labels, `[...]`.

        loss = a T^2 KL(softmax(teacher / T) || softmax(student / T)) + (1 - a) CE(student, label)

    Source: arXiv 1503.02531.

    Args:
        student: logits `[..., C]`.
        teacher: logits `[..., C]`; no gradient flows into them.
        labels: class numbers `[...]`; where one is negative the second term is 0. None: `alpha` must be 1.
        temperature: T above: more of it tells more of the classes that the teacher finds improbable.
        alpha: a above, the share of the teacher.

    Raises:
        TrainConfigError: an argument is out of its range, or labels are missing.

    Example:
        >>> logits = jnp.array([[2.0, 0.0]])
        >>> float(distillation(logits, logits, alpha=1.0)[0])
        0.0
        >>> round(float(distillation(logits, -logits, jnp.array([0]))[0]), 4)
        0.9877
    """
    if not temperature > 0 or not 0 <= alpha <= 1:
        raise TrainConfigError(f"temperature = {temperature} must be above 0, and alpha = {alpha} in [0, 1]")
    if labels is None and alpha != 1:
        raise TrainConfigError(f"alpha = {alpha} mixes in the labels, and there are none; pass labels, or alpha=1")
    student, teacher = student.astype(jnp.float32), jax.lax.stop_gradient(teacher).astype(jnp.float32)
    aim, found = (jax.nn.log_softmax(logits / temperature) for logits in (teacher, student))
    far = temperature**2 * jnp.sum(jnp.exp(aim) * (aim - found), -1)
    if labels is None:
        return far
    return alpha * far + (1 - alpha) * -label_log_probs(student, labels)


def label_log_probs(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return `log softmax(logits)[label]`, float32 `[...]`; 0 where the label is negative.

    With the labels of the next tokens, its weighted sum over T is the log-probability of an answer.

    Args:
        logits: `[..., C]`.
        labels: class numbers `[...]`.

    Example:
        >>> [round(float(x), 4) for x in label_log_probs(jnp.zeros((2, 4)), jnp.array([3, -1]))]
        [-1.3863, 0.0]
    """
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))
    picked = jnp.take_along_axis(logs, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    return jnp.where(labels >= 0, picked, 0.0)


def unit(x: jax.Array) -> jax.Array:
    """Return vectors `[..., D]` divided by their lengths, in float32.

    Example:
        >>> unit(jnp.array([0.0, 2.0])).tolist()
        [0.0, 1.0]
    """
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-24))
