"""A model with random weights whose tokens are characters: what training from scratch on a small corpus needs."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers
from jax.sharding import Mesh, PartitionSpec

from jpeft.core.paths import flatten
from jpeft.errors import ModelConfigError, nearest
from jpeft.interop.pretrained import FAMILIES
from jpeft.interop.tokenizer import MAIN, Tokenizer
from jpeft.models.model import Model, Params
from jpeft.models.sharding import placements

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
SPECIAL = {"pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN}


def tokenizer_of(texts: Iterable[str], max_length: int = 1_000_000) -> Tokenizer:
    """Make a tokenizer whose tokens are the characters of some texts; an end token stands behind a text.

    Example:
        >>> made = tokenizer_of(["abc"])
        >>> made.encode(["cab?"])[0].ids, made.decode([[5, 3, 4, 1]])
        ([5, 3, 4, 2, 1], ['cab'])
    """
    kept = sorted(set().union(*texts))
    numbers = {token: i for i, token in enumerate([*SPECIAL.values(), *kept])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, UNKNOWN))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    raw.decoder = tokenizers.decoders.Fuse()
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single=["$A:0", END], pair=["$A:0", END, "$B:1", f"{END}:1"], special_tokens=[(END, numbers[END])])
    raw.add_special_tokens(list(SPECIAL.values()))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **SPECIAL}
    files = {MAIN: raw.to_str(pretty=True).encode(),
             "tokenizer_config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}
    return Tokenizer(raw, numbers[PAD], max_length, False, {role: numbers[one] for role, one in SPECIAL.items()}, files)


def fresh(said: dict[str, Any], tokenizer: Tokenizer, task: str, *, seed: int, dtype: Any = None,
          compute_dtype: Any = None, remat: str = "none", dropout: float | None = None,
          mesh: Mesh | None = None, shardings: Mapping[str, PartitionSpec] | None = None) -> tuple[Model, Params]:
    """Return a model with random weights.

    Args:
        said: keys of a `config.json`; those that the tokenizer decides on are filled in.
        tokenizer: of `tokenizer_of`.
        task: what the model is for.
        seed: of the weights.
        dtype: of the params; None: float32.
        compute_dtype: of compute; None: that of the params.
        remat: what layers keep for the backward pass.
        dropout: sets every dropout rate; None: as `said`.
        mesh, shardings: where the weights are made, as of `jpeft.from_pretrained`.

    Raises:
        ModelConfigError: the keys make no model of this task.
        ShardingError: the mesh or the shardings do not fit the model.
    """
    known = [kind for kind, family in FAMILIES.items() if task in family.tasks]
    kind = said.get("model_type")
    if kind not in known:
        raise ModelConfigError(f"model.source.model_type = {kind!r} is no model for the task {task!r}; it must be one "
                               f"of {', '.join(known)} ({nearest(str(kind), known, 1)})")
    special = tokenizer.special
    raw = {**said, "vocab_size": tokenizer.raw.get_vocab_size(), "pad_token_id": special["pad_token"],
           "eos_token_id": special["eos_token"], "decoder_start_token_id": special["pad_token"]}
    family = FAMILIES[kind]
    rates = {} if dropout is None else dict.fromkeys(family.rates, dropout)
    config = family.read(raw, "model.source", **rates, task=task)
    model = family.model(config, None if compute_dtype is None else jnp.dtype(compute_dtype), remat,
                         origin=json.dumps(raw), notes=(f"random weights, with seed {seed}",))
    made = functools.partial(model.init, dtype=jnp.dtype(dtype or jnp.float32))
    if mesh is None:
        return model, made(jax.random.key(seed))
    paths, _, treedef = flatten(shapes := model.shapes())
    placed = placements(shapes, mesh, shardings)
    where = treedef.unflatten([placed.shardings[path] for path in paths])
    return (dataclasses.replace(model, notes=(*model.notes, *placed.notes)),
            jax.jit(made, out_shardings=where)(jax.random.key(seed)))
