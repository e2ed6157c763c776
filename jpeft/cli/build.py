"""From a configuration to what runs: model, plan, data, step. The one place that every command builds with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jpeft.cli.config import JobConfig
from jpeft.cli.rules import to_methods, tokens_for
from jpeft.core import planning, store, transform
from jpeft.core.method import Call, Method
from jpeft.core.plan import Plan
from jpeft.data.batches import Batch, Batches
from jpeft.data.classify import Examples, encode
from jpeft.data.split import split
from jpeft.data.table import read_table
from jpeft.errors import CheckpointError, ConfigError, WrongBaseError
from jpeft.interop import sources
from jpeft.interop.pretrained import from_pretrained
from jpeft.interop.tokenizer import Tokenizer
from jpeft.models.encoder import Encoder
from jpeft.train.losses import classification
from jpeft.train.optimizer import Optimizer, make
from jpeft.train.state import TrainState, create
from jpeft.train.step import make_train_step

Apply = Callable[..., jax.Array]
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model as a job wants it.

    Attributes:
        config: the job.
        model: the model, with the head of the job's task.
        params: its params, the frozen base.
        tokenizer: its tokenizer.
    """

    config: JobConfig
    model: Encoder
    params: Any
    tokenizer: Tokenizer

    @functools.cached_property
    def plan(self) -> Plan:
        """The plan of the job's rules."""
        methods = to_methods(self.config.rules)
        shape = (self.config.train.batch_size, self.config.data.max_length)
        ids = jax.ShapeDtypeStruct(shape, jnp.int32)
        named = {"attention_mask": ids, **({"token_types": ids} if self.tokenizer.token_types else {})}
        return planning.plan(self.base_logits, self.params, (ids,), methods, example_kwargs=named,
                             tokens=tokens_for(methods, self.tokenizer.token_types))

    def base_logits(self, params: Any, tokens: Any, attention_mask: Any, token_types: Any = None,
                    key: Any = None) -> jax.Array:
        """Return the base model's logits `[B, C]`: the function that is adapted."""
        return self.model.apply(params, tokens, attention_mask, token_types, key=key).logits  # type: ignore[return-value]


def load_model(config: JobConfig) -> Loaded:
    """Read the model of a job; its head has the job's classes.

    Raises:
        SourceError, CheckpointError, ModelConfigError: as of `jpeft.from_pretrained`.
        ConfigError: the job's texts are longer than the model takes.
    """
    m, count = config.model, len(config.data.names)
    model, params, tokenizer = from_pretrained(
        m.source, m.task, count, m.dtype, compute_dtype=m.compute_dtype, remat=m.remat, dropout=m.dropout,
        sha256=m.sha256, seed=config.seed)
    if tokenizer is None:
        raise CheckpointError(f"{m.source} has no tokenizer.json, which texts need; add the file to the checkpoint")
    if config.data.max_length > tokenizer.max_length:
        raise ConfigError(f"data.max_length = {config.data.max_length} is more than the {tokenizer.max_length} tokens "
                          f"that the model takes; set it to {tokenizer.max_length} or less")
    return Loaded(config, model, params, tokenizer)


def logits(loaded: Loaded, plan: Plan) -> Apply:
    """Return `(trainable, frozen, tokens, attention_mask, token_types=None, key=None) -> logits [B, C]`."""
    adapted = transform.adapt(loaded.base_logits, plan)

    def apply(trainable: Any, frozen: Any, tokens: Any, attention_mask: Any, token_types: Any = None,
              key: Any = None) -> jax.Array:
        types = {} if token_types is None else {"token_types": token_types}
        if key is None:
            return adapted(trainable, frozen, tokens, attention_mask=attention_mask, **types)
        mine, theirs = jax.random.split(key)
        return adapted(trainable, frozen, tokens, attention_mask=attention_mask, key=mine, **types,
                       peft=Call(key=theirs))

    return apply


def load_data(config: JobConfig, tokenizer: Tokenizer) -> dict[str, Examples]:
    """Read, encode and split the rows of a job: one `Examples` per name of `SPLITS`.

    Raises:
        SourceError, DataError: the rows cannot be had, or are not what the configuration says.
    """
    d = config.data
    table = read_table(sources.resolve(d.source, d.sha256), where=d.where or None)
    classes = list(d.names) if isinstance(d.classes, list) else d.classes
    examples = encode(tokenizer, table.column(d.text), table.column(d.label), classes=classes, max_length=d.max_length)
    parts = split(len(examples), test=d.test, validation=d.validation, seed=d.seed, labels=examples.labels.tolist())
    return {name: examples.take(part) for name, part in zip(SPLITS, parts, strict=True)}


def batches(config: JobConfig, examples: Examples, shuffle: bool = False) -> Batches:
    """Return the batches of some rows; shuffled for training, in a fixed order otherwise."""
    return Batches(examples, config.train.batch_size, config.data.widths, seed=config.seed, shuffle=shuffle)


def once(made: Batches) -> Iterator[Batch]:
    """Yield the batches of one epoch."""
    return (made.make(0, i) for i in range(len(made)))


@dataclasses.dataclass(frozen=True)
class Training:
    """What a training run needs, besides the model and the rows.

    Attributes:
        state: before the first step.
        frozen: what does not train.
        apply: the adapted logits.
        step: the training step, compiled for every width of the batches when it is called.
        total_steps: of all epochs.
    """

    state: TrainState
    frozen: Any
    apply: Apply
    step: Any
    total_steps: int


def training(loaded: Loaded, made: Batches) -> Training:
    """Build the start of a run.

    Raises:
        TrainConfigError: the optimiser's fields do not fit together.
    """
    config, plan = loaded.config, loaded.plan
    root = jax.random.key(config.seed)
    trainable, frozen = transform.init(plan, loaded.params, jax.random.fold_in(root, 0))
    total = config.train.epochs * len(made)
    tx, schedule = optimizer(config, total, trainable, plan)
    apply = logits(loaded, plan)
    has_penalty = any(type(e.method).penalty is not Method.penalty for e in plan.entries)
    loss = classification(apply, penalty=(lambda t, f: transform.penalty(plan, t, f)) if has_penalty else None)
    step = make_train_step(loss, tx, schedule=schedule)
    return Training(create(trainable, tx, jax.random.fold_in(root, 1)), frozen, apply, step, total)


def optimizer(config: JobConfig, total: int, trainable: Any,
              plan: Plan) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return the optimiser of a job and its learning rate by step."""
    t = config.train
    betas = None if t.betas is None else (t.betas[0], t.betas[1])
    return make(Optimizer(t.optimizer, t.learning_rate, t.schedule, t.warmup, t.weight_decay, t.clip, betas, t.eps,
                          t.lora_plus), total, trainable, plan)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A model with the trained adapter of a run.

    Attributes:
        loaded: the model.
        plan: which method rides on which leaf.
        trainable: what was trained.
        frozen: what was not.
    """

    loaded: Loaded
    plan: Plan
    trainable: Any
    frozen: Any

    @functools.cached_property
    def apply(self) -> Apply:
        """The adapted logits."""
        return logits(self.loaded, self.plan)

    def probabilities(self, texts: list[str]) -> tuple[np.ndarray, int]:
        """Return the probability of each class for each text, float32 `[N, C]`, and how many texts were truncated."""
        config = self.loaded.config
        examples = encode(self.loaded.tokenizer, texts, [0] * len(texts), classes=len(config.data.names),
                          max_length=config.data.max_length)
        made = Batches(examples, min(config.train.batch_size, len(texts)), config.data.widths, seed=0, shuffle=False)
        score = jax.jit(lambda t, f, tokens, mask, types: jax.nn.softmax(
            self.apply(t, f, tokens, mask, types).astype(jnp.float32), -1))
        found = np.zeros((len(texts), len(config.data.names)), np.float32)
        for i, (rows, _) in enumerate(made.epoch(0)):
            batch = made.make(0, i)
            scores = score(self.trainable, self.frozen, batch["tokens"], batch["attention_mask"],
                           batch.get("token_types"))
            found[rows] = np.asarray(scores)[:len(rows)]
        return found, examples.truncated


def load_adapter(loaded: Loaded, folder: Path) -> Adapted:
    """Read the adapter of a run on top of its model.

    Raises:
        StoreError: the adapter is damaged, or was trained on another base.
    """
    try:
        plan, trainable, frozen = store.load(folder, loaded.params)
    except WrongBaseError as error:
        raise WrongBaseError(f"{error}; this run's model is {loaded.config.model.source}") from error
    return Adapted(loaded, plan, trainable, frozen)
