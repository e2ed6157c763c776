"""Small random T5 models: their checkpoint folders, written with numpy alone, and inputs for them.

`python tests/models/t5_cases.py` (torch and transformers installed) records what transformers computes on them in
`golden/t5.npz`. The stored names are written down here from the format itself, not from the tables of jpeft.
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

GOLDEN = Path(__file__).parent / "golden" / "t5.npz"
VOCAB, ROWS, LENGTH, WRITTEN = 24, 2, 14, 9
BASE = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 5, "d_ff": 20, "num_heads": 3, "num_layers": 2,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 9, "is_encoder_decoder": True,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}


@dataclasses.dataclass(frozen=True)
class Case:
    """One checkpoint and one call.

    Attributes:
        name: of the row.
        config: `config.json`.
        padding: of the encoded text: "right", "left" or None.
        head: whether a head is stored beside the words.
    """

    name: str
    config: dict[str, Any]
    padding: str | None = "right"
    head: bool = False

    @property
    def architecture(self) -> str:
        return str(self.config["architectures"][0])

    @property
    def task(self) -> str:
        return "hidden" if self.architecture.endswith("Model") else "seq2seq"


def _case(name: str, kind: str, padding: str | None, end: str = "ForConditionalGeneration", head: bool = False,
          **config: Any) -> Case:
    architecture = {"t5": "T5", "mt5": "MT5"}[kind] + end
    return Case(name, {**BASE, "model_type": kind, "architectures": [architecture], **config}, padding, head)


CASES = [
    _case("t5", "t5", None, num_decoder_layers=3, feed_forward_proj="relu"),
    _case("t5-left", "t5", "left", relative_attention_num_buckets=32, relative_attention_max_distance=128),
    _case("t5-model", "t5", "right", "Model"),
    _case("flan", "t5", "right", head=True, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    _case("t5-silu", "t5", "right", feed_forward_proj="gated-silu", d_kv=8, num_heads=2, scale_decoder_outputs=False,
          tie_word_embeddings=True),
    _case("mt5", "mt5", "left", head=True, tie_word_embeddings=False),
]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    c = case.config
    width, inner = c["d_model"], c["d_kv"] * c["num_heads"]
    found: dict[str, tuple[int, ...]] = {"shared.weight": (VOCAB, width)}
    default = "relu" if c["model_type"] == "t5" else "gated-gelu"
    into = ("wi_0", "wi_1") if c.get("feed_forward_proj", default).startswith("gated") else ("wi",)
    for side, layers in (("encoder", c["num_layers"]), ("decoder", c.get("num_decoder_layers", c["num_layers"]))):
        found[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (
            c["relative_attention_num_buckets"], c["num_heads"])
        found[f"{side}.final_layer_norm.weight"] = (width,)
        for i in range(layers):
            kinds = ["SelfAttention"] + ["EncDecAttention"] * (side == "decoder")
            for j, kind in enumerate(kinds):
                at = f"{side}.block.{i}.layer.{j}"
                found |= {f"{at}.{kind}.{x}.weight": (inner, width) for x in "qkv"}
                found |= {f"{at}.{kind}.o.weight": (width, inner), f"{at}.layer_norm.weight": (width,)}
            at = f"{side}.block.{i}.layer.{len(kinds)}"
            found |= {f"{at}.DenseReluDense.{x}.weight": (c["d_ff"], width) for x in into}
            found |= {f"{at}.DenseReluDense.wo.weight": (width, c["d_ff"]), f"{at}.layer_norm.weight": (width,)}
    return {**found, "lm_head.weight": (VOCAB, width)} if case.head else found


def tensors(case: Case) -> dict[str, np.ndarray]:
    """Make the stored tensors of a case, each from a seed of its own name."""
    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = np.random.RandomState(zlib.crc32(f"{case.name}:{name}".encode())).standard_normal(shape)
        return (1.0 + 0.2 * values if "norm" in name else 0.3 * values).astype(np.float32)

    return {name: one(name, shape) for name, shape in shapes(case).items()}


def write(case: Case, folder: Path) -> Path:
    """Write the checkpoint folder of a case."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config))
    safetensors.numpy.save_file(tensors(case), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Make a batch of two rows, the second of them padded, under the names of `model.apply`."""
    rng = np.random.RandomState(7)
    tokens = rng.randint(3, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    written = rng.randint(3, VOCAB, (ROWS, WRITTEN)).astype(np.int32)
    batch = {"tokens": tokens, "decoder_tokens": written}
    if case.padding is not None:
        mask = np.ones((ROWS, LENGTH), np.int32)
        mask[1, slice(LENGTH - 4, LENGTH) if case.padding == "right" else slice(0, 4)] = 0
        batch |= {"tokens": np.where(mask == 1, tokens, 0).astype(np.int32), "attention_mask": mask}
    return batch


def labels(case: Case) -> np.ndarray:
    wanted = np.random.RandomState(8).randint(3, VOCAB, (ROWS, WRITTEN)).astype(np.int32)
    wanted[0, 2] = wanted[1, -3:] = -100
    return wanted


def torch_model(case: Case, folder: Path) -> Any:
    """Load a folder in transformers; it has to hold every tensor that the architecture wants and no other."""
    import torch
    import transformers

    model, info = getattr(transformers, case.architecture).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32)
    assert not any(info[kind] for kind in info), info
    return model.eval()


def torch_outputs(case: Case, folder: Path) -> dict[str, np.ndarray]:
    """Return "hidden" and, if there is a head, "logits", and "loss" of the labels alone."""
    import torch

    batch = {k: torch.tensor(v).long() for k, v in inputs(case).items()}
    text = {"input_ids": batch["tokens"], "attention_mask": batch.get("attention_mask")}
    model = torch_model(case, folder)
    with torch.no_grad():
        out = model(**text, decoder_input_ids=batch["decoder_tokens"], output_hidden_states=True)
        if case.task == "hidden":
            return {"hidden": out.last_hidden_state.numpy()}
        loss = model(**text, labels=torch.tensor(labels(case)).long()).loss
    return {"hidden": out.decoder_hidden_states[-1].numpy(), "logits": out.logits.numpy(), "loss": loss.numpy()}


def main() -> None:
    import tempfile

    recorded = {}
    with tempfile.TemporaryDirectory() as home:
        for case in CASES:
            out = torch_outputs(case, write(case, Path(home) / case.name))
            recorded |= {f"{case.name}/{name}": value for name, value in out.items()}
    np.savez_compressed(GOLDEN, **recorded)
    print(f"{len(recorded)} arrays, {GOLDEN.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
