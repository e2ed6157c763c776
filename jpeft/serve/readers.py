"""How a model reads a prompt and then one token after another: where causal models and encoder-decoders differ.

Virtual tokens enter the cache once, with the prompt; the steps after it are told that they continue.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.method import Call
from jpeft.core.tokens import Tokens
from jpeft.core.transform import adapt
from jpeft.errors import ModelInputError

Apply = Callable[..., Any]
Rows = Sequence[Sequence[int]]
_SMALLEST = 16


class Prompt(NamedTuple):
    """A batch of prompts as arrays.

    Attributes:
        ids: what fills the cache `[B, width]`; None: nothing does.
        mask: which of them are no padding `[B, width]`.
        back: columns of padding at the end, which the cache forgets again.
        capacity: tokens that the cache must hold.
        first: what the first step reads `[B, 1]`.
        positions: of `first` `[B]`.
    """

    ids: np.ndarray | None
    mask: np.ndarray | None
    back: int
    capacity: int
    first: np.ndarray
    positions: np.ndarray


class Reader(abc.ABC):
    """Reads with one model.

    Args:
        model: a model of the zoo.
        apply: `model.apply`, or what `jpeft.adapt` made of it.
        dtype: of keys and values; None: that of the model.

    Attributes:
        invocations: whether a method may act from a token of the prompt on.
        virtual: tokens that the adapted function puts before the text.
        tasks: number of tasks that its methods have learnt; 0: they know of none.
    """

    names: Tokens
    invocations = True

    def __init__(self, model: Any, apply: Apply, dtype: Any):
        self.model, self.dtype = model, dtype
        self._first = self._next = apply
        self.plan = getattr(apply, "plan", None)
        self.virtual = 0 if self.plan is None else int(self.plan.virtual_tokens)
        entries = () if self.plan is None else self.plan.entries
        self.tasks = max((e.method.tasks for e in entries), default=0)
        self._invoked = any("lengths" in e.method.call for e in entries)
        placed = [(part, e.path) for e in entries for _, part in e.method.parts
                  if part.positions and not (self.invocations and part.goes_on)]
        if placed:
            raise ModelInputError(f"{type(placed[0][0]).__name__} on {placed[0][1]!r} acts by position, which a "
                                  "padded prompt shifts; generate with a method that acts on every token "
                                  "(prefix_positions=None), or call the adapted function on whole rows")
        if self.plan is not None and (self.virtual or any(e.method.positions for e in entries)):
            names = dataclasses.replace(self.names, fill=self.plan.tokens.fill)
            self._first = adapt(vars(apply)["apply"], dataclasses.replace(self.plan, tokens=names))
            self._next = functools.partial(apply, peft=Call(continued=True))

    def told(self, rows: Rows, prompt: Prompt, task: Any, lengths: Any) -> dict[str, Any]:
        """Return what the adapted function is told of the prompts, as keyword arguments.

        Raises:
            ModelInputError: what is given is read by no method, or is none for these prompts.
        """
        if task is None and self.tasks > 1:
            raise ModelInputError(f"the adapted function has learnt {self.tasks} tasks and is not told which; pass "
                                  "task=..., one number or one for each prompt")
        if (task is not None and not self.tasks) or (lengths is not None and not self._invoked):
            raise ModelInputError(f"{'lengths' if task is None or self.tasks else 'task'} is given, and no method of "
                                  "the function reads it; drop it")
        if task is not None:
            task = np.asarray(task)
            if task.dtype.kind not in "iu" or task.shape not in ((), (len(rows),)) or not (
                    (task >= 0) & (task < self.tasks)).all():
                raise ModelInputError(f"task is {task.tolist()!r}, must be a number from 0 to {self.tasks - 1}, or one "
                                      f"for each of {len(rows)} prompts")
            task = task.astype(np.int32)
        if lengths is not None:
            lengths = self._padded(rows, prompt, np.asarray(lengths))
        return {} if task is None and lengths is None else {"peft": Call(task=task, lengths=lengths)}

    def _padded(self, rows: Rows, prompt: Prompt, lengths: np.ndarray) -> np.ndarray:
        """Return how many tokens come before each invocation, padding included."""
        if lengths.dtype.kind not in "iu" or lengths.shape != (len(rows),):
            raise ModelInputError(f"lengths is {lengths.tolist()!r}, must be one whole number for each of {len(rows)} "
                                  "prompts")
        for i, (row, before) in enumerate(zip(rows, lengths.tolist(), strict=True)):
            if not 0 <= before < len(row):
                raise ModelInputError(f"prompt {i} has {len(row)} tokens and lengths says that {before} come before "
                                      "the invocation, of which at least one must be in the prompt; end the prompt "
                                      "with it")
        first = 0 if prompt.mask is None else prompt.mask.argmax(axis=1)
        return (lengths + first).astype(np.int32)

    def check(self, number: int, row: Sequence[int], new: int) -> None:
        """Raise `ModelInputError` if a prompt and `new` tokens are too many."""
        limit = getattr(self.model.config, "positions", None)
        behind = f" behind {self.virtual} virtual tokens" if self.virtual else ""
        if limit is not None and self.virtual + len(row) + new - 1 > limit:
            raise ModelInputError(f"prompt {number} has {len(row)} tokens{behind}, with max_new_tokens={new} more than "
                                  f"the {limit} positions of the model; shorten one of them")

    def filled(self, cache: Any, prompt: Prompt) -> None:
        """Raise `ModelInputError` if the cache holds other tokens than the prompts."""
        assert prompt.ids is not None
        found, width = self.held(cache) + prompt.back, prompt.ids.shape[1]
        if found != self.virtual + width:
            raise ModelInputError(f"apply put {found} tokens for {width} into the cache: it has virtual tokens, which "
                                  "would be added again at every step; pass the function that jpeft.adapt returned "
                                  "itself")

    @abc.abstractmethod
    def held(self, cache: Any) -> int:
        """Return how many tokens of the prompts a cache holds."""

    @abc.abstractmethod
    def prompt(self, rows: Rows, new: int, pad: int) -> Prompt:
        """Lay out prompts that `new` tokens shall follow."""

    @abc.abstractmethod
    def read(self, rows: Rows) -> Rows:
        """Return the tokens that count as written already, for the repetition penalty."""

    @abc.abstractmethod
    def empty(self, batch: int, capacity: int) -> Any:
        """Return a cache that `step` takes where there was nothing to fill it with."""

    @abc.abstractmethod
    def fill(self, weights: tuple[Any, ...], ids: jax.Array, mask: jax.Array, back: Any, told: dict[str, Any],
             capacity: int) -> Any:
        """Return a cache that holds the prompts. Traced."""

    @abc.abstractmethod
    def step(self, weights: tuple[Any, ...], token: jax.Array, position: jax.Array, cache: Any) -> Any:
        """Read a token `[B, 1]` and return an `Output`. Traced."""


class Causal(Reader):
    """A decoder: the prompt but its last token fills the cache, padded on the left.

    Behind virtual tokens, rows of one length are padded on the right and the padding is forgotten, so that nothing
    stands between the virtual tokens and the text, and windows reach as far as they do without padding.
    """

    names = Tokens(ids=0, mask="attention_mask", positions="positions", strip=())

    def held(self, cache: Any) -> int:
        return int(cache.length)

    def prompt(self, rows: Rows, new: int, pad: int) -> Prompt:
        longest, shortest = (pick(len(row) for row in rows) - 1 for pick in (max, min))
        width = bucket(max(longest, 1)) if longest or self.virtual else 0
        capacity = bucket(self.virtual + width + new)
        first = np.array([[row[-1]] for row in rows], np.int32)
        positions = np.array([self.virtual + len(row) - 1 for row in rows], np.int32)
        if not width:
            return Prompt(None, None, 0, capacity, first, positions)
        right = bool(self.virtual) and longest == shortest
        window = self.model.config.window
        if self.virtual and not right and window is not None and self.virtual + width + new > window:
            raise ModelInputError(f"prompts of {shortest + 1} to {longest + 1} tokens: padding would push "
                                  f"{self.virtual} virtual tokens out of the model's window of {window}; give prompts "
                                  "of one length, or one at a time")
        ids, mask = padded([row[:-1] for row in rows], width, pad, right)
        return Prompt(ids, mask, width - longest if right else 0, capacity, first, positions)

    def read(self, rows: Rows) -> Rows:
        return rows

    def empty(self, batch: int, capacity: int) -> Any:
        options = {"whole": True} if self.virtual else {}
        return self.model.empty_cache(batch, capacity, self.dtype, **options)

    def fill(self, weights: tuple[Any, ...], ids: jax.Array, mask: jax.Array, back: Any, told: dict[str, Any],
             capacity: int) -> Any:
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0).astype(jnp.int32)
        cache = self._first(*weights, ids, attention_mask=mask, positions=positions,
                            cache=self.empty(len(ids), capacity), **told).cache
        return cache._replace(length=cache.length - back)

    def step(self, weights: tuple[Any, ...], token: jax.Array, position: jax.Array, cache: Any) -> Any:
        return self._next(*weights, token, attention_mask=jnp.ones_like(token), positions=position, cache=cache)


class EncoderDecoder(Reader):
    """An encoder and a decoder: the prompt is encoded once, padded on the right; the decoder begins with its start."""

    names = Tokens(ids=0, mask="attention_mask", strip=())
    invocations = False

    def __init__(self, model: Any, apply: Apply, dtype: Any):
        super().__init__(model, apply, dtype)
        if self.virtual and self.plan is not None and self.plan.tokens.ids not in (0, "tokens"):
            raise ModelInputError(f"virtual tokens before the argument {self.plan.tokens.ids!r} of an encoder-decoder "
                                  "cannot be continued; put them before the encoded text: jpeft.Tokens(ids=0)")

    def held(self, cache: Any) -> int:
        return int(cache.key.shape[2])

    def prompt(self, rows: Rows, new: int, pad: int) -> Prompt:
        ids, mask = padded(rows, bucket(max(map(len, rows))), pad, True)
        start = np.full((len(rows), 1), self.model.config.start_id, np.int32)
        return Prompt(ids, mask, 0, bucket(new), start, np.zeros(len(rows), np.int32))

    def read(self, rows: Rows) -> Rows:
        return [[self.model.config.start_id] for _ in rows]

    def empty(self, batch: int, capacity: int) -> Any:
        return self.model.empty_cache(batch, capacity, self.dtype)

    def fill(self, weights: tuple[Any, ...], ids: jax.Array, mask: jax.Array, back: Any, told: dict[str, Any],
             capacity: int) -> Any:
        nothing = jnp.zeros((len(ids), 0), jnp.int32)
        return self._first(*weights, ids, attention_mask=mask, decoder_tokens=nothing,
                           cache=self.empty(len(ids), capacity), **told).cache

    def step(self, weights: tuple[Any, ...], token: jax.Array, position: jax.Array, cache: Any) -> Any:
        return self._next(*weights, None, decoder_tokens=token, cache=cache)


READERS: dict[str, type[Reader]] = {"causal-lm": Causal, "seq2seq": EncoderDecoder}


def reader(model: Any, apply: Apply, dtype: Any) -> Reader:
    """Return what reads with a model, by its task.

    Raises:
        ModelInputError: the model does not write, or its virtual tokens cannot be continued.
    """
    task = getattr(model.config, "task", None)
    if task not in READERS:
        raise ModelInputError(f"a model with the task {task!r} writes no text; load it with task='causal-lm' or "
                              "'seq2seq'")
    return READERS[task](model, apply, dtype)


def padded(rows: Rows, width: int, pad: int, right: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask int32 `[B, width]` of rows, padded on one side.

    Example:
        >>> [one.tolist() for one in padded([[5, 6], [7]], 3, 0, False)]
        [[[0, 5, 6], [0, 0, 7]], [[0, 1, 1], [0, 0, 1]]]
    """
    ids, mask = np.full((len(rows), width), pad, np.int32), np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if right else slice(width - len(row), width)
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def bucket(length: int) -> int:
    """Return the smallest bucket that holds `length`: 16, 24, 32, 48, 64, 96, ...: at most half of one is waste.

    Example:
        >>> [bucket(n) for n in (1, 17, 25, 33, 100)]
        [16, 24, 32, 48, 128]
    """
    size = _SMALLEST
    while size < length:
        size += size // 2 if size & (size - 1) == 0 else size // 3
    return size
