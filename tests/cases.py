"""The table of methods, and the small model that all of them ride on: a scanned, rematerialised transformer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from support import randomise

import jpeft
from jpeft import Method

L, B, T, D, H, K, F, V = 2, 4, 6, 16, 2, 8, 32, 20
SHAPES = {
    "embed": (V, D),
    "layers": {
        "attn_norm": {"scale": (L, D), "bias": (L, D)},
        "query": {"kernel": (L, D, H, K), "bias": (L, H, K)},
        "key": {"kernel": (L, D, H, K)},
        "value": {"kernel": (L, D, H, K), "bias": (L, H, K)},
        "out": {"kernel": (L, H, K, D), "bias": (L, D)},
        "mlp_norm": {"scale": (L, D), "bias": (L, D)},
        "up": {"kernel": (L, D, F), "bias": (L, F)},
        "down": {"kernel": (L, F, D), "bias": (L, D)},
    },
    "norm": {"scale": (D,), "bias": (D,)},
    "head": {"kernel": (D, V)},
}
SPECS = {
    "embed": P("model"),
    **{f"layers/{n}/kernel": P(None, None, "model") for n in ("query", "key", "value", "up")},
    **{f"layers/{n}/bias": P(None, "model") for n in ("query", "value", "up")},
    **{f"layers/{n}/kernel": P(None, "model") for n in ("out", "down")},
    "head/kernel": P(None, "model"),
}


def _norm(h: jax.Array, p: Any) -> jax.Array:
    h = h - jnp.mean(h, -1, keepdims=True)
    return h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def gate(x: jax.Array, a: Any) -> jax.Array:
    return jax.nn.sigmoid(x @ a["g"] + a["gb"])[..., None]


def encoder(params: Any, ids: jax.Array, attention_mask: jax.Array | None = None, *, causal: bool = False,
            dtype: Any = None, extra: Any = None, remat: bool = True) -> jax.Array:
    """Return logits `[B, T, V]`.

    Args:
        params: as `SHAPES`.
        ids: `[B, T]`.
        attention_mask: `[B, T]`, 1 where a key is visible.
        causal: whether tokens see only those before them.
        dtype: dtype to compute in; None: that of the parameters.
        extra: what the methods that cannot merge must amount to, written into the model: `prompt` `[n, D]`, `key` and
            `value` `[L, n, H, K]` (prefixes), `adapter` and `parallel` (`down`, `b_down`, `up`, `b_up`, `s`, each
            `[L, ..]`) behind and beside the feed-forward part, `term` (`a`, `b`) beside its last kernel, `edit` (`w`,
            `b`, `v`) of the first two tokens, `gated` (UniPELT's LoRA and prefix, with gates `g` and `gb`; that of the
            adapter is in `adapter`).
        remat: whether the backward pass computes each layer again.
    """
    if dtype is not None:
        params, extra = jax.tree.map(lambda w: w.astype(dtype), (params, extra))
    extra = dict(extra or {})
    h = params["embed"][ids]
    prompt = extra.pop("prompt", None)
    if prompt is not None:
        h = jnp.concatenate([jnp.broadcast_to(prompt, (len(ids), *prompt.shape)), h], 1)
    visible = jnp.ones(h.shape[:2], bool)
    if attention_mask is not None:
        visible = visible.at[:, -ids.shape[1]:].set(attention_mask.astype(bool))

    def block(h: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        p, more = layer
        x = _norm(h, p["attn_norm"])
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[n]["kernel"]) for n in ("query", "key", "value"))
        q, v = q + p["query"]["bias"], v + p["value"]["bias"]
        if "gated" in more:
            a = more["gated"]
            q = q + jnp.reshape(gate(x, a["query"]) * 8 * (x @ a["query"]["a"] @ a["query"]["b"]), q.shape)
            more = {**more, **{n: jnp.mean(gate(x, a[n]), 1)[..., None, None] * a[n]["p"] for n in ("key", "value")}}
        seen = jnp.broadcast_to(visible[:, None, None, :], (len(h), 1, x.shape[1], x.shape[1]))
        if causal:
            seen = seen & jnp.tril(jnp.ones(seen.shape[-2:], bool))
        if "key" in more:
            k, v = (jnp.concatenate([jnp.broadcast_to(more[n], (len(h), *more[n].shape[-3:])), t], 1)
                    for n, t in (("key", k), ("value", v)))
            seen = jnp.pad(seen, ((0, 0), (0, 0), (0, 0), (more["key"].shape[-3], 0)), constant_values=True)
        scores = jnp.einsum("bthk,bshk->bhts", q, k) * jnp.asarray(K**-0.5, q.dtype)
        weights = jax.nn.softmax(jnp.where(seen, scores, jnp.asarray(-1e9, q.dtype)))
        mixed = jnp.einsum("bhts,bshk->bthk", weights, v)
        h = h + (jnp.einsum("bthk,hkd->btd", mixed, p["out"]["kernel"]) + p["out"]["bias"])
        mlp = _norm(h, p["mlp_norm"])
        x = jax.nn.gelu(mlp @ p["up"]["kernel"] + p["up"]["bias"])
        y = x @ p["down"]["kernel"] + p["down"]["bias"]
        if "term" in more:
            y = y + x @ more["term"]["a"] @ more["term"]["b"]
        if "adapter" in more:
            a = more["adapter"]
            s = gate(y, a) if "g" in a else a.get("s", 1)
            y = y + s * (jax.nn.gelu(y @ a["down"] + a["b_down"]) @ a["up"] + a["b_up"])
        if "parallel" in more:
            a = more["parallel"]
            y = y + a["s"] * (jax.nn.gelu(mlp @ a["down"] + a["b_down"]) @ a["up"] + a["b_up"])
        h = h + y
        if "edit" in more:
            a = more["edit"]
            h = jnp.concatenate([h[:, :2] + (h[:, :2] @ a["w"] + a["b"]) @ a["v"], h[:, 2:]], 1)
        return h, None

    h, _ = jax.lax.scan(jax.checkpoint(block) if remat else block, h, (params["layers"], extra))
    logits = _norm(h, params["norm"]) @ params["head"]["kernel"]
    return logits[:, -ids.shape[1]:]


def kronecker(theta: Any, name: str) -> jax.Array:
    """`sum_i kron(a_i, s_i t_i)` of each layer."""
    pairs = jnp.einsum("limr,lirn->limn", theta[f"{name}_s"], theta[f"{name}_t"])
    return sum(jax.vmap(jnp.kron, (None, 0))(theta["a"][i], pairs[:, i]) for i in range(len(theta["a"])))


def compacted(theta: Any) -> Any:
    return {k: theta[k] if k in theta else kronecker(theta, k) for k in ("down", "b_down", "up", "b_up")}


def subspace(theta: Any) -> Any:
    """LoReFT as an edit `(h W + b) V`, from its equation `h + (h W + b - h R^T) R`."""
    q, upper = jnp.linalg.qr(theta["p"])
    rows = q * jnp.sign(jnp.einsum("lii->li", upper))[:, None]
    return {"w": theta["w"] - rows, "b": theta["b"], "v": jnp.swapaxes(rows, 1, 2)}


def encoded(theta: Any) -> jax.Array:
    """The prompt of P-Tuning's MLP."""
    for i in (1, 2):
        theta = {**theta, "e": jax.nn.relu(theta["e"] @ theta[f"w{i}"] + theta[f"b{i}"])}
    return theta["e"] @ theta["w3"] + theta["b3"]


def gated(theta: Any) -> Any:
    """UniPELT as extras."""
    return {"adapter": theta["layers/down/kernel"],
            "gated": {n: theta[f"layers/{n}/kernel"] for n in ("query", "key", "value")}}


def of_task(theta: Any) -> jax.Array:
    """The prompt of the only task of multitask prompt tuning."""
    return theta["p"] * (theta["u"][0] @ theta["v"][0])


def projected(theta: Any) -> jax.Array:
    """The prefix that an encoder makes."""
    hidden = jnp.tanh(theta["e"] @ theta["w1"] + theta["b1"])
    return jnp.einsum("vj,ljhk->lvhk", hidden, theta["w2"]) + theta["b2"][:, None]


def make_params(dtype: Any = jnp.float32) -> Any:
    params = randomise(jax.tree.map(lambda s: jnp.zeros(s, dtype), SHAPES, is_leaf=lambda s: isinstance(s, tuple)), 5)
    for norm in (params["layers"]["attn_norm"], params["layers"]["mlp_norm"], params["norm"]):
        norm["scale"] = norm["scale"] + 1
    return params


def make_inputs() -> tuple[jax.Array, jax.Array]:
    """Token ids and a mask that hides the last tokens of one row."""
    ids = np.random.RandomState(3).randint(0, V, (B, T))
    return jnp.asarray(ids, jnp.int32), jnp.ones((B, T), jnp.int32).at[1, 4:].set(0)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One row: a method and what is particular to it.

    Attributes:
        name: the row's name.
        rules: pattern -> method; the first is the one under test.
        count: trainable values, in closed form.
        chain: from the method, the two that form a `Chain` on the same leaf; None: undefined.
        extra: from `{path: theta}`, the argument `extra` of `encoder` that does the same, if the method cannot merge.
        tokens: for methods with virtual tokens.
        exempt: law -> (reason, `file::test` that is passed instead).
        dense: why a step makes arrays of a weight's shape; None: it makes none.
        held: values of four bytes that the backward pass takes over from the forward pass for a row of the batch,
            beyond those of the base (on as many tokens), in closed form.
        tier: `default`, or `slow`: its laws run in the slow tier, its count in the default one.
    """

    name: str
    rules: Mapping[str, Method]
    count: int
    chain: Callable[[Method], tuple[Method, Method]] | None = None
    extra: Callable[[Any], Any] | None = None
    tokens: jpeft.Tokens | None = None
    exempt: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    dense: str | None = None
    held: float = 0
    tier: str = "default"


LORA, IA3 = jpeft.LoRA(rank=3, alpha=6), jpeft.IA3()
TOKENS = jpeft.Tokens(ids=0, mask="attention_mask")
QV, KV = "layers/(query|value)/kernel", "layers/(key|value)/kernel"
N_BIAS = D + L * (2 * H * K + 4 * D + F)
VIRTUAL = "tests/methods/test_virtual.py::"
W, MASK = T + 3, D / 4  # with virtual tokens; which values of a token are theirs, a byte each
UNITS = jax.ShapeDtypeStruct((8,), "float32")
GELU = 1 + sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda z: jax.vjp(jax.nn.gelu, z)[1], UNITS))) // 8
WIDER = "virtual tokens are seen by the real ones"

CASES = [
    Case("lora", {QV: jpeft.LoRA(rank=2, alpha=4)}, 2 * L * 2 * (D + H * K), lambda m: (m, IA3),
         held=T * L * (D + 2 * 2)),
    Case("dora", {QV: jpeft.DoRA(rank=2, alpha=4)}, 2 * L * (2 * (D + H * K) + H * K), lambda m: (m, IA3),
         held=T * L * (D + 2 * (2 + H * K))),
    Case("ia3", {KV: jpeft.IA3(), "layers/down/kernel": jpeft.IA3(on="in")}, L * (2 * H * K + F), lambda m: (LORA, m),
         held=T * L * (2 * H * K + F)),
    Case("bitfit", {"bias": jpeft.BitFit()}, N_BIAS, lambda m: (m, jpeft.LayerNormTuning()), tier="slow", held=0),
    Case("layernorm", {"norm": jpeft.LayerNormTuning()}, (2 * L + 1) * 2 * D, lambda m: (jpeft.Full(), m), tier="slow",
         held=T * (2 * L + 1) * D),
    Case("full", {"layers/query/kernel": jpeft.Full(), "head/kernel": jpeft.Full()}, L * D * H * K + D * V,
         lambda m: (m, LORA),
         dense="the weight itself learns", held=T * (L + 1) * D),
    Case("pfeiffer", {"layers/down/kernel": jpeft.Pfeiffer(bottleneck=4, activation="gelu")}, L * (8 * D + 4 + D),
         lambda m: (LORA, m), lambda theta: {"adapter": theta["layers/down/kernel"]}, held=T * L * (D + 4 * GELU)),
    Case("prompt", {"embedding": jpeft.PromptTuning(length=3)}, 3 * D, lambda m: (LORA, m),
         lambda theta: {"prompt": theta["embed"]["p"]}, TOKENS,
         {"L1": (WIDER, VIRTUAL + "test_an_invisible_prompt_is_the_base")}, held=W * MASK),
    Case("prefix", {KV: jpeft.PrefixTuning(length=3)}, 2 * L * 3 * H * K, lambda m: (LORA, m),
         lambda theta: {n: theta[f"layers/{n}/kernel"]["p"] for n in ("key", "value")}, TOKENS,
         {"L1": (WIDER, VIRTUAL + "test_a_prefix_is_more_keys_and_values")}, held=2 * W * MASK),
    Case("oft", {"layers/(out|up)/kernel": jpeft.OFT(block_size=4)}, 2 * L * D // 4 * 6, lambda m: (LORA, m),
         held=T * L * (H * K + D)),
    Case("lokr", {"layers/(up|down)/kernel": jpeft.LoKr(rank=2, alpha=2)}, 2 * L * (4 * 4 + 2 * (4 + 8)),
         lambda m: (m, IA3), held=T * L * (D + F + 2 * 2 * (4 + 4))),
    Case("fourierft", {"layers/(query|up)/kernel": jpeft.FourierFT(n_frequency=9)}, 2 * L * 9, lambda m: (m, LORA),
         dense="the inverse transform of a few frequencies is a whole weight", tier="slow", held=T * L * 2 * D),
    Case("houlsby", {"layers/down/kernel": jpeft.Houlsby(bottleneck=4, activation="gelu")}, L * (8 * D + 4 + D),
         lambda m: (LORA, m), lambda theta: {"adapter": theta["layers/down/kernel"]}, tier="slow",
         held=T * L * (D + 4 * GELU)),
    Case("adapter plus", {"layers/down/kernel": jpeft.AdapterPlus(bottleneck=4)}, L * (8 * D + 4 + 2 * D),
         lambda m: (LORA, m), lambda theta: {"adapter": theta["layers/down/kernel"]}, tier="slow",
         held=T * L * (2 * D + 4 * GELU)),
    Case("parallel", {"layers/down/kernel": jpeft.ParallelAdapter(bottleneck=4, activation="gelu", learned=True,
                                                                  input_of="../up/kernel")}, L * (8 * D + 5 + D),
         lambda m: (LORA, m), lambda theta: {"parallel": theta["layers/down/kernel"]}, tier="slow",
         held=T * L * (2 * D + 4 * GELU)),
    Case("compacter", {"layers/down/kernel": jpeft.Compacter(bottleneck=4, phm_dim=2)},
         8 + L * (2 * (D + 4) + 4 + D), lambda m: (LORA, m),
         lambda theta: {"adapter": compacted(theta["layers/down/kernel"])}, tier="slow",
         held=T * L * (D + 4 * 2 * 2 + 4 * GELU)),
    Case("direft", {"layers/down/kernel": jpeft.DiReFT(rank=2, prefix_positions=2)}, L * (4 * D + 2),
         lambda m: (LORA, m), lambda theta: {"edit": theta["layers/down/kernel"]}, TOKENS, tier="slow",
         held=T * (MASK + D + L * (D + 2))),
    Case("loreft", {"layers/down/kernel": jpeft.LoReFT(rank=2, prefix_positions=2)}, L * (4 * D + 2),
         lambda m: (LORA, m), lambda theta: {"edit": subspace(theta["layers/down/kernel"])}, TOKENS, tier="slow",
         held=T * (MASK + D + L * (D + 2))),
    Case("hra", {"layers/(out|up)/kernel": jpeft.HRA(rank=4)}, 2 * L * D * 4, lambda m: (LORA, m), tier="slow",
         held=T * L * (H * K + D + 2 * 4)),
    Case("boft", {"layers/(out|up)/kernel": jpeft.BOFT(block_size=4, n_butterfly_factor=2, neumann=5)},
         L * (2 * 2 * D // 4 * 6 + D + F), lambda m: (LORA, m), tier="slow", held=T * L * (2 * H * K + D + 2 * D + F)),
    Case("road", {"layers/(query|up)/kernel": jpeft.RoAd(group_size=8)}, 2 * L * (H * K + F) // 2, lambda m: (LORA, m),
         tier="slow", held=T * L * 2 * (H * K + F)),
    Case("c3a", {"layers/(query|up)/kernel": jpeft.C3A(block_size=8)}, L * (D * H * K + D * F) // 8, lambda m: (m, IA3),
         tier="slow", held=T * L * 2 * (D // 8) * 2 * 5),
    Case("shira", {"layers/(query|up)/kernel": jpeft.SHiRA(rank=2)}, L * 2 * (D + H * K + D + F), lambda m: (m, LORA),
         dense="a few values all over a weight: one dense product is cheaper than a look-up of each for each token",
         tier="slow", held=T * L * 2 * D),
    Case("waveft", {"layers/(query|up)/kernel": jpeft.WaveFT(n_frequency=9)}, 2 * L * 9, lambda m: (m, LORA),
         dense="the inverse transform of a few wavelets is a whole weight", tier="slow", held=T * L * 2 * D),
    Case("tokens", {"embedding": jpeft.TrainableTokens(token_indices=(2, 5, 19))}, 3 * D, lambda m: (m, IA3),
         tier="slow", held=T * 3),
    Case("p-tuning", {"embedding": jpeft.PTuning(length=3, hidden_size=8)}, 3 * D + 2 * D * 8 + 64 + 16 + D,
         lambda m: (LORA, m), lambda theta: {"prompt": encoded(theta["embed"])}, TOKENS,
         {"L1": (WIDER, VIRTUAL + "test_an_invisible_prompt_is_the_base")}, tier="slow", held=W * MASK),
    Case("prefix encoder", {KV: jpeft.PrefixTuning(length=3, prefix_projection=True, encoder_hidden_size=4)},
         2 * (3 * H * K + 4 * H * K + 4 + L * (4 + 1) * H * K), lambda m: (LORA, m),
         lambda theta: {n: projected(theta[f"layers/{n}/kernel"]) for n in ("key", "value")}, TOKENS,
         {"L1": (WIDER, VIRTUAL + "test_a_prefix_is_more_keys_and_values")}, tier="slow", held=2 * W * MASK),
    Case("unipelt", {
         "layers/query/kernel": jpeft.GatedLoRA(rank=2), KV: jpeft.GatedPrefixTuning(length=3),
         "layers/down/kernel": jpeft.GatedAdapter(bottleneck=4, activation="gelu")},
         L * (2 * (D + H * K) + D + 1 + 2 * (3 * H * K + D + 1) + 8 * D + 4 + D + D + 1), lambda m: (LORA, m), gated,
         TOKENS, {"L1": (WIDER, VIRTUAL + "test_a_prefix_is_more_keys_and_values")}, tier="slow",
         held=2 * W * MASK + L * (W * (4 * D + 2 + 4 + 4 * GELU) + T * (2 * D + 2) + 2)),
    Case("multitask", {"embedding": jpeft.MultitaskPromptTuning(length=3, num_ranks=2)}, 3 * D + 2 * (3 + D),
         lambda m: (LORA, m), lambda theta: {"prompt": of_task(theta["embed"])}, TOKENS,
         {"L1": (WIDER, VIRTUAL + "test_an_invisible_prompt_is_the_base")}, tier="slow", held=W * MASK),
    Case("psoft", {"layers/(query|up)/kernel": jpeft.PSOFT(rank=4, neumann=5)}, 2 * L * (6 + 8), lambda m: (m, IA3),
         tier="slow", held=T * L * 2 * 4),
    Case("diff pruning", {"layers/up/kernel": jpeft.DiffPruning()}, 2 * L * D * F, lambda m: (m, LORA), tier="slow",
         dense="each number of the weight learns", held=T * L * D),
    Case("chain", {"layers/up/kernel": jpeft.Chain((jpeft.DoRA(rank=2), jpeft.OFT(blocks=2), jpeft.IA3(on="in")))},
         L * (2 * (D + F) + F + 2 * 28 + D), held=T * L * (3 * D + 2 + F)),
    Case("vera", {QV: jpeft.VeRA(rank=5)}, 2 * L * (5 + H * K), lambda m: (m, IA3), tier="slow",
         held=T * L * 2 * (5 + H * K)),
    Case("loha", {"layers/(up|out)/kernel": jpeft.LoHa(rank=2, alpha=4)}, 2 * L * 2 * (2 * D + D + F),
         lambda m: (m, IA3), tier="slow", held=T * L * (H * K + D + 2 * 2**2)),
    Case("hira", {QV: jpeft.HiRA(rank=3)}, 2 * L * 3 * (D + H * K), lambda m: (m, LORA), tier="slow",
         dense="the product of two weights, entry by entry", held=T * L * D),
    Case("miss", {"layers/out/kernel": jpeft.MiSS(rank=5), "layers/up/kernel": jpeft.MiSS(rank=4, mini=8)},
         L * (5 * D + 4 * 8), lambda m: (m, IA3), tier="slow", held=T * L * (5 + 4)),
    Case("delora", {QV: jpeft.DeLoRA(rank=2)}, 2 * L * (2 * (D + H * K) + 1), lambda m: (m, IA3), tier="slow",
         held=T * L * (D + 2 * 2)),
    Case("randlora", {"layers/(up|down)/kernel": jpeft.RandLoRA(rank=6, randlora_alpha=20)}, 2 * L * 3 * (6 + D),
         lambda m: (m, IA3), tier="slow", held=T * L * (D + 3 * 6)),
    Case("adalora", {QV: jpeft.AdaLoRA(init_r=3, target_r=2)}, 2 * L * 3 * (D + H * K + 1), lambda m: (m, IA3),
         tier="slow", held=T * L * (D + 2 * 3)),
    Case("lora-fa", {QV: jpeft.LoRAFA(rank=2, alpha=4)}, 2 * L * 2 * H * K, lambda m: (m, IA3), tier="slow",
         held=T * L * 2 * 2),
    Case("loftq", {QV: jpeft.LoRA(rank=2, init_weights="loftq_iter_2")}, 2 * L * 2 * (D + H * K), lambda m: (m, IA3),
         tier="slow", exempt={"L1": ("it starts from a weight that is close to the base's",
                                     "tests/methods/test_loftq.py::test_it_starts_closer_than_by_quantising_alone")},
         held=T * L * (D + 2 * 2)),
    Case("alora", {"layers/down/kernel": jpeft.ALoRA(rank=2, alpha=2)}, L * 2 * (D + F), lambda m: (LORA, m),
         lambda theta: {"term": theta["layers/down/kernel"]}, TOKENS, tier="slow", held=T * L * (F + 2)),
    Case("miss-bat", {"layers/(up|down)/kernel": jpeft.MiSS(rank=4, bat=True)}, L * 4 * (D + F), lambda m: (m, IA3),
         dense="each block of the weight is multiplied", tier="slow", held=T * L * (D + F)),
    Case("pissa-fast", {QV: jpeft.LoRA(rank=2, init_weights="pissa_niter_2")}, 2 * L * 2 * (D + H * K),
         lambda m: (m, IA3), tier="slow", held=T * L * (D + 2 * 2)),
    Case("vblora", {QV: jpeft.VBLoRA(rank=2, num_vectors=5, vector_length=4)}, 2 * (L * 2 * 2 * 4 * 5 + 5 * 4),
         lambda m: (m, IA3), tier="slow", held=T * L * (D + 2 * 2)),
    Case("gralora", {"layers/(out|up)/kernel": jpeft.GraLoRA(rank=4, hybrid_r=2)}, L * 6 * (D + D + D + F),
         lambda m: (m, IA3), tier="slow", held=T * L * 2 * (H * K + D + 2 * 4 + 2)),
    Case("llama-adapter", {"layers/(query|up)/bias": jpeft.LLaMAAdapter()}, L * (H * K + F), tier="slow",
         exempt={"L1": ("this model has no places for it, biases stand in for them",
                        "tests/methods/test_llama_adapter.py::test_it_starts_from_the_base_and_learns")}, held=0),
    Case("kasa", {QV: jpeft.KaSA(rank=2)}, 2 * L * 2 * (D + H * K + 1), lambda m: (m, IA3), tier="slow",
         exempt={"L1": ("it drops what it takes for noise",
                        "tests/methods/test_kasa.py::test_it_starts_without_the_least_components")},
         held=T * L * (D + 2 * 2)),
]
