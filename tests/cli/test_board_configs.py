"""The shipped boards: every method has an entry or a reason, and every entry fits its real model (shapes alone)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("pydantic", reason="needs the packages of jpeft[train]")

from jpeft.cli.board import config
from jpeft.cli.board.config import Run
from jpeft.cli.rules import METHODS, rates, to_methods, tokens_for
from jpeft.core import planning
from jpeft.models.decoder import Decoder
from jpeft.models.decoder_config import DecoderConfig
from jpeft.models.encoder import Encoder, EncoderConfig
from jpeft.models.rope import Rope

ROOT = Path(__file__).resolve().parents[2]
BOARDS = sorted((ROOT / "configs").glob("compare_*.yaml"))
MINILM, SMOLLM2 = (config.load(ROOT / "configs" / f"compare_{name}.yaml") for name in ("minilm", "smollm2"))
WHOLE = {"full", "diff_pruning"}  # entries that are not small


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_board_parses_and_says_how_to_run_it(path: Path) -> None:
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    assert first == f"# jpeft compare {path.relative_to(ROOT)}"
    assert second.startswith("# Expect: ")
    assert second.endswith(".")
    board = config.load(path)
    assert board.name == path.stem
    assert all(job.model.sha256 and job.data.sha256 for job in board.jobs.values())


def test_every_method_is_on_the_board_or_has_a_reason() -> None:
    there, without = config.methods(MINILM.config), set(MINILM.config.without)
    assert there | without == set(METHODS)
    assert not there & without
    assert MINILM.config.seeds == [0, 1, 2]
    assert list(MINILM.config.tasks) == ["rotten_tomatoes", "newsgroups"]


def test_rates_are_what_the_methods_recommend() -> None:
    """But for full fine-tuning, whose rate depends on the size of the model, and those that longer runs hold back."""
    own = {name for name, entry in MINILM.config.entries.items() if entry.learning_rate is not None}
    assert own == {"full", "lora", "dora", "lora_fa", "vera", "kasa", "oft", "boft", "road", "c3a", "shira", "prefix",
                   "houlsby", "pfeiffer", "adapter_plus", "mam", "chain", "unipelt"}
    job = MINILM.jobs[Run("newsgroups", "hra", 2)]
    assert (job.seed, job.train.learning_rate) == (2, METHODS["HRA"].recommended_lr)


def test_rows_of_the_tasks_are_those_of_all_runs() -> None:
    data = {run.task: [job.data for other, job in MINILM.jobs.items() if other.task == run.task]
            for run in MINILM.jobs}
    for some in data.values():
        assert all(one == some[0] for one in some)


@pytest.fixture(scope="module")
def encoder() -> tuple[Any, Any]:
    model = Encoder(EncoderConfig(vocab_size=30522, hidden_size=384, layers=6, heads=12, mlp_size=1536, positions=512,
                                  token_types=2, task="classification", labels=2))
    return model, jax.eval_shape(lambda: model.init(jax.random.key(0)))


@pytest.mark.parametrize("entry", [
    pytest.param(name, marks=() if name in ("head", "lora", "prefix") else pytest.mark.slow)
    for name in MINILM.config.entries])
def test_entry_fits_minilm_and_is_small(entry: str, encoder: tuple[Any, Any]) -> None:
    model, params = encoder
    rules = MINILM.jobs[Run("rotten_tomatoes", entry, 0)].rules
    methods = to_methods(rules)
    ids = jax.ShapeDtypeStruct((4, 8), jnp.int32)

    def logits(params: Any, tokens: Any, attention_mask: Any, token_types: Any) -> Any:
        return model.apply(params, tokens, attention_mask, token_types).logits

    made = planning.plan(logits, params, (ids,), methods, example_kwargs={"attention_mask": ids, "token_types": ids},
                         tokens=tokens_for(methods, True))
    assert rates(rules, made)["pooler/kernel"] == 1e-3
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert total == 22_713_986
    assert (made.count() < 0.02 * total) == (entry not in WHOLE)


def test_smollm2_has_the_methods_of_a_causal_model() -> None:
    assert config.methods(SMOLLM2.config) == {
        "LoRA", "DoRA", "IA3", "PrefixTuning", "PromptTuning", "Houlsby", "OFT", "VeRA", "LayerNormTuning"}


@pytest.mark.parametrize("entry", [
    pytest.param(name, marks=() if name == "ia3" else pytest.mark.slow) for name in SMOLLM2.config.entries])
def test_entry_fits_smollm2(entry: str) -> None:
    model = Decoder(DecoderConfig(vocab_size=49152, hidden_size=576, layers=30, heads=9, kv_heads=3, head_size=64,
                                  mlp_size=1536, positions=8192, rope=Rope(), tied=True))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    methods = to_methods(SMOLLM2.jobs[Run("sentiment", entry, 0)].rules)
    ids, weights = (jax.ShapeDtypeStruct((4, 8), dtype) for dtype in (jnp.int32, jnp.float32))
    packed = {} if any(m.virtual_tokens for m in methods.values()) else {"positions": ids, "segment_ids": ids}

    def loss(params: Any, tokens: Any, **named: Any) -> Any:
        return model.apply(params, tokens, **named).loss

    made = planning.plan(loss, params, (ids,), methods, tokens=tokens_for(methods, False), example_kwargs={
        "attention_mask": ids, **packed, "labels": ids, "label_weights": weights})
    assert 0 < made.count() < 0.03 * sum(leaf.size for leaf in jax.tree.leaves(params))
