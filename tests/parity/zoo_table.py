"""The parity table of the zoo: every family against transformers on torch, as Markdown on stdout.

    python tests/parity/zoo_table.py             # all families; a few minutes on two cores
    python tests/parity/zoo_table.py llama t5    # some

Runs the cases of `tests/models` (small random checkpoints) in both libraries, in float32, and prints the largest
absolute error. Gradients are those of the loss with respect to every stored tensor, relative to the largest entry of
that tensor's gradient where it is above 1. Ends with status 1 if an error is above 1e-4. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from models import decoder_cases, encoder_cases, t5_cases, test_decoder_parity, test_t5
from support import quick_compile

from jpeft.interop.checkpoint import unload
from jpeft.interop.pretrained import FAMILIES, from_pretrained

BOUND = 1e-4
RENAMED = (("", ""), (r"block_sparse_moe\.", "mlp."), (r"^embed_out\.", "lm_head."))
"""How transformers calls in memory what it stores under another name."""
OUTPUTS = ("hidden", "logits", "pooled", "loss", "cached", "gradients")
GROWING = ("llama-dynamic", "llama-longrope", "phi3-longrope")
"""Cases whose rotary frequencies depend on the length so far, so that a cache does not equal the whole."""

Errors = dict[str, float]


def error(ours: Any, theirs: np.ndarray, seen: Any = 1.0) -> float:
    """Return the largest absolute difference, where tokens are visible."""
    gap = np.abs((np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)) * seen)
    return float(gap.max()) if np.isfinite(gap).all() else float("inf")


def visible(batch: Mapping[str, np.ndarray], value: np.ndarray) -> Any:
    mask = batch.get("attention_mask")
    return 1.0 if mask is None or value.ndim < 3 or value.shape[:2] != mask.shape else mask[..., None]


def of_decoder(case: Any, folder: Path) -> tuple[Errors, Any]:
    model, params, _ = from_pretrained(folder)
    batch, theirs = decoder_cases.inputs(case), decoder_cases.torch_outputs(case, folder)
    target = decoder_cases.labels(case) if case.task == "causal-lm" else None
    ours = test_decoder_parity.compiled(test_decoder_parity.whole, model, params, batch, target)
    found = {name: error(ours[name], value, visible(batch, value)) for name, value in theirs.items()}
    if target is not None:
        if case.name not in GROWING:
            steps = test_decoder_parity.compiled(test_decoder_parity.in_steps, model, params, batch)
            found["cached"] = error(steps, theirs["hidden"], visible(batch, theirs["hidden"]))
        if case.padding == "left":
            target[1, 3] = -100  # what padding predicts is noise
        peer = decoder_cases.torch_model(case, folder)
        peer(**_torch(tokens=batch["tokens"], attention_mask=batch.get("attention_mask")),
             labels=torch.tensor(target).long()).loss.backward()
        found["gradients"] = gradients(model, params, peer, lambda p: model.apply(p, **batch, labels=target).loss)
    return found, model.config


def of_t5(case: Any, folder: Path) -> tuple[Errors, Any]:
    model, params, _ = from_pretrained(folder)
    batch, theirs = t5_cases.inputs(case), t5_cases.torch_outputs(case, folder)
    target = test_t5.target(case)
    ours = test_t5.compiled(test_t5.whole, model, params, batch, target)
    found = {name: error(ours[name], value) for name, value in theirs.items()}
    found["cached"] = error(test_t5.compiled(test_t5.in_steps, model, params, batch), theirs["hidden"])
    if target is not None:
        text = {name: value for name, value in batch.items() if name != "decoder_tokens"}
        peer = t5_cases.torch_model(case, folder)
        peer(**_torch(**text), labels=torch.tensor(target).long()).loss.backward()
        found["gradients"] = gradients(model, params, peer, lambda p: model.apply(p, **text, labels=target).loss)
    return found, model.config


def of_encoder(case: Any, folder: Path) -> tuple[Errors, Any]:
    model, params, _ = from_pretrained(folder)
    batch = encoder_cases.inputs(case)
    theirs = encoder_cases.torch_outputs(case, folder, batch)
    out = test_decoder_parity.compiled(lambda m, p, b: m.apply(p, **b), model, params, batch)
    found = {name: error(getattr(out, name), value, visible(batch, value)) for name, value in theirs.items()}
    if case.task.endswith("classification"):
        shape, classes = theirs["logits"].shape[:-1], theirs["logits"].shape[-1]
        target = np.random.RandomState(3).randint(0, classes, shape)

        def loss(params: Any) -> jax.Array:
            logs = jax.nn.log_softmax(model.apply(params, **batch).logits)
            return -jnp.take_along_axis(logs, target[..., None], -1).mean()

        peer = getattr(transformers, case.architecture).from_pretrained(folder, attn_implementation="eager",
                                                                        dtype=torch.float32).eval()
        logits = peer(**_torch(**batch)).logits
        torch.nn.functional.cross_entropy(logits.reshape(-1, classes), torch.tensor(target).reshape(-1)).backward()
        found["gradients"] = gradients(model, params, peer, loss)
    return found, model.config


def _torch(**batch: Any) -> dict[str, Any]:
    names = {"tokens": "input_ids", "token_types": "token_type_ids"}
    return {names.get(k, k): torch.tensor(v).long() for k, v in batch.items() if v is not None}


def gradients(model: Any, params: Any, peer: Any, loss: Any) -> float:
    """Return the largest error of all gradients, tensor by tensor under the stored names."""
    grads = jax.jit(jax.grad(loss), compiler_options=quick_compile())(params)
    infos, make = unload(grads, FAMILIES[json.loads(model.origin)["model_type"]].names(model.config), model.shapes())
    theirs, pad, worst = dict(_theirs(peer)), model.config.pad_id, 0.0
    for name in infos:
        want = theirs[next(new for new in (re.sub(*change, name) for change in RENAMED) if new in theirs)]
        mine = make(name).astype(np.float64)
        if mine.ndim == 2 and isinstance(pad, int) and "embed" in name and pad < len(want) and not want[pad].any():
            mine[pad] = 0  # torch leaves the gradient of the padding token out
        worst = max(worst, error(mine, want) / max(1.0, float(np.abs(want).max())))
    return worst


def _theirs(peer: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield torch's gradients under the stored names; transformers holds all experts of a layer in two tensors."""
    for name, parameter in peer.named_parameters():
        grad = np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
        stem, _, last = name.rpartition(".")
        if not stem.endswith("mlp.experts"):
            yield name, grad
            continue
        for number, one in enumerate(grad):
            parts = {"down_proj": one} if last == "down_proj" else dict(
                zip(("gate_proj", "up_proj"), np.split(one, 2), strict=True))
            for which, part in parts.items():
                yield f"{stem}.{number}.{which}.weight", part
                yield f"{stem}.{number}.{ {'gate_proj': 'w1', 'up_proj': 'w3', 'down_proj': 'w2'}[which]}.weight", part


KINDS = ((encoder_cases, of_encoder), (decoder_cases, of_decoder), (t5_cases, of_t5))


def features(case: Any, config: Any) -> list[str]:
    """Return what a case exercises, of what not every model has."""
    def has(name: str, off: Any = None) -> bool:
        return getattr(config, name, off) not in (off, None)

    kv, heads = getattr(config, "kv_heads", 0), config.heads
    rope = getattr(config, "rope", None)
    own = getattr(config, "head_size", 0) * heads != config.hidden_size
    found = {
        f"{case.padding} padding": case.padding is not None, "grouped heads": 0 < kv < heads, "own head size": own,
        "biases": has("qkv_bias", False), "tied head": has("tied", False),
        "scaled rope": rope is not None and rope.kind != "default",
        "partial rope": rope is not None and rope.fraction < 1, "windows": has("window"),
        "query-key norms": has("qk_norm", "none"), "soft caps": has("attention_cap") or has("logit_cap"),
        "experts": has("experts", 0), "gated MLP": getattr(config, "gated", False),
        "classes": case.task.endswith("classification"),
    }
    return [name for name, there in found.items() if there]


def table(rows: Mapping[str, Errors], columns: list[str]) -> list[str]:
    """Return a Markdown table of the largest errors."""
    def cell(value: float | None) -> str:
        return "" if value is None else ("0" if value == 0 else f"{value:.0e}")

    lines = [f"| family | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    return lines + [f"| {kind} | {' | '.join(cell(row.get(name)) for name in columns)} |" for kind, row in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="model_type of the families to run; all if left out")
    args = parser.parse_args()
    unknown = sorted(set(args.kinds) - set(FAMILIES))
    if unknown:
        raise SystemExit(f"{', '.join(unknown)} is no family; there are {', '.join(FAMILIES)}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    outputs: dict[str, Errors] = {}
    special: dict[str, Errors] = {}
    count = 0
    with tempfile.TemporaryDirectory() as home:
        for module, measure in KINDS:
            for case in module.CASES:
                kind = case.config["model_type"]
                if args.kinds and kind not in args.kinds:
                    continue
                found, config = measure(case, module.write(case, Path(home) / case.name))
                count += 1
                print(case.name, {name: f"{value:.1e}" for name, value in found.items()}, file=sys.stderr, flush=True)
                merge(outputs.setdefault(kind, {}), found)
                worst = max(value for name, value in found.items() if name != "gradients")
                merge(special.setdefault(kind, {}), dict.fromkeys(features(case, config), worst))
    every = sorted({name for row in special.values() for name in row})
    print(f"Largest absolute error against transformers {transformers.__version__} on torch {torch.__version__}, "
          f"float32, {count} small random checkpoints:\n")
    print("\n".join(table(outputs, [name for name in OUTPUTS if any(name in row for row in outputs.values())])))
    print("\nThe same by what the checkpoints exercise (hidden states, logits, loss, decoding with a cache):\n")
    print("\n".join(table(special, every)))
    worst = max(value for row in outputs.values() for value in row.values())
    print(f"\nThe largest of all is {worst:.1e}.")
    if not worst <= BOUND:
        raise SystemExit(f"an error of {worst:.1e} is above {BOUND:.0e}")


def merge(into: Errors, new: Errors) -> None:
    """Keep the larger error of each name."""
    into.update({name: max(value, into.get(name, 0.0)) for name, value in new.items()})


if __name__ == "__main__":
    main()
