"""LoRA on all linears of every family that can be read: what `explain` says, and the traced program itself."""

from __future__ import annotations

from typing import Any

import jax
import pytest

pytest.importorskip("flax", reason="needs flax, which the models are written in")

from gallery.audit import dense_weights
from models import decoder_cases, encoder_cases, t5_cases

import jpeft
from jpeft.core.paths import flatten
from jpeft.interop.pretrained import FAMILIES

FIRST = {case.config["model_type"]: (module, case) for module in (decoder_cases, encoder_cases, t5_cases)
         for case in reversed(module.CASES)}
RULES = {"all-linear": jpeft.LoRA(rank=2)}


def test_every_family_has_a_case() -> None:
    assert set(FIRST) == set(FAMILIES)


@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=() if kind in ("llama", "t5", "bert") else pytest.mark.slow) for kind in sorted(FIRST)])
def test_no_weight_is_materialised_in_any_family(kind: str) -> None:
    module, case = FIRST[kind]
    labels = {"labels": 3} if case.task == "classification" else {}
    model = FAMILIES[kind].model(FAMILIES[kind].read(case.config, case.name, task=case.task, **labels))
    params, batch = model.shapes(), module.inputs(case)
    loss = {"causal-lm": {"labels": batch["tokens"]}, "seq2seq": {"labels": batch.get("decoder_tokens")}}.get(case.task)
    given = {**batch, **(loss or {})}

    def apply(params: Any, tokens: jax.Array) -> Any:
        out = model.apply(params, **{**given, "tokens": tokens})
        return (out.hidden, out.logits) if loss is None else out.loss

    plan = jpeft.plan(apply, params, (batch["tokens"],), RULES)
    rows = jpeft.explain(plan).rows
    assert {row.rule.split()[0].rstrip(":,") for row in rows} == {"fused"}
    sites = jpeft.inspect(apply, params, (batch["tokens"],))
    assert {row.path for row in rows} == {path for path in flatten(params)[0] if path.endswith("/kernel")
                                          and "lm_head" not in path and sites[path].use != "unused"}
    trainable, frozen = jax.eval_shape(lambda key, p: jpeft.init(plan, p, key), jax.random.key(0), params)
    assert dense_weights(jpeft.adapt(apply, plan), trainable, frozen, batch["tokens"]) == []
