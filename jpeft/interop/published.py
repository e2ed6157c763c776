"""Published model configurations by name, for those who have no `config.json` at hand. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jpeft.errors import ModelConfigError, nearest


def _llama3(width: int, mlp: int, layers: int, heads: int, factor: float, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": width, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8, "hidden_act": "silu",
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "rope_scaling": {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192}, **more}


PUBLISHED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    # arXiv 2407.21783, table 3 (8B, 70B, 405B); the model cards of Llama 3.2 (1B, 3B)
    "llama3": {
        "1B": _llama3(2048, 8192, 16, 32, 32.0, head_dim=64, tie_word_embeddings=True),
        "3B": _llama3(3072, 8192, 28, 24, 32.0, head_dim=128, tie_word_embeddings=True),
        "8B": _llama3(4096, 14336, 32, 32, 8.0),
        "70B": _llama3(8192, 28672, 80, 64, 8.0),
        "405B": _llama3(16384, 53248, 126, 128, 8.0),
    },
}


def published(name: str) -> dict[str, Any]:
    """Return the `config.json` of a model by family and size.

    Raises:
        ModelConfigError: there is no such family, or no such size of it.

    Example:
        >>> published("llama3:8B")["hidden_size"]
        4096
    """
    family, _, size = name.partition(":")
    if family.lower() not in PUBLISHED:
        raise ModelConfigError(f"the family {family!r} is none of {', '.join(PUBLISHED)} "
                               f"({nearest(family, PUBLISHED, 1)}); or give the path of a config.json")
    sizes = PUBLISHED[family.lower()]
    if size.upper() not in sizes:
        raise ModelConfigError(f"the size {size!r} of {family} is none of {', '.join(sizes)} "
                               f"({nearest(size, sizes, 1)}), as {family}:{next(iter(sizes))}")
    return dict(sizes[size.upper()])
