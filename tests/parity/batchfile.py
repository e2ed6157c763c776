"""One file with all that both sides of the yardstick must share: batches in order, padded lengths, rates, settings.

numpy alone: it is read where JAX is and where torch is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FIELDS = ("tokens", "attention_mask", "token_types")  # [B, T] each
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        inputs: int32 `[B, T]` arrays by the names of `FIELDS`.
        labels: int32 `[B]`.
        weights: float32 `[B]`: 1, or 0 for a row that only fills the batch up.
        index: int32 `[B]`: number of the example within its split, -1 for a filler row.
    """

    inputs: dict[str, np.ndarray]
    labels: np.ndarray
    weights: np.ndarray
    index: np.ndarray

    def real(self) -> Batch:
        """Return the batch without its filler rows."""
        keep = self.weights > 0
        inputs = {name: value[keep] for name, value in self.inputs.items()}
        return Batch(inputs, self.labels[keep], self.weights[keep], self.index[keep])


@dataclasses.dataclass(frozen=True)
class BatchFile:
    """The contents of a file.

    Attributes:
        settings: hyperparameters, as JSON holds them.
        rates: float64 `[steps]`: factor of the learning rate at each step.
        train: every training batch of every epoch, in order.
        validation: the batches of the validation split.
        test: the batches of the test split.
    """

    settings: dict[str, Any]
    rates: np.ndarray
    train: tuple[Batch, ...]
    validation: tuple[Batch, ...]
    test: tuple[Batch, ...]

    def identity(self) -> str:
        """Hash what decides a run: the settings, the rates, and the training batches as they come."""
        settings = {name: value for name, value in self.settings.items() if name != "model_folder"}
        whole = hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + self.rates.astype("<f8").tobytes())
        for batch in self.train:
            whole.update(str(batch.inputs["tokens"].shape).encode())
            for value in (*batch.inputs.values(), batch.labels, batch.index):
                whole.update(value.astype("<i4").tobytes())
        return whole.hexdigest()[:16]

    def examples(self, split: str) -> str:
        """Hash the examples of a split, whatever batches they lie in."""
        rows = {}
        for batch in getattr(self, split):
            for n, number in enumerate(batch.index.tolist()):
                seen = batch.inputs["attention_mask"][n] > 0
                rows[number] = b"".join([value[n][seen].astype("<i4").tobytes() for value in batch.inputs.values()]
                                        + [batch.labels[n].astype("<i4").tobytes()])
        rows.pop(-1, None)
        return hashlib.sha256(b"".join(rows[number] for number in sorted(rows))).hexdigest()[:16]


def write(path: Path, contents: BatchFile) -> None:
    """Write a file, whole or not at all."""
    arrays: dict[str, np.ndarray] = {"settings": np.array(json.dumps(contents.settings, sort_keys=True)),
                                     "rates": np.asarray(contents.rates, np.float64)}
    for split in SPLITS:
        batches: Sequence[Batch] = getattr(contents, split)
        arrays[f"{split}/shape"] = np.array([b.inputs["tokens"].shape for b in batches], np.int32).reshape(-1, 2)
        for name in batches[0].inputs if batches else ():
            arrays[f"{split}/{name}"] = _flat((b.inputs[name] for b in batches), np.int32)
        for name, kind in (("labels", np.int32), ("weights", np.float32), ("index", np.int32)):
            arrays[f"{split}/{name}"] = _flat((getattr(b, name) for b in batches), kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp.npz")
    np.savez_compressed(draft, **arrays)
    draft.replace(path)


def read(path: Path) -> BatchFile:
    """Read a file that `write` wrote."""
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return BatchFile(json.loads(str(arrays["settings"])), arrays["rates"], *(_batches(arrays, s) for s in SPLITS))


def _flat(parts: Iterable[np.ndarray], kind: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, kind), *(np.asarray(part, kind).ravel() for part in parts)])


def _batches(arrays: dict[str, np.ndarray], split: str) -> tuple[Batch, ...]:
    names = [name for name in FIELDS if f"{split}/{name}" in arrays]
    found, cell, row = [], 0, 0
    for b, t in arrays[f"{split}/shape"].tolist():
        inputs = {name: arrays[f"{split}/{name}"][cell : cell + b * t].reshape(b, t) for name in names}
        rest = (arrays[f"{split}/{name}"][row : row + b] for name in ("labels", "weights", "index"))
        found.append(Batch(inputs, *rest))
        cell, row = cell + b * t, row + b
    return tuple(found)
