"""The two sides of the yardstick take the same steps: from equal parameters, without dropout, losses stay equal.

So a difference that the yardstick finds is not one of optimiser, schedule, weight decay, clipping or what is trained.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from models.encoder_cases import BERT, VOCAB, Case, write
from parity.batchfile import Batch, BatchFile

import jpeft
from jpeft.train.losses import classification
from jpeft.train.optimizer import Optimizer, make, schedule
from jpeft.train.state import create
from jpeft.train.step import compiled_step

NEEDS = ("torch", "transformers", "peft", "flax")
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")]

CASE = Case("bert-pair", {**BERT, "model_type": "bert", "architectures": ["BertModel"], "initializer_range": 0.3})
HEAD: dict[str, Any] = {"(pooler|classifier)/.*": jpeft.Full()}
RULES = {"lora": {"layers/.*/kernel": jpeft.LoRA(rank=4, alpha=8), **HEAD}, "full": {".*": jpeft.Full()}, "head": HEAD}
RATES = {"lora": 0.02, "full": 0.002, "head": 0.02}
# Large enough that a step without them, or with them elsewhere, shows at once.
SETTINGS = {"seed": 0, "classes": 2, "dropout": 0.0, "rank": 4, "alpha": 8, "weight_decay": 1.0, "clip": 0.5,
            "betas": [0.8, 0.95], "eps": 1e-4, "eval_every": None}
STORED = {"attention/query": "attention.self.query", "attention/key": "attention.self.key",
          "attention/value": "attention.self.value", "attention/out": "attention.output.dense",
          "mlp/up": "intermediate.dense", "mlp/down": "output.dense"}
STEPS = 12


def contents() -> BatchFile:
    """Batches of two widths whose label is the parity of the second token; every fourth has filler rows."""
    rng = np.random.RandomState(0)
    batches = []
    for i in range(STEPS):
        width, real = 6 + 3 * (i % 2), 5 if i % 4 == 3 else 8
        tokens = rng.randint(5, VOCAB, (8, width)).astype(np.int32)
        mask = (np.arange(width)[None] < rng.randint(3, width + 1, (8, 1))).astype(np.int32)
        index = np.where(np.arange(8) < real, np.arange(8) + 8 * i, -1).astype(np.int32)
        batches.append(Batch({"tokens": tokens * mask, "attention_mask": mask}, (tokens[:, 1] % 2).astype(np.int32),
                             (index >= 0).astype(np.float32), index))
    rate = schedule("linear", 1.0, 0.25, STEPS)
    return BatchFile(SETTINGS, np.array([float(rate(i)) for i in range(STEPS)]), tuple(batches), tuple(batches[:2]), ())


def ours(folder: Path, method: str, shared: BatchFile) -> tuple[dict, int, list[float]]:
    """Return what training starts from, the number of trainable parameters, and the losses."""
    from jpeft.interop.pretrained import from_pretrained

    model, params, _ = from_pretrained(folder, "classification", 2, dropout=0.0)
    first = shared.train[0].inputs
    plan = jpeft.plan(model.apply, params, (first["tokens"], first["attention_mask"]), RULES[method])
    trainable, frozen = jpeft.init(plan, params, jax.random.key(1))
    adapted = jpeft.adapt(model.apply, plan)

    def apply(trainable: Any, frozen: Any, tokens: Any, attention_mask: Any, key: Any = None) -> jax.Array:
        return adapted(trainable, frozen, tokens, attention_mask).logits

    s = shared.settings
    how = Optimizer("adamw", RATES[method], "linear", 0.25, s["weight_decay"], s["clip"], tuple(s["betas"]), s["eps"])
    tx, _ = make(how, STEPS, trainable, plan)
    step, state, losses = compiled_step(classification(apply), tx), create(trainable, tx, jax.random.key(2)), []
    for batch in shared.train:
        state, metrics = step(state, frozen, {**batch.inputs, "labels": batch.labels, "weights": batch.weights})
        losses.append(float(metrics["loss"]))
    return {"trainable": trainable, "params": params}, plan.count(), losses


def copy_start(model: Any, start: dict, method: str) -> None:
    """Give the torch model the classifier and the adapters that our side began with."""
    import torch

    state = {name.replace(".modules_to_save.default", ""): p for name, p in model.named_parameters()
             if ".original_module." not in name}
    prefix = "base_model.model." if method == "lora" else ""
    values = {f"{prefix}classifier.weight": np.asarray(start["params"]["classifier"]["kernel"]).T}
    for leaf, stored in STORED.items() if method == "lora" else ():
        theta = start["trainable"][f"layers/{leaf}/kernel"]
        for i in range(BERT["num_hidden_layers"]):
            name = f"{prefix}bert.encoder.layer.{i}.{stored}"
            a, b = np.asarray(theta["a"][i]), np.asarray(theta["b"][i])
            values[f"{name}.lora_A.default.weight"] = a.reshape(-1, a.shape[-1]).T
            values[f"{name}.lora_B.default.weight"] = b.reshape(len(b), -1).T
    with torch.no_grad():
        for name, value in values.items():
            assert state[name].shape == value.shape, name
            state[name].copy_(torch.tensor(value))


@pytest.mark.parametrize("method", list(RULES))
def test_losses_stay_equal_from_step_to_step(method: str, tmp_path: Path) -> None:
    from parity import torch_peft

    folder, shared = write(CASE, tmp_path), contents()
    start, count, losses = ours(folder, method, shared)
    model = torch_peft.build(folder, shared.settings, method, seed=0)
    copy_start(model, start, method)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert not [name for name in trained if "lora" in name and ("pooler" in name or "classifier" in name)]
    told = torch_peft.train(model, shared, RATES[method])
    assert max(losses) - min(losses) > 0.1
    np.testing.assert_allclose(told["losses"], losses, rtol=0, atol=1e-5)


def test_the_best_parameters_are_kept(tmp_path: Path) -> None:
    """With a rate that ruins the classifier, what is kept is what did best on the validation rows."""
    from parity import torch_peft

    shared = contents()
    shared = dataclasses.replace(shared, settings={**SETTINGS, "eval_every": 1})
    model = torch_peft.build(write(CASE, tmp_path), shared.settings, "full", seed=0)
    told = torch_peft.train(model, shared, 0.5)
    assert 0 < told["best_step"] < STEPS
    assert torch_peft.right(model, shared.validation).mean() == told["validation"]
