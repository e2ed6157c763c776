"""Small random encoders of every family: their checkpoint folders, written with numpy alone, and inputs for them.

`python tests/models/encoder_cases.py` (torch and transformers installed) records what transformers computes on them in
`golden/encoder.npz`. The stored names are written down here from the format itself, not from the tables of jpeft.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

GOLDEN = Path(__file__).parent / "golden" / "encoder.npz"
D, F, H, VOCAB = 16, 24, 2, 40
BERT = {"vocab_size": VOCAB, "hidden_size": D, "intermediate_size": F, "num_attention_heads": H, "num_hidden_layers": 3,
        "max_position_embeddings": 12, "type_vocab_size": 2}
DISTIL = {"vocab_size": VOCAB, "dim": D, "hidden_dim": F, "n_heads": H, "n_layers": 2, "max_position_embeddings": 12}


@dataclasses.dataclass(frozen=True)
class Case:
    """One checkpoint and one call.

    Attributes:
        name: of the row.
        config: `config.json`.
        padding: "right", "left" or None.
        token_types: whether the call passes token types.
        atol: closeness to transformers, absolute, in float32.
    """

    name: str
    config: dict[str, Any]
    padding: str | None = "right"
    token_types: bool = False
    atol: float = 1e-5

    @property
    def kind(self) -> str:
        return str(self.config["model_type"])

    @property
    def architecture(self) -> str:
        return str(self.config["architectures"][0])

    @property
    def task(self) -> str:
        ends = {"Model": "hidden", "ForSequenceClassification": "classification",
                "ForTokenClassification": "token-classification"}
        return next(task for end, task in ends.items() if self.architecture.endswith(end))


def _case(name: str, kind: str, architecture: str, padding: str | None = "right", token_types: bool = False,
          labels: int = 0, **config: Any) -> Case:
    base = DISTIL if kind == "distilbert" else BERT
    named = {"id2label": {str(i): f"L{i}" for i in range(labels)}, "label2id": {f"L{i}": i for i in range(labels)}}
    whole = {**base, "model_type": kind, "architectures": [architecture], **(named if labels else {}), **config}
    return Case(name, whole, padding, token_types)


CASES = (
    _case("bert", "bert", "BertModel", None),
    _case("bert-left", "bert", "BertModel", "left", token_types=True, hidden_act="relu"),
    _case("bert-class", "bert", "BertForSequenceClassification", token_types=True, labels=3, hidden_act="gelu_new"),
    _case("bert-tokens", "bert", "BertForTokenClassification", "left", labels=5, layer_norm_eps=1e-5),
    _case("bert-wide", "bert", "BertModel", num_attention_heads=4, intermediate_size=12, hidden_act="silu",
          num_hidden_layers=1, type_vocab_size=3, token_types=True),
    _case("roberta", "roberta", "RobertaModel", max_position_embeddings=14, type_vocab_size=1, pad_token_id=1),
    _case("roberta-left", "roberta", "RobertaModel", "left", max_position_embeddings=14, type_vocab_size=1,
          pad_token_id=3),
    _case("roberta-class", "roberta", "RobertaForSequenceClassification", labels=2, max_position_embeddings=14,
          type_vocab_size=1),
    _case("roberta-tokens", "roberta", "RobertaForTokenClassification", labels=4, max_position_embeddings=14,
          type_vocab_size=2, token_types=True),
    _case("xlm-roberta-class", "xlm-roberta", "XLMRobertaForSequenceClassification", labels=3, type_vocab_size=1,
          max_position_embeddings=14),
    _case("distilbert", "distilbert", "DistilBertModel", "left", activation="relu"),
    _case("distilbert-class", "distilbert", "DistilBertForSequenceClassification", labels=3),
    _case("distilbert-tokens", "distilbert", "DistilBertForTokenClassification", labels=3, sinusoidal_pos_embds=True),
)


def _linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (D,), f"{name}.bias": (D,)}


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Return the stored names and shapes of a case."""
    c, distil = case.config, case.kind == "distilbert"
    inner = c["hidden_dim" if distil else "intermediate_size"]
    body = {"embeddings.word_embeddings.weight": (VOCAB, D),
            "embeddings.position_embeddings.weight": (c["max_position_embeddings"], D), **_norm("embeddings.LayerNorm")}
    if not distil:
        body["embeddings.token_type_embeddings.weight"] = (c["type_vocab_size"], D)
    for i in range(c["n_layers" if distil else "num_hidden_layers"]):
        at = f"transformer.layer.{i}" if distil else f"encoder.layer.{i}"
        names = "q_lin k_lin v_lin out_lin" if distil else "self.query self.key self.value output.dense"
        for name in names.split():
            body |= _linear(f"{at}.attention.{name}", D, D)
        body |= _linear(f"{at}.ffn.lin1" if distil else f"{at}.intermediate.dense", inner, D)
        body |= _linear(f"{at}.ffn.lin2" if distil else f"{at}.output.dense", D, inner)
        norms = "sa_layer_norm output_layer_norm" if distil else "attention.output.LayerNorm output.LayerNorm"
        for name in norms.split():
            body |= _norm(f"{at}.{name}")
    roberta, labels = "roberta" in case.kind, len(c.get("id2label", ()))
    if not distil and (case.task == "hidden" or (case.task == "classification" and not roberta)):
        body |= _linear("pooler.dense", D, D)
    if case.task == "hidden":
        return body
    prefix = "distilbert." if distil else "roberta." if roberta else "bert."
    head = _linear("classifier", labels, D)
    if case.task == "classification" and distil:
        head |= _linear("pre_classifier", D, D)
    elif case.task == "classification" and roberta:
        head = {**_linear("classifier.dense", D, D), **_linear("classifier.out_proj", labels, D)}
    return {**{prefix + name: shape for name, shape in body.items()}, **head}


def tensors(case: Case, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Make the stored tensors of a case, each from a seed of its own name."""
    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = np.random.RandomState(zlib.crc32(f"{case.name}:{name}".encode())).standard_normal(shape)
        norm = "LayerNorm.weight" in name or "layer_norm.weight" in name
        return (1 + 0.2 * values if norm else 0.3 * values).astype(dtype)

    return {name: one(name, shape) for name, shape in shapes(case).items()}


def write(case: Case, folder: Path) -> Path:
    """Write the checkpoint folder of a case."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config))
    safetensors.numpy.save_file(tensors(case), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Make a batch of three rows of 9 tokens, two of them padded, under the names of `model.apply`."""
    rng = np.random.RandomState(7)
    pad = case.config.get("pad_token_id", 1 if "roberta" in case.kind else 0)
    batch = {"tokens": rng.randint(5, VOCAB, (3, 9)).astype(np.int32)}
    if case.padding is not None:
        mask = np.ones((3, 9), np.int32)
        for row, n in ((1, 2), (2, 5)):
            mask[row, slice(9 - n, 9) if case.padding == "right" else slice(0, n)] = 0
        batch = {"tokens": np.where(mask == 1, batch["tokens"], pad).astype(np.int32), "attention_mask": mask}
    if case.token_types:
        batch["token_types"] = rng.randint(0, case.config["type_vocab_size"], (3, 9)).astype(np.int32)
    return batch


def torch_outputs(case: Case, folder: Path, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what transformers computes from a folder: "hidden" and, if there are any, "logits" and "pooled".

    The folder has to hold every tensor that the architecture wants and no other.
    """
    import torch
    import transformers

    model, info = getattr(transformers, case.architecture).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32)
    assert not any(info[kind] for kind in info), info
    names = {"tokens": "input_ids", "attention_mask": "attention_mask", "token_types": "token_type_ids"}
    model.eval()
    with torch.no_grad():
        out = model(**{names[k]: torch.tensor(v).long() for k, v in batch.items()}, output_hidden_states=True)
    found = {"hidden": out.hidden_states[-1], "logits": getattr(out, "logits", None),
             "pooled": getattr(out, "pooler_output", None)}
    return {name: value.numpy() for name, value in found.items() if value is not None}


def main() -> None:
    import tempfile

    recorded = {}
    with tempfile.TemporaryDirectory() as home:
        for case in CASES:
            out = torch_outputs(case, write(case, Path(home) / case.name), inputs(case))
            recorded |= {f"{case.name}/{name}": value for name, value in out.items()}
    np.savez_compressed(GOLDEN, **recorded)
    print(f"{len(recorded)} arrays, {GOLDEN.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
