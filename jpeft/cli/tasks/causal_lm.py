"""Language models that continue a text: conversations, prompts with completions, plain text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.cli.config import JobConfig
from jpeft.cli.datakinds import ChatData, PairsData, PreferenceData, TextData
from jpeft.cli.rules import to_methods
from jpeft.cli.sections import GenerateConfig
from jpeft.cli.tasks.answers import Question, decoded
from jpeft.cli.tasks.base import SPLITS, Adapted, Loaded, Tested
from jpeft.cli.tasks.language import Language
from jpeft.cli.tasks.tables import pairs
from jpeft.data import rows, sft
from jpeft.data.packing import Packed, Padded
from jpeft.data.sft import Sequences
from jpeft.data.split import split
from jpeft.data.table import read_table
from jpeft.interop import sources
from jpeft.interop.tokenizer import Tokenizer

START = 32  # tokens of a held-out text that a sample begins with


@dataclasses.dataclass(frozen=True)
class Part:
    """One split of the rows.

    Attributes:
        sequences: encoded rows.
        spoken: the same with weights on dialogue alone; None: it is not told apart.
        known: the answers of the training rows; none: the texts are plain.
        notes: what was left out of all splits.
    """

    sequences: Sequences
    spoken: Sequences | None = None
    known: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.sequences)


class CausalLm(Language):
    """The next token."""

    def example(self, loaded: Loaded) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shape = (loaded.config.train.batch_size, loaded.config.data.max_length)
        ids, weights = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
        packed = {"positions": ids, "segment_ids": ids} if packs(loaded.config) else {}
        return (ids,), {"attention_mask": ids, **packed, "labels": ids, "label_weights": weights}

    def load_data(self, job: JobConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        if isinstance(job.data, TextData):
            return _texts(job.data, tokenizer)
        d: ChatData | PairsData = job.data
        table = read_table(sources.resolve(d.source, d.sha256), where=d.where or None)
        notes: list[str] = []
        limits: dict[str, Any] = {"max_length": d.max_length, "default_system": d.default_system, "keep": d.keep,
                                  "on_long": d.on_long}
        if isinstance(d, ChatData):
            made = sft.chats(tokenizer, rows.conversations(table, d.messages), learn=d.learn, **limits)
        else:
            prompts, completions = pairs(d, table, notes)
            made = sft.pairs(tokenizer, prompts, completions, chat=d.chat, **limits)
        if made.dropped:
            notes.append(f"dropped: nothing of the answer of {made.dropped:,} rows fits into data.max_length = "
                         f"{d.max_length} tokens")
        parts = split(len(made), test=d.test, validation=d.validation, seed=d.seed)
        learnt = made.take(parts.train)
        known = tuple(decoded(tokenizer, (learnt.ids[i][slice(*_last(learnt.weights[i]))] for i in range(len(learnt)))))
        return {name: Part(made.take(part), known=known, notes=tuple(notes))
                for name, part in zip(SPLITS, parts, strict=True)}

    def batches(self, job: JobConfig, rows: Any, shuffle: bool) -> Any:
        return self._batches(job, rows.sequences, shuffle)

    def _batches(self, job: JobConfig, sequences: Sequences, shuffle: bool = False) -> Packed | Padded:
        size, length = job.train.batch_size, job.data.max_length
        if packs(job):
            return Packed(sequences, size, length, seed=job.seed, shuffle=shuffle)
        return Padded(sequences, size, (length,), seed=job.seed, shuffle=shuffle)

    def told(self, job: JobConfig, data: Mapping[str, Any], made: Any) -> list[str]:
        counts = ", ".join(f"{len(part):,} {name}" for name, part in data.items())
        learnt = data["train"].sequences.learnt
        total = int(data["train"].sequences.lengths.sum())
        how = "packed" if packs(job) else "one sequence a row, as virtual tokens stand before each"
        cut = sum(part.sequences.truncated for part in data.values())
        lines = [f"sequences: {counts}; {learnt:,} of {total:,} training tokens are learnt",
                 f"batches: {len(made):,} an epoch of {made.batch_size} x {job.data.max_length} tokens, {how}; "
                 f"{made.waste():.1%} of them padding", *data["train"].notes]
        if not isinstance(job.data, TextData):
            side = "end" if job.data.keep == "start" else "start"
            lines.append(f"truncated: {cut:,} sequences are longer than data.max_length = {job.data.max_length} tokens"
                         + (f" and lost their {side}" if cut else ""))
        return lines

    def test(self, adapted: Adapted, rows: Any, compare: bool) -> Tested:
        loaded = adapted.loaded
        job = loaded.config
        sets = {"": rows.sequences, **({} if rows.spoken is None else {"dialogue_": rows.spoken})}
        after, before = {}, {}
        for prefix, sequences in sets.items():
            found, old = self.measured(adapted, self._batches(job, sequences), compare)
            after.update({prefix + name: value for name, value in found.items()})
            before.update({prefix + name: value for name, value in old.items()})
        if job.test.generate is None:
            return Tested(after, before)
        questions = _questions(loaded.tokenizer, rows.sequences, job.test.generate, isinstance(job.data, TextData))
        return self.answered(adapted, questions, rows.known, Tested(after, before), compare)

    def prompts(self, loaded: Loaded, texts: Sequence[str]) -> list[list[int]]:
        data, tokenizer = loaded.config.data, loaded.tokenizer
        if isinstance(data, ChatData) or (isinstance(data, PairsData | PreferenceData) and data.chat):
            written = [tokenizer.chat([{"role": "user", "content": text}], True, default_system=data.default_system)
                       for text in texts]
            return [list(one.ids) for one in tokenizer.encode(written, special=False)]
        lead = sft.opening(tokenizer).tolist()
        return [[*lead, *one.ids] for one in tokenizer.encode(list(texts), special=False)]


def packs(job: JobConfig) -> bool:
    """Return whether sequences share rows: not where virtual tokens stand before each."""
    return not any(method.virtual_tokens for method in to_methods(job.rules).values())


def _texts(d: TextData, tokenizer: Tokenizer) -> dict[str, Part]:
    everything = rows.read_texts(sources.resolve(d.source, d.sha256))
    others, test = rows.hold_out(everything, d.test)
    train, validation = rows.hold_out(others, d.validation)

    def part(texts: Sequence[rows.Text], windows: int | None, spoken: bool) -> Part:
        plain = [one.text for one in texts]
        made = sft.texts(tokenizer, plain, length=d.max_length)
        count = len(made) if windows is None else min(windows, len(made))
        some = np.linspace(0, len(made), count, endpoint=False).astype(np.int64)
        if not (spoken and d.dialogue):
            return Part(made.take(some))
        places = [rows.spans(text, d.dialogue) for text in plain]
        return Part(made.take(some), sft.texts(tokenizer, plain, length=d.max_length, learn=places).take(some))

    return {"train": part(train, None, False), "validation": part(validation, d.validation_windows, False),
            "test": part(test, d.test_windows, True)}


def _questions(tokenizer: Tokenizer, sequences: Sequences, config: GenerateConfig, text: bool) -> list[Question]:
    """Return prompts and right answers: the last turn of a row, or how a window of a text goes on."""
    count = min(config.rows, len(sequences))
    if text:
        ids = [sequences.ids[int(i)] for i in np.linspace(0, len(sequences), count, endpoint=False)]
        starts = [row[:max(1, min(START, len(row) // 2))] for row in ids]
        ends = decoded(tokenizer, (row[len(start):len(start) + config.max_new_tokens]
                                   for row, start in zip(ids, starts, strict=True)))
        return [Question(start.tolist(), end) for start, end in zip(starts, ends, strict=True)]
    borders = [_last(sequences.weights[i]) for i in range(count)]
    ends = decoded(tokenizer, (sequences.ids[i][a:b] for i, (a, b) in enumerate(borders)))
    return [Question(sequences.ids[i][:a].tolist(), end) for i, ((a, _), end) in
            enumerate(zip(borders, ends, strict=True))]


def _last(weights: np.ndarray) -> tuple[int, int]:
    """Return where the last stretch of learnt tokens begins and ends.

    Example:
        >>> _last(np.array([0, 1, 0, 0, 1, 1, 0]))
        (4, 6)
    """
    learnt = np.flatnonzero(weights > 0)
    gaps = np.flatnonzero(np.diff(learnt) > 1)
    return int(learnt[gaps[-1] + 1] if len(gaps) else learnt[0]), int(learnt[-1]) + 1
