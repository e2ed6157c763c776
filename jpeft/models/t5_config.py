"""What differs between T5 models, as data: `T5Config`."""

from __future__ import annotations

import dataclasses

from jpeft.errors import ModelConfigError
from jpeft.models.layers import ACTIVATIONS, choose

TASKS = ("seq2seq", "hidden")
_SIZES = ("vocab_size", "hidden_size", "layers", "decoder_layers", "heads", "head_size", "mlp_size")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """One encoder and decoder.

    Attributes:
        vocab_size: rows of the word table, V.
        hidden_size: width D of the residual stream.
        layers: layers of the encoder.
        decoder_layers: layers of the decoder.
        heads: attention heads H.
        head_size: width d of one head; `heads * head_size` may differ from D.
        mlp_size: inner width of the MLP.
        buckets: of distances, each with a learned bias per head.
        max_distance: from which on all distances are one bucket.
        activation: of the MLP, by its Hugging Face name.
        gated: whether the MLP is `down(act(gate(x)) * up(x))`, rather than `down(act(up(x)))`.
        norm_eps: of every norm.
        dropout: rate everywhere.
        tied: whether the head is the word table.
        scaled: whether the decoder's output is multiplied by `D ** -0.5` before the head.
        pad_id: id of the padding token.
        start_id: id that the decoder begins with.
        task: "seq2seq", or "hidden": no head.
        labels: 0; there is no classifier.

    Raises:
        ModelConfigError: a value is out of its range, or not implemented.

    Example:
        >>> T5Config(vocab_size=9, hidden_size=8, layers=1, decoder_layers=2, heads=2, head_size=3, mlp_size=16).buckets
        32
    """

    vocab_size: int
    hidden_size: int
    layers: int
    decoder_layers: int
    heads: int
    head_size: int
    mlp_size: int
    buckets: int = 32
    max_distance: int = 128
    activation: str = "relu"
    gated: bool = False
    norm_eps: float = 1e-6
    dropout: float = 0.0
    tied: bool = True
    scaled: bool = True
    pad_id: int = 0
    start_id: int = 0
    task: str = "seq2seq"
    labels: int = 0

    def __post_init__(self) -> None:
        wrong = [f"{n} = {getattr(self, n)}, must be a positive integer" for n in _SIZES if getattr(self, n) < 1]
        wrong += [] if 0 <= self.dropout < 1 else [f"dropout = {self.dropout}, must be in [0, 1)"]
        wrong += [] if self.buckets >= 4 and self.buckets % 4 == 0 else [f"buckets = {self.buckets}, must divide by 4"]
        wrong += [] if self.max_distance > self.buckets // 2 else [
            f"max_distance = {self.max_distance}, must be more than half of the {self.buckets} buckets"]
        wrong += [] if self.task in TASKS else [f"task = {self.task!r}, must be one of {TASKS}"]
        if wrong:
            raise ModelConfigError(f"this T5 cannot be built: {'; '.join(wrong)}")
        choose(ACTIVATIONS, self.activation, "activation")

    @property
    def max_length(self) -> int:
        """No length is too long for a relative bias; a tokenizer may know a limit."""
        return 1_000_000
