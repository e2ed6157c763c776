"""Texts from a language model of the zoo: batched, streamed, one compiled step for every token.

Prompts fill the cache, in a program compiled once per bucket of lengths. One step, compiled once per bucket of
capacities, reads a token and chooses the next; how a model does the two is in `readers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import hosts
from jpeft.errors import ModelInputError
from jpeft.serve.readers import Prompt, reader
from jpeft.serve.sampling import Sampling, Values, next_token
from jpeft.serve.text import Growing

Apply = Callable[..., Any]
OnText = Callable[[int, str], None]


class Writer(Protocol):
    """What generation asks of a tokenizer; `jpeft.interop.tokenizer.Tokenizer` is one."""

    @property
    def pad_id(self) -> int: ...

    @property
    def special(self) -> Mapping[str, int]: ...

    def encode(self, texts: Sequence[str], *, special: bool) -> list[Any]: ...

    def decode(self, tokens: Any) -> list[str]: ...

    def chat(self, messages: Sequence[Any], add_generation_prompt: bool, *, default_system: bool) -> str: ...


class Generation(NamedTuple):
    """One answer.

    Attributes:
        text: without special tokens and stop string; "" where there is no tokenizer.
        tokens: ids that the model wrote, an end token included.
        reason: why it ended: "eos", "stop" (a stop string came) or "length".
        prompt_tokens: number of tokens of the prompt.
    """

    text: str
    tokens: list[int]
    reason: str
    prompt_tokens: int


class Generator:
    """Generates from a model, plain, merged or adapted. Keep one: it holds the compiled programs.

    Args:
        model: a model of the zoo with the task "causal-lm" or "seq2seq": `jpeft.models.decoder.Decoder`, or
            `jpeft.models.t5.T5`, which encodes the prompts and writes answers.
        tokenizer: for prompts and answers in text; None: ids in, ids out.
        apply: None: `model.apply`. `jpeft.adapt(model.apply, plan)` for an adapted model, virtual tokens included;
            then weights are `(trainable, frozen)`.
        cache_dtype: of keys and values; None: that of the model.

    Raises:
        ModelInputError: the model writes no text.

    Attributes:
        traces: how often the programs "prefill" and "decode" were traced.

    Example:
        >>> from jpeft.models.decoder import Decoder, DecoderConfig
        >>> model = Decoder(DecoderConfig(vocab_size=9, hidden_size=8, layers=1, heads=2, kv_heads=1, head_size=4,
        ...                               mlp_size=8, positions=64))
        >>> generator = Generator(model)
        >>> answers = generator(model.init(jax.random.key(0)), [[1, 2, 3], [4]], max_new_tokens=5)
        >>> [len(one.tokens) for one in answers], generator.traces
        ([5, 5], {'prefill': 1, 'decode': 1})
    """

    def __init__(self, model: Any, tokenizer: Writer | None = None, *, apply: Apply | None = None,
                 cache_dtype: Any = None):
        self.model, self.tokenizer = model, tokenizer
        self.traces = {"prefill": 0, "decode": 0}
        self._reader = reader(model, model.apply if apply is None else apply, cache_dtype)
        self._prefill = jax.jit(self._fill, static_argnames=("capacity",))
        self._decode = jax.jit(self._step, donate_argnames=("cache", "seen"))

    def __call__(self, weights: Any, prompts: Sequence[str] | Sequence[Sequence[int]], *, max_new_tokens: int = 128,
                 sampling: Sampling | None = None, eos: Sequence[int] | None = None, stop: Sequence[str] = (),
                 seed: int = 0, on_text: OnText | None = None, special: bool = True) -> list[Generation]:
        """Continue prompts.

        Args:
            weights: params; or a tuple of what `apply` takes before the tokens: `(trainable, frozen)`.
            prompts: texts or lists of ids, one batch.
            max_new_tokens: an answer ends after this many tokens at the latest.
            sampling: how tokens are chosen; None: greedily.
            eos: ids that end an answer; None: the tokenizer's end of text and end of turn.
            stop: strings that end an answer.
            seed: of the draws. The same seed, batch and weights give the same answers.
            on_text: called with the number of a prompt and the next part of its answer, as soon as that is certain.
            special: whether the tokenizer adds its special tokens to text prompts; not for a rendered chat.

        Raises:
            ModelInputError: a prompt is empty or too long, an argument does not fit, or the logits are NaN.
        """
        rows = self._ids(prompts, special)
        self._check(rows, max_new_tokens, stop, on_text)
        ends = self._ends() if eos is None else frozenset(eos)
        values: Values = dict((sampling or Sampling()).values())
        leading = weights if type(weights) is tuple else (weights,)
        run = _Run(rows, ends, self._growing(len(rows), stop), on_text or (lambda row, part: None))
        prompt = self._reader.prompt(rows, max_new_tokens, self._pad())
        cache, seen = self._start(leading, rows, prompt), self._seen(rows, values)
        token, key = prompt.first, jax.random.key(seed)
        for number in range(max_new_tokens):
            chosen, cache, seen = self._decode(leading, token, (prompt.positions + number)[:, None], cache=cache,
                                               seen=seen, values=values, key=jax.random.fold_in(key, number))
            if run.take(hosts.whole(chosen)):
                break
            token = run.fed(self._pad())
        return run.answers()

    def chat(self, weights: Any, messages: Sequence[Any], *, default_system: bool = True, **options: Any) -> Generation:
        """Answer a conversation, `[{"role": ..., "content": ...}, ...]`, written as the tokenizer's template says.

        Args:
            weights: as in a call.
            messages: the conversation so far, the user's turn last.
            default_system: keep the system prompt that the template writes of its own.
            options: those of a call.

        Raises:
            ModelInputError: there is no tokenizer or no chat template, and as in a call.
        """
        if self.tokenizer is None:
            raise ModelInputError("a chat needs a tokenizer; pass one to Generator")
        text = self.tokenizer.chat(messages, True, default_system=default_system)
        return self(weights, [text], special=False, **options)[0]

    def _fill(self, weights: tuple[Any, ...], tokens: jax.Array, mask: jax.Array, back: Any, *, capacity: int) -> Any:
        self.traces["prefill"] += 1
        return self._reader.fill(weights, tokens, mask, back, capacity)

    def _step(self, weights: tuple[Any, ...], token: jax.Array, position: jax.Array, *, cache: Any,
              seen: jax.Array | None, values: Values, key: jax.Array) -> tuple[jax.Array, Any, jax.Array | None]:
        self.traces["decode"] += 1
        out = self._reader.step(weights, token, position, cache)
        chosen = next_token(out.logits[:, -1], values, key, seen)
        if seen is not None:
            seen = seen.at[jnp.arange(len(chosen)), chosen].set(True)
        return chosen, out.cache, seen

    def _start(self, weights: tuple[Any, ...], rows: list[list[int]], prompt: Prompt) -> Any:
        """Return a cache that holds the prompts."""
        if prompt.ids is None:
            return self._reader.empty(len(rows), prompt.capacity)
        cache = self._prefill(weights, prompt.ids, prompt.mask, prompt.back, capacity=prompt.capacity)
        self._reader.filled(cache, prompt)
        return cache

    def _seen(self, rows: list[list[int]], values: Values) -> jax.Array | None:
        """Mark which tokens a repetition penalty acts on from the start."""
        if "repetition_penalty" not in values:
            return None
        marks = np.zeros((len(rows), self.model.config.vocab_size), bool)
        for mark, row in zip(marks, self._reader.read(rows), strict=True):
            mark[list(row)] = True
        return jnp.asarray(marks)

    def _ids(self, prompts: Sequence[str] | Sequence[Sequence[int]], special: bool) -> list[list[int]]:
        if isinstance(prompts, str) or not len(prompts):
            raise ModelInputError(f"prompts must be a list of at least one text or list of ids, found {prompts!r:.60}")
        texts = [one for one in prompts if isinstance(one, str)]
        if not texts:
            return [[int(token) for token in row] for row in prompts]
        if self.tokenizer is None or len(texts) != len(prompts):
            raise ModelInputError("prompts in text need a tokenizer; pass one to Generator" if self.tokenizer is None
                                  else "prompts are texts and ids; give one kind")
        return [[int(i) for i in row.ids] for row in self.tokenizer.encode(texts, special=special)]

    def _check(self, rows: list[list[int]], new: int, stop: Sequence[str], on_text: OnText | None) -> None:
        c = self.model.config
        if new < 1:
            raise ModelInputError(f"max_new_tokens is {new}, must be positive")
        if isinstance(stop, str) or not all(isinstance(one, str) and one for one in stop):
            raise ModelInputError(f"stop is {stop!r}, must be a list of strings that are not empty")
        if self.tokenizer is None and (stop or on_text):
            raise ModelInputError("stop strings and on_text need a tokenizer; pass one to Generator")
        for i, row in enumerate(rows):
            if not row:
                raise ModelInputError(f"prompt {i} has no tokens; give it at least a begin token")
            if not 0 <= min(row) <= max(row) < c.vocab_size:
                raise ModelInputError(f"prompt {i} has the id {min(row) if min(row) < 0 else max(row)}, the model "
                                      f"knows 0 to {c.vocab_size - 1}; is the tokenizer another model's?")
            self._reader.check(i, row, new)

    def _ends(self) -> frozenset[int]:
        special = {} if self.tokenizer is None else self.tokenizer.special
        return frozenset(special[role] for role in ("eos_token", "eot_token", "eom_token") if role in special)

    def _pad(self) -> int:
        return 0 if self.tokenizer is None else self.tokenizer.pad_id

    def _growing(self, count: int, stop: Sequence[str]) -> list[Growing] | None:
        written = self.tokenizer
        if written is None:
            return None
        return [Growing(lambda ids: written.decode([ids])[0], stop) for _ in range(count)]


class _Run:
    """The answers of one call while they grow."""

    def __init__(self, rows: list[list[int]], ends: frozenset[int], texts: list[Growing] | None, on_text: OnText):
        self._prompts, self._ends, self._texts, self._on_text = [len(row) for row in rows], ends, texts, on_text
        self._tokens: list[list[int]] = [[] for _ in rows]
        self._reasons: list[str | None] = [None] * len(rows)

    def take(self, chosen: np.ndarray) -> bool:
        """Note the next token of every row; return whether all rows have ended."""
        for row, token in enumerate(chosen.tolist()):
            if self._reasons[row] is not None:
                continue
            if token < 0:
                raise ModelInputError(f"the logits after token {self._prompts[row] + len(self._tokens[row])} of row "
                                      f"{row} are NaN; check the weights")
            self._tokens[row].append(token)
            if token in self._ends:
                self._reasons[row] = "eos"
                self._say(row, None)
            elif self._say(row, token):
                self._reasons[row] = "stop"
        return all(reason is not None for reason in self._reasons)

    def _say(self, row: int, token: int | None) -> bool:
        if self._texts is None:
            return False
        part = self._texts[row].finish() if token is None else self._texts[row].push(token)
        if part:
            self._on_text(row, part)
        return self._texts[row].stopped

    def fed(self, pad: int) -> np.ndarray:
        """Return what the step reads next, `[B, 1]`."""
        last = [tokens[-1] if reason is None else pad for tokens, reason in
                zip(self._tokens, self._reasons, strict=True)]
        return np.array(last, np.int32)[:, None]

    def answers(self) -> list[Generation]:
        for row, reason in enumerate(self._reasons):
            if reason is None:
                self._reasons[row] = "stop" if self._say(row, None) else "length"
        texts = [""] * len(self._tokens) if self._texts is None else [one.text for one in self._texts]
        return [Generation(text, tokens, str(reason), prompt) for text, tokens, reason, prompt in
                zip(texts, self._tokens, self._reasons, self._prompts, strict=True)]
