"""The next token from logits `[B, V]`: greedy, or drawn after temperature, top-k, top-p and min-p."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpeft.errors import ModelInputError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The filters act in the order of the fields, each on what the last one left.

    Attributes:
        repetition_penalty: r: the logits of tokens that are in the text already become `x / r` if positive, else `x r`
            (Keskar et al., arXiv:1909.05858).
        temperature: logits are divided by it; 0: the most probable token, and the filters below have no meaning.
        top_k: keep the k most probable tokens (ties at the edge stay).
        top_p: keep the fewest tokens whose probabilities sum to p (Holtzman et al., arXiv:1904.09751).
        min_p: keep tokens at least p times as probable as the best one (Nguyen et al., arXiv:2407.01082).

    Raises:
        ModelInputError: a value is out of its range, or filters go with temperature 0.

    Example:
        >>> Sampling(temperature=0.7, top_p=0.9).values()
        {'temperature': 0.7, 'top_p': 0.9}
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        wrong = [] if self.repetition_penalty > 0 else [f"repetition_penalty = {self.repetition_penalty}, must be > 0"]
        wrong += [] if self.temperature >= 0 else [f"temperature = {self.temperature}, must be >= 0"]
        wrong += [] if self.top_k is None or self.top_k >= 1 else [f"top_k = {self.top_k}, must be >= 1"]
        wrong += [] if self.top_p is None or 0 < self.top_p <= 1 else [f"top_p = {self.top_p}, must be in (0, 1]"]
        wrong += [] if self.min_p is None or 0 <= self.min_p <= 1 else [f"min_p = {self.min_p}, must be in [0, 1]"]
        idle = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.temperature == 0 and idle:
            wrong.append(f"{', '.join(idle)} without a temperature; temperature 0 is greedy")
        if wrong:
            raise ModelInputError(f"tokens cannot be drawn like this: {'; '.join(wrong)}")

    def values(self) -> dict[str, float | int]:
        """Return what acts, as a pytree: its keys are static, its values are not, so a new value compiles nothing."""
        idle = {"repetition_penalty": 1, "temperature": 0, "top_k": None, "top_p": 1, "min_p": 0}
        return {name: getattr(self, name) for name, off in idle.items() if getattr(self, name) not in (None, off)}


Values = dict[str, float | int | jax.Array]


def next_token(logits: jax.Array, values: Values, key: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """Choose a token for each row, int32 `[B]`; -1 where logits are NaN.

    Args:
        logits: `[B, V]`.
        values: from `Sampling.values`.
        key: a PRNG key; unused without a temperature.
        seen: bool `[B, V]`, tokens of the text so far; for the repetition penalty.

    Example:
        >>> next_token(jnp.asarray([[0.0, 2.0, 1.0]]), {}, jax.random.key(0)).tolist()
        [1]
    """
    scores = filtered(logits, values, seen)
    chosen = jax.random.categorical(key, scores) if "temperature" in values else jnp.argmax(scores, axis=-1)
    return jnp.where(jnp.isnan(logits).any(axis=-1), -1, chosen).astype(jnp.int32)


def filtered(logits: jax.Array, values: Values, seen: jax.Array | None = None) -> jax.Array:
    """Return the logits float32 `[B, V]` of the distribution that tokens are drawn from; -inf for what is left out.

    Example:
        >>> filtered(jnp.asarray([[0.0, 2.0, 1.0]]), {"temperature": 2.0, "top_k": 2}).tolist()
        [[-inf, 1.0, 0.5]]
    """
    scores = logits.astype(jnp.float32)
    if "repetition_penalty" in values and seen is not None:
        penalty = values["repetition_penalty"]
        scores = jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)
    if "temperature" in values:
        scores = scores / values["temperature"]
    if "top_k" in values:
        ranked = jnp.sort(scores, axis=-1, descending=True)
        last = jnp.minimum(values["top_k"], scores.shape[-1]) - 1
        scores = jnp.where(scores >= jnp.take(ranked, last, axis=-1)[..., None], scores, -jnp.inf)
    if "top_p" in values:
        ranked = jnp.sort(scores, axis=-1, descending=True)
        chance = jax.nn.softmax(ranked, axis=-1)
        kept = jnp.cumsum(chance, axis=-1) - chance < values["top_p"]
        edge = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
        scores = jnp.where(scores >= edge, scores, -jnp.inf)
    if "min_p" in values:
        best = jnp.max(scores, axis=-1, keepdims=True)
        scores = jnp.where(scores - best >= jnp.log(values["min_p"]), scores, -jnp.inf)
    return scores
