"""Encoder-decoders that turn one text into another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.cli import meshes
from jpeft.cli.config import JobConfig
from jpeft.cli.datakinds import NamesData, TargetsData
from jpeft.cli.tasks.answers import Question
from jpeft.cli.tasks.base import SPLITS, Adapted, Loaded, Tested
from jpeft.cli.tasks.characters import fresh, tokenizer_of
from jpeft.cli.tasks.language import Language
from jpeft.cli.tasks.tables import pairs
from jpeft.data import cldr
from jpeft.data.seq2seq import PairBatches, Pairs, encode_pairs
from jpeft.data.split import Split, split
from jpeft.data.table import read_table
from jpeft.interop import sources
from jpeft.interop.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Part:
    """One split of the rows.

    Attributes:
        pairs: encoded rows.
        targets: what they should become, as text.
        known: the same of the training rows.
        notes: what was left out of all splits.
    """

    pairs: Pairs
    targets: tuple[str, ...]
    known: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pairs)


class Seq2Seq(Language):
    """A text for a text."""

    sides: ClassVar[int] = 2

    def load(self, job: JobConfig) -> tuple[Any, Any, Tokenizer]:
        m = job.model
        if isinstance(m.source, str):
            return super().load(job)
        read, written, _, _ = _rows(job)
        tokenizer = tokenizer_of([*read, *written, m.characters or ""])
        model, params = fresh(m.source, tokenizer, m.task, seed=job.seed, dtype=m.dtype, compute_dtype=m.compute_dtype,
                              remat=m.remat, dropout=m.dropout, mesh=meshes.made(job.mesh),
                              shardings=None if job.mesh is None else job.mesh.specs)
        return model, params, tokenizer

    def example(self, loaded: Loaded) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shape = (loaded.config.train.batch_size, loaded.config.data.max_length)
        ids, weights = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
        return (ids,), {"attention_mask": ids, "labels": ids, "label_weights": weights}

    def load_data(self, job: JobConfig, tokenizer: Tokenizer) -> dict[str, Part]:
        read, written, parts, notes = _rows(job)
        made = encode_pairs(tokenizer, read, written, max_length=job.data.max_length)
        known = tuple(written[i] for i in parts.train)
        return {name: Part(made.take(part), tuple(written[i] for i in part), known, tuple(notes))
                for name, part in zip(SPLITS, parts, strict=True)}

    def batches(self, job: JobConfig, rows: Part, shuffle: bool) -> PairBatches:
        return PairBatches(rows.pairs, job.train.batch_size, job.data.widths, seed=job.seed, shuffle=shuffle)

    def told(self, job: JobConfig, data: Mapping[str, Part], made: Any) -> list[str]:
        counts = ", ".join(f"{len(part):,} {name}" for name, part in data.items())
        cut = sum(part.pairs.truncated for part in data.values())
        return [f"pairs: {counts}; {len(made):,} batches of {made.batch_size} an epoch, {made.waste():.1%} of their "
                "tokens padding", *data["train"].notes,
                f"truncated: {cut:,} pairs are longer than data.max_length = {job.data.max_length} tokens on a side"]

    def test(self, adapted: Adapted, rows: Part, compare: bool) -> Tested:
        job = adapted.loaded.config
        compare = compare and isinstance(job.model.source, str)
        tested = Tested(*self.measured(adapted, self.batches(job, rows, False), compare))
        if job.test.generate is None:
            return tested
        count = min(job.test.generate.rows, len(rows))
        questions = [Question(rows.pairs.sources[i].tolist(), rows.targets[i]) for i in range(count)]
        return self.answered(adapted, questions, rows.known, tested, compare)

    def prompts(self, loaded: Loaded, texts: Sequence[str]) -> list[list[int]]:
        return [list(one.ids) for one in loaded.tokenizer.encode(list(texts))]


def _rows(job: JobConfig) -> tuple[list[str], list[str], Split, list[str]]:
    """Return what is read, what should be written, which rows are for what, and notes."""
    d: NamesData | TargetsData = job.data
    notes: list[str] = []
    where = sources.resolve(d.source, d.sha256)
    if isinstance(d, NamesData):
        found = cldr.pairs(where, [d.read] if isinstance(d.read, str) else d.read, d.write, d.kinds)
        return found.read, found.written, cldr.split(found.keys, d.test, d.validation, d.seed), notes
    read, written = pairs(d, read_table(where, where=d.where or None), notes)
    return read, written, split(len(read), test=d.test, validation=d.validation, seed=d.seed), notes
