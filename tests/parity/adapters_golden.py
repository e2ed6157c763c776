"""What AdapterHub's `adapters` computes on a small BERT: outputs and gradients, recorded.

`PYTHONPATH=tests python tests/parity/adapters_golden.py` writes `golden/adapters.npz`, where torch and `adapters` 1.3.0
(with transformers 4.57) are installed; the comparison itself, `test_adapters_golden.py`, needs neither. Every parameter
of an adapter is drawn from a seed of its own name. `gelu_new` is the activation that is called `gelu` here.
"""

from __future__ import annotations

import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from models.encoder_cases import BERT, Case, inputs, write

GOLDEN = Path(__file__).parent / "golden" / "adapters.npz"
CASE = Case("adapters", {**BERT, "num_hidden_layers": 2, "model_type": "bert", "architectures": ["BertModel"]})
NAME = "x"
PREFIX = {"flat": True, "prefix_length": 3}
PARALLEL = {"reduction_factor": 4, "scaling": 2.0}
ROWS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "houlsby": [("DoubleSeqBnConfig", {"reduction_factor": 4})],
    "pfeiffer": [("SeqBnConfig", {"reduction_factor": 4, "original_ln_before": False})],
    "adapter plus": [("SeqBnConfig", {"reduction_factor": 4, "original_ln_before": False, "scaling": "channel",
                                      "non_linearity": "gelu_new"})],
    "parallel": [("ParBnConfig", PARALLEL)],
    "learned": [("ParBnConfig", {"reduction_factor": 4, "scaling": "learned"})],
    "compacter": [("CompacterConfig", {"reduction_factor": 4, "phm_dim": 2, "non_linearity": "gelu_new"})],
    "prefix": [("PrefixTuningConfig", PREFIX)],
    "mam": [("PrefixTuningConfig", PREFIX), ("ParBnConfig", PARALLEL)],
}


def weights(shape: tuple[int, ...]) -> np.ndarray:
    """What the outputs are weighted with to make a loss."""
    return np.cos(np.arange(np.prod(shape))).reshape(shape).astype(np.float32)


def draw(row: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a parameter of an adapter."""
    seed = zlib.crc32(f"{row}:{name}".encode())
    return (0.4 * np.random.RandomState(seed).standard_normal(shape)).astype(np.float32)


def main() -> None:
    import adapters
    import torch
    import transformers

    recorded: dict[str, np.ndarray] = {}
    names = {"tokens": "input_ids", "attention_mask": "attention_mask"}
    batch = {names[k]: torch.tensor(v).long() for k, v in inputs(CASE).items()}
    with tempfile.TemporaryDirectory() as home:
        folder = write(CASE, Path(home) / "model")
        for row, parts in ROWS.items():
            model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager")
            adapters.init(model)
            made = [getattr(adapters, kind)(**fields) for kind, fields in parts]
            model.add_adapter(NAME, config=made[0] if len(made) == 1 else adapters.ConfigUnion(*made))
            model.train_adapter(NAME)
            model.eval()
            own = {name: p for name, p in model.named_parameters() if p.requires_grad}
            with torch.no_grad():
                for name, p in own.items():
                    p.copy_(torch.tensor(draw(row, name, tuple(p.shape))))
            out = model(**batch).last_hidden_state
            torch.sum(out * torch.tensor(weights(tuple(out.shape)))).backward()
            recorded[f"{row}|hidden"] = out.detach().numpy()
            for name, p in own.items():
                recorded[f"{row}|{name}"] = p.grad.numpy()
    np.savez_compressed(GOLDEN, **recorded)
    print(f"{len(recorded)} arrays, {GOLDEN.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
