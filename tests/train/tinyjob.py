"""A job of a fraction of a second: a two-layer classifier with LoRA and dropout, in plain JAX; also a program to kill.

`python tinyjob.py FOLDER TOTAL` trains in FOLDER, resumes what it finds there, and prints `at N` when it begins.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft.train import losses, metrics, optimizer
from jpeft.train import state as states
from jpeft.train.checkpoint import Checkpoints
from jpeft.train.evaluate import evaluate
from jpeft.train.loop import FitResult, fit
from jpeft.train.step import compiled_step

VOCAB, WIDTH, CLASSES, ROWS = 11, 8, 3, 40


def model(params: Any, tokens: Any, attention_mask: Any) -> jax.Array:
    x = jnp.where(attention_mask[..., None] > 0, params["table"][tokens], 0.0).sum(1)
    return jnp.tanh(x @ params["up"]) @ params["down"]


def base_params(seed: int = 0) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {"table": (VOCAB, WIDTH), "up": (WIDTH, 16), "down": (16, CLASSES)}
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


class Stream:
    """Rows in an order that depends on the epoch, forever; its position is the number of batches given."""

    def __init__(self, size: int = 8) -> None:
        rng = np.random.RandomState(0)
        self.tokens = rng.randint(0, VOCAB, (ROWS, 5)).astype(np.int32)
        self.labels = (self.tokens.sum(1) % CLASSES).astype(np.int32)
        self.size, self.given = size, 0

    def batch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        tokens = self.tokens[rows]
        return {"tokens": tokens, "attention_mask": (tokens > 0).astype(np.int32), "labels": self.labels[rows],
                "weights": np.ones(len(rows), np.float32)}

    def __next__(self) -> dict[str, np.ndarray]:
        epoch, i = divmod(self.given, ROWS // self.size)
        self.given += 1
        return self.batch(np.random.RandomState(epoch).permutation(ROWS)[i * self.size:(i + 1) * self.size])

    def __iter__(self) -> Stream:
        return self

    def get_state(self) -> dict[str, int]:
        return {"given": self.given}

    def set_state(self, position: dict[str, int]) -> None:
        self.given = position["given"]


class Parts(NamedTuple):
    """What jobs of one kind share, so that they compile once."""

    apply: Any
    step: Any
    tx: Any
    trainable: Any
    frozen: Any
    base: str


@functools.cache
def parts(total: int, rank: int, base_seed: int) -> Parts:
    params = base_params(base_seed)
    first = Stream().batch(np.arange(2))
    rules = {"up|down": jpeft.LoRA(rank=rank, alpha=4, dropout=0.3)}
    plan = jpeft.plan(model, params, (first["tokens"], first["attention_mask"]), rules)
    adapted = jpeft.adapt(model, plan)

    def apply(trainable: Any, frozen: Any, tokens: Any, attention_mask: Any, key: Any = None) -> jax.Array:
        return adapted(trainable, frozen, tokens, attention_mask, peft=jpeft.Call(key=key))

    trainable, frozen = jpeft.init(plan, params, jax.random.key(1))
    adam = optimizer.Optimizer("adamw", 3e-2, warmup=0.1, weight_decay=0.01, clip=1.0)
    tx, rate = optimizer.make(adam, total, trainable, plan)
    step = compiled_step(losses.classification(apply), tx, schedule=rate)
    return Parts(apply, step, tx, trainable, frozen, jpeft.fingerprint(params))


class Job:
    """Everything that `fit` needs, made from nothing but constants, as a new process would."""

    def __init__(self, folder: Path | None, total: int, *, rank: int = 2, base_seed: int = 0) -> None:
        self.apply, self.step, self.tx, trainable, self.frozen, base = parts(total, rank, base_seed)
        self.state = states.create(trainable, self.tx, jax.random.key(2))
        stream = Stream()
        self.batches: Any = stream
        self.test = [stream.batch(np.arange(20)), stream.batch(np.arange(20, 40))]
        self.total, self.folder = total, folder
        self.checkpoints = None if folder is None else Checkpoints(
            folder / "checkpoints", keep=2, base=base, config_hash="tiny")
        self.notes: tuple[str, ...] = ()

    def resume(self) -> int:
        """Take up the newest checkpoint, and return its step; 0 if there is none."""
        restored = self.checkpoints.restore(self.state) if self.checkpoints else None
        if restored is None:
            return 0
        self.batches.set_state(restored.data_position)
        self.state, self.notes = restored.state, restored.notes
        return restored.step

    def fit(self, **options: Any) -> FitResult:
        hooks = [] if self.folder is None else [metrics.JsonLines(self.folder / "metrics.jsonl")]
        options = {"eval_every": 6, "save_every": 4, "checkpoints": self.checkpoints, **options}
        options["hooks"] = [*hooks, *options.get("hooks", ())]
        score = functools.partial(evaluate, self.apply)
        return fit(self.step, self.state, self.frozen, self.batches, total_steps=self.total,
                   evaluate=lambda trainable: score(trainable, self.frozen, self.test), **options)


def bits(tree: Any) -> list[tuple[str, bytes]]:
    """Return dtype and bytes of every leaf."""
    def plain(leaf: Any) -> np.ndarray:
        return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

    return [(str(leaf.dtype), plain(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


if __name__ == "__main__":
    home, steps = Path(sys.argv[1]), int(sys.argv[2])
    job = Job(home, steps)
    print("at", job.resume(), *job.notes, flush=True)
    result = job.fit(save_every=3)
    print(json.dumps({"stopped": result.stopped, "best": result.best, "message": result.message}), flush=True)
