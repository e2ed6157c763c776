"""Words in rules: which paths they mean, whatever joins the names of a path."""

from __future__ import annotations

import pytest

from jpeft.core.match import WORDS, resolve
from jpeft.core.site import Site
from jpeft.errors import MethodConfigError, NoMatchError
from jpeft.methods import Full, LoRA


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("layers/0/attn/q_proj/kernel", {"all-linear", "attention", "query"}),
        ("model.layers.0.self_attn.q_proj.weight", {"all-linear", "attention", "query"}),
        ("layer_stack~1layer~1multi_head_attention~1query/w", {"all-linear", "attention", "query"}),
        ("layers/attention/value/kernel", {"all-linear", "attention", "value"}),
        ("layers/attention/out/kernel", {"all-linear", "attention", "attention-out"}),
        ("decoder/layers/cross/out/kernel", {"all-linear", "attention", "attention-out"}),
        ("h/0/attn/c_attn/kernel", {"all-linear", "attention", "qkv"}),
        ("h/0/attn/c_proj/kernel", {"all-linear", "attention", "attention-out"}),
        ("h/0/mlp/c_proj/kernel", {"all-linear", "mlp", "down"}),
        ("encoder/block/0/layer/1/DenseReluDense/wo/kernel", {"all-linear", "mlp", "down"}),
        ("model.layers.0.mlp.up_proj.weight", {"all-linear", "mlp", "up"}),
        ("layers/mlp/gate_up/kernel", {"all-linear", "mlp", "gate-up"}),
        ("transformer~1block_0~1mlp~1linear/w", {"all-linear", "mlp"}),
        ("lm_head.weight", set()),
        ("stem/kernel", {"all-linear"}),
    ],
)
def test_words_of_a_path(path: str, words: set[str]) -> None:
    site = Site(path, (8, 4), "float32", "linear", (0,), (1,))
    assert {word for word, means in WORDS.items() if means(site)} == words


def test_words_for_parts_of_a_layer() -> None:
    def linear(path: str) -> Site:
        return Site(path, (16, 16), "float32", "linear", (0,), (1,))

    sites = {s.path: s for s in map(linear, ("attn/c_attn/kernel", "mlp/c_fc/kernel", "down"))}
    assert list(resolve({"qkv": LoRA(rank=2), "up": LoRA(rank=2), "down": Full()}, (), sites)) == list(sites)
    with pytest.raises(NoMatchError, match="'value' matches none of the 3 leaves; here it is a part of the word 'qkv'"):
        resolve({"value": LoRA(rank=2)}, (), sites)
    with pytest.raises(NoMatchError, match=r"'gate' matches none .*; contraction weights: nearest: "):
        resolve({"gate": LoRA(rank=2)}, (), sites)


def test_leaves_that_are_too_small_for_a_method_are_named() -> None:
    def linear(path: str, out: int) -> Site:
        return Site(path, (16, out), "float32", "linear", (0,), (1,))

    sites = {s.path: s for s in (linear("up/kernel", 32), linear("gate/kernel", 4), linear("classifier/kernel", 2))}
    with pytest.raises(MethodConfigError) as caught:
        resolve({"all-linear": LoRA(rank=8)}, (), sites)
    said = str(caught.value)
    assert "LoRA(rank=8) does not fit 'gate/kernel' of 16 inputs and 4 outputs" in said
    assert "the other 1 leaves of rule 'all-linear': pass exclude=['gate/kernel', 'classifier/kernel'], or give" in said
    assert list(resolve({"all-linear": LoRA(rank=8)}, ["gate/kernel", "classifier/kernel"], sites)) == ["up/kernel"]
    rules = {"(gate|classifier)/kernel": Full(), "all-linear": LoRA(rank=8)}
    assert set(resolve(rules, (), sites)) == set(sites)
    with pytest.raises(MethodConfigError, match=r"or exclude the leaf$"):
        resolve({"all-linear": LoRA(rank=99)}, (), sites)
