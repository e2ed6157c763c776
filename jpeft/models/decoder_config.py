"""What differs between causal language models, as data: `DecoderConfig`."""

from __future__ import annotations

import dataclasses

from jpeft.errors import ModelConfigError
from jpeft.models.layers import ACTIVATIONS, choose
from jpeft.models.rope import Rope

TASKS = ("causal-lm", "hidden", "classification")
_RATES = ("dropout", "attention_dropout", "embedding_dropout")
_SIZES = ("vocab_size", "hidden_size", "layers", "heads", "kv_heads", "head_size", "mlp_size", "positions")
_CHOICES = {
    "norm": ("rms", "layer"), "norm_at": ("before", "after", "both"), "qk_norm": ("none", "head", "full"),
    "fused_qkv": ("none", "blocks", "heads", "thirds"), "task": TASKS,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """One decoder.

    Attributes:
        vocab_size: rows of the word table, V.
        hidden_size: width D of the residual stream.
        layers: number of layers L.
        heads: query heads H.
        kv_heads: key and value heads K; they divide H.
        head_size: width d of one head.
        mlp_size: inner width of the MLP, or of each expert.
        positions: tokens that the model was trained on; rows of the position table, if there is one.
        activation: of the MLP, by its Hugging Face name.
        gated: whether the MLP is `down(act(gate(x)) * up(x))`, rather than `down(act(up(x)))`.
        norm: "rms" or "layer".
        norm_eps: of every norm.
        norm_centred: whether the scales of RMS norms are stored as distances from 1.
        norm_at: "before" attention and MLP, "after" them (inside the residual), or "both".
        parallel: whether the MLP reads the input of the layer, not the output of attention.
        qk_norm: RMS norm of queries and keys: "none", over each "head", over the "full" width.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        out_bias: whether the projection out of attention has a bias.
        mlp_bias: whether the MLP has biases.
        fused_qkv: how the projections are one kernel: "none", three kernels; "blocks" `[H + 2 K, d]`; "heads"
            `[H, 3, d]`; "thirds" `[3, H, d]`.
        fused_mlp: whether gate and up are one kernel `[2, mlp_size]`.
        position_table: whether positions are learned and added to the words.
        rope: rotary positions; None: none.
        local_rope: those of the layers with a window; None: `rope`.
        unrotated: numbers of the layers without rotary positions.
        window: tokens that a layer with a window sees, itself included; None: no layer has one.
        local: numbers of the layers that have it.
        scale: of the attention scores; None: `head_size ** -0.5`.
        scale_by_depth: whether layer i divides its scores by `i + 1`.
        attention_cap: soft cap of the attention scores.
        logit_cap: soft cap of the logits.
        embed_scale: factor on the embedded words.
        tied: whether the head is the word table.
        experts: number of experts; 0: a dense MLP.
        experts_chosen: experts per token.
        experts_renormalise: whether their probabilities are made to sum to 1.
        dropout: rate after attention and MLP.
        attention_dropout: rate on the attention probabilities.
        embedding_dropout: rate after the embedding.
        initializer_range: standard deviation of new kernels and tables.
        pad_id: id of the padding token; None: there is none.
        task: "causal-lm"; "hidden", no head; "classification", a head on the last visible token.
        labels: classes of the classifier.
        adapter_length: learned tokens that attention sees beside the text, behind a gate; 0: none.

    Raises:
        ModelConfigError: a value is out of its range, or not implemented.

    Example:
        >>> DecoderConfig(vocab_size=9, hidden_size=8, layers=2, heads=2, kv_heads=1, head_size=4, mlp_size=16,
        ...               positions=32).uniform
        True
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_size: int
    positions: int
    activation: str = "silu"
    gated: bool = True
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_centred: bool = False
    norm_at: str = "before"
    parallel: bool = False
    qk_norm: str = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    fused_qkv: str = "none"
    fused_mlp: bool = False
    position_table: bool = False
    rope: Rope | None = None
    local_rope: Rope | None = None
    unrotated: tuple[int, ...] = ()
    window: int | None = None
    local: tuple[int, ...] = ()
    scale: float | None = None
    scale_by_depth: bool = False
    attention_cap: float | None = None
    logit_cap: float | None = None
    embed_scale: float = 1.0
    tied: bool = False
    experts: int = 0
    experts_chosen: int = 0
    experts_renormalise: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    embedding_dropout: float = 0.0
    initializer_range: float = 0.02
    pad_id: int | None = None
    task: str = "causal-lm"
    labels: int = 0
    adapter_length: int = 0

    def __post_init__(self) -> None:
        wrong = [f"{n} = {getattr(self, n)}, must be a positive integer" for n in _SIZES if getattr(self, n) < 1]
        wrong += [f"{n} = {getattr(self, n)}, must be in [0, 1)" for n in _RATES if not 0 <= getattr(self, n) < 1]
        wrong += [f"{n} = {getattr(self, n)!r}, must be one of {known}" for n, known in _CHOICES.items()
                  if getattr(self, n) not in known]
        for name in ("local", "unrotated"):
            beyond = [i for i in getattr(self, name) if not 0 <= i < self.layers]
            wrong += [f"{name} names the layers {beyond} of {self.layers}"] if beyond else []
        if self.kv_heads > 0 and self.heads % self.kv_heads:
            wrong.append(f"kv_heads = {self.kv_heads} must divide heads = {self.heads}")
        if self.fused_qkv in ("heads", "thirds") and self.kv_heads != self.heads:
            wrong.append(f"fused_qkv = {self.fused_qkv!r} needs as many kv_heads as heads")
        if self.local and (self.window is None or self.window < 1):
            wrong.append(f"layers {list(self.local)} have a window of {self.window}, must be a positive integer")
        if self.experts and not 0 < self.experts_chosen <= self.experts:
            wrong.append(f"experts_chosen = {self.experts_chosen}, must be in 1..{self.experts}")
        if self.experts and (self.mlp_bias or self.fused_mlp or not self.gated):
            wrong.append("experts are implemented with a gate and without biases or fused kernels only")
        if self.adapter_length < 0:
            wrong.append(f"adapter_length = {self.adapter_length}, must not be negative")
        if self.task == "classification" and self.labels < 1:
            wrong.append(f"labels = {self.labels}, must be positive for classification")
        if wrong:
            raise ModelConfigError(f"this decoder cannot be built: {'; '.join(wrong)}")
        choose(ACTIVATIONS, self.activation, "activation")

    @property
    def uniform(self) -> bool:
        """Whether all layers see alike: all have the window, or none."""
        return len(set(self.local)) in (0, self.layers)

    @property
    def ring(self) -> int | None:
        """Tokens that a cache has to keep; None: all."""
        return self.window if len(set(self.local)) == self.layers else None

    @property
    def max_length(self) -> int:
        """The longest sequence that the model was trained on."""
        return self.positions
