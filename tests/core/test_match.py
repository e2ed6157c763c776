"""Words in rules: which paths they mean, whatever joins the names of a path."""

from __future__ import annotations

import pytest

from jpeft.core.match import WORDS
from jpeft.core.site import Site


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("layers/0/attn/q_proj/kernel", {"all-linear", "attention"}),
        ("model.layers.0.self_attn.q_proj.weight", {"all-linear", "attention"}),
        ("layer_stack~1layer~1multi_head_attention~1query/w", {"all-linear", "attention"}),
        ("model.layers.0.mlp.up_proj.weight", {"all-linear", "mlp"}),
        ("transformer~1block_0~1mlp~1linear/w", {"all-linear", "mlp"}),
        ("lm_head.weight", set()),
        ("stem/kernel", {"all-linear"}),
    ],
)
def test_words_of_a_path(path: str, words: set[str]) -> None:
    site = Site(path, (8, 4), "float32", "linear", (0,), (1,))
    assert {word for word, means in WORDS.items() if means(site)} == words
