"""LLaMA-Adapter against Hugging Face PEFT's AdaptionPrompt: a small Llama, the same numbers, logits and gradients."""

from __future__ import annotations

import importlib.util
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

P, L, H, LAST = 3, 3, 4, 2
IDS = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]])
WHERE = ".*/adapter_(prompt|gate)"
PROMPT, GATE = (f"layers/attention/adapter_{name}" for name in ("prompt", "gate"))


def theirs(folder: Path, prompts: np.ndarray, gates: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, and the gradients of the sum of their sines; prompts `[LAST, P, D]`, gates `[LAST]`."""
    import peft
    import torch
    from transformers import LlamaForCausalLM

    config = peft.AdaptionPromptConfig(adapter_len=P, adapter_layers=LAST, task_type="CAUSAL_LM")
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(folder), config).eval()
    held = [layer.self_attn for layer in model.base_model.model.model.layers[L - LAST:]]
    with torch.no_grad():
        for one, prompt, gate in zip(held, prompts, gates, strict=True):
            one.adaption_prompt.copy_(torch.tensor(prompt)[None])
            one.adaption_gate.fill_(float(gate))
    logits = model(input_ids=torch.tensor(IDS)).logits
    logits.sin().sum().backward()
    slopes = [np.stack([getattr(one, name).grad.numpy().squeeze(0) for one in held])
              for name in ("adaption_prompt", "adaption_gate")]
    return logits.detach().numpy(), *slopes


def test_equal_logits_and_gradients(tmp_path: Path) -> None:
    """Its gate is one number for all heads, as it is: ours is `tanh(g)`, one for each head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=L, num_attention_heads=H,
                                 num_key_value_heads=2, intermediate_size=24, max_position_embeddings=32,
                                 initializer_range=0.3)).save_pretrained(tmp_path)
    model, params = jpeft.from_pretrained(str(tmp_path))[:2]
    made, wide = model.with_adapter(params, P)
    rules: Any = {jpeft.layers(WHERE, range(L - LAST, L)): jpeft.LLaMAAdapter()}
    plan = jpeft.plan(made.apply, wide, (jnp.asarray(IDS),), rules)
    start, frozen = jpeft.init(plan, wide, jax.random.key(0))
    spread = randomise(start, 3, 0.7)
    spread[GATE]["p"] = jnp.broadcast_to(spread[GATE]["p"][:, :1], (L, H))
    adapted = jpeft.adapt(made.apply, plan)
    ours, slopes = jax.jit(lambda t: (adapted(t, frozen, jnp.asarray(IDS)).logits, jax.grad(
        lambda t: jnp.sum(jnp.sin(adapted(t, frozen, jnp.asarray(IDS)).logits)))(t)))(spread)
    gates = np.tanh(np.asarray(spread[GATE]["p"])[L - LAST:, 0])
    logits, prompt, gate = theirs(tmp_path, np.asarray(spread[PROMPT]["p"])[L - LAST:], gates)
    assert not np.allclose(logits, model.apply(params, IDS).logits, atol=1e-2)
    assert_close(ours, logits, 1e-5)
    assert_close(slopes[PROMPT]["p"][L - LAST:], prompt, 1e-5)
    assert_close(jnp.sum(slopes[GATE]["p"], 1)[L - LAST:], gate * (1 - gates**2), 1e-5)
    assert not np.any(slopes[PROMPT]["p"][:L - LAST])
