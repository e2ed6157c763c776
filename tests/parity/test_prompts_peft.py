"""Prompts and prefixes against Hugging Face PEFT on torch: a small GPT-2 gives the same logits for the same numbers."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, randomise

import jpeft

NEEDS = ("torch", "peft", "transformers", "flax")
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")]

V, D, L, H = 3, 8, 2, 2
IDS, MASK = np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
TASKS = np.array([2, 0])
Numbers = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Twin:
    """One method in both libraries.

    Attributes:
        rules: ours.
        config: name of the configuration class in peft.
        fields: its fields.
        stored: from our theta, the parameters of peft's prompt encoder by name.
    """

    rules: Mapping[str, jpeft.Method]
    config: str
    fields: Mapping[str, Any]
    stored: Callable[[Numbers], Numbers]


def flat(p: np.ndarray) -> np.ndarray:
    """`[L, .., 2 D]`, keys before values, as peft lays them out: `[.., L 2 D]`."""
    return np.moveaxis(p, 0, -2).reshape(*p.shape[1:-1], -1)


def layers(t: Numbers, name: str, numbers: tuple[int, ...]) -> Numbers:
    found = {}
    for i, n in enumerate(numbers, 1):
        found |= {f"{name}.{n}.weight": t[f"w{i}"].T, f"{name}.{n}.bias": t[f"b{i}"]}
    return found


def lstm(t: Numbers) -> Numbers:
    found = {"embedding.weight": t["e"], **layers(t, "mlp_head", (0, 2))}
    for way, end in (("forward", ""), ("backward", "_reverse")):
        for i in range(2):
            own, name = f"{way}_{i}", f"l{i}{end}"
            found |= {f"lstm_head.weight_ih_{name}": t[f"{own}_x"].T, f"lstm_head.weight_hh_{name}": t[f"{own}_h"].T,
                      f"lstm_head.bias_ih_{name}": t[f"{own}_b"], f"lstm_head.bias_hh_{name}": np.zeros(4 * D, "f4")}
    return found


KV, WORDS = ".*/attention/qkv/kernel", "embed/embedding"
OURS: dict[str, Any] = {"length": V, "channels": (D, 3 * D)}
TWINS = {
    "prefix": Twin({KV: jpeft.PrefixTuning(**OURS)}, "PrefixTuningConfig", {},
                   lambda t: {"embedding.weight": flat(t["p"])}),
    "prefix projection": Twin(
        {KV: jpeft.PrefixTuning(**OURS, prefix_projection=True, encoder_hidden_size=5)}, "PrefixTuningConfig",
        {"prefix_projection": True, "encoder_hidden_size": 5},
        # There, the embedding is as wide as the keys alone.
        lambda t: {"embedding.weight": t["e"][:, :D], "transform.0.weight": t["w1"][:D].T, "transform.0.bias": t["b1"],
                   "transform.2.weight": flat(t["w2"]).T, "transform.2.bias": flat(t["b2"])}),
    "prompt": Twin({WORDS: jpeft.PromptTuning(length=V)}, "PromptTuningConfig", {},
                   lambda t: {"embedding.weight": t["p"]}),
    "mlp": Twin({WORDS: jpeft.PTuning(length=V, hidden_size=5)}, "PromptEncoderConfig", {"encoder_hidden_size": 5},
                lambda t: {"embedding.weight": t["e"], **layers(t, "mlp_head", (0, 2, 4))}),
    "lstm": Twin({WORDS: jpeft.PTuning(length=V, encoder="LSTM", hidden_size=D)}, "PromptEncoderConfig",
                 {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": D}, lstm),
    "multitask": Twin({WORDS: jpeft.MultitaskPromptTuning(length=V, num_tasks=3, num_ranks=2)},
                      "MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2},
                      lambda t: {"embedding.weight": t["p"], "prefix_task_cols": t["u"], "prefix_task_rows": t["v"]}),
}  # fmt: skip


def theirs(folder: Path, twin: Twin, numbers: Numbers) -> np.ndarray:
    import peft
    import torch
    from transformers import GPT2LMHeadModel

    config = getattr(peft, twin.config)(task_type="CAUSAL_LM", num_virtual_tokens=V, **twin.fields)
    model = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(folder), config).eval()
    held = dict(model.prompt_encoder["default"].named_parameters())
    assert set(held) == set(numbers)
    more = {"task_ids": torch.tensor(TASKS)} if "task" in twin.config.lower() else {}
    with torch.no_grad():
        for name, value in numbers.items():
            assert tuple(held[name].shape) == value.shape, name
            held[name].copy_(torch.tensor(np.array(value)))
        out = model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK), **more)
    return out.logits[:, -IDS.shape[1]:].numpy()


@pytest.mark.parametrize("name", TWINS)
def test_equal_logits(name: str, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    twin = TWINS[name]
    GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=D, n_layer=L, n_head=H, n_positions=16, initializer_range=0.4,
                               bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path)
    model, params = jpeft.from_pretrained(str(tmp_path))[:2]
    tokens = jpeft.Tokens(ids=0)
    plan = jpeft.plan(model.apply, params, (jnp.asarray(IDS),), twin.rules, tokens=tokens,
                      example_kwargs={"attention_mask": jnp.asarray(MASK)})
    start, frozen = jpeft.init(plan, params, jax.random.key(0))
    spread = randomise(start, 3, 0.7)
    (letters,) = spread.values()
    if name == "prefix projection":
        letters["e"] = letters["e"].at[:, D:].set(0)
    want = theirs(tmp_path, twin, twin.stored({k: np.asarray(v) for k, v in letters.items()}))
    call = jpeft.Call(task=jnp.asarray(TASKS)) if name == "multitask" else jpeft.Call()
    applies = [jpeft.adapt(model.apply, plan), *([jpeft.adapt_prefix(model, plan)] if "prefix" in name else [])]
    seen = MASK[..., None] == 1
    for apply in applies:
        ours = apply(spread, frozen, jnp.asarray(IDS), attention_mask=jnp.asarray(MASK), peft=call).logits
        assert_close(jnp.where(seen, ours, 0), jnp.where(seen, want, 0), 1e-5)
