"""What `zoo.py` measures of jpeft, one thing in one process; the last line of the output is JSON."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from parity.memory import Memory

import jpeft
from jpeft.interop.pretrained import from_pretrained, save_pretrained
from jpeft.interop.sources import resolve
from jpeft.models.decoder import Decoder
from jpeft.models.decoder_config import DecoderConfig
from jpeft.models.rope import Rope
from jpeft.serve.generate import Generator
from jpeft.train.state import create
from jpeft.train.step import make_train_step

PASSAGE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"


def small(layers: int) -> Decoder:
    return Decoder(DecoderConfig(vocab_size=1024, hidden_size=256, layers=layers, heads=4, kv_heads=2, head_size=64,
                                 mlp_size=512, positions=256, rope=Rope()))


def step_of(model: Decoder, params: Any, tokens: Any) -> tuple[Any, Any, Any]:
    """Return the training step that `jpeft train` would compile, its state, and the frozen half."""
    def loss(params: Any, tokens: Any) -> jax.Array:
        return model.apply(params, tokens, labels=tokens).loss

    plan = jpeft.plan(loss, params, (tokens,), {"all-linear": jpeft.LoRA(rank=16, alpha=32)})
    trainable, frozen = jpeft.init(plan, params, jax.random.key(0))
    adapted, tx = jpeft.adapt(loss, plan), optax.adamw(1e-3, weight_decay=0.0)
    step = make_train_step(lambda t, f, batch, key: (adapted(t, f, batch), {}), tx)
    return step, create(trainable, tx, jax.random.key(1)), frozen


def compile_step(layers: int) -> dict[str, Any]:
    model, tokens = small(layers), jnp.ones((4, 64), jnp.int32)
    params = jax.block_until_ready(model.init(jax.random.key(0)))
    step, state, frozen = step_of(model, params, tokens)
    start = time.perf_counter()
    lowered = step.lower(state, frozen, tokens)
    middle = time.perf_counter()
    lowered.compile()
    return {"trace": middle - start, "compile": time.perf_counter() - middle}


def load(source: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:  # imports, and what flax and jax keep of a first trace
        tiny = small(1)
        save_pretrained(folder, tiny, tiny.init(jax.random.key(0)))
        from_pretrained(folder)
    resolve(source)
    memory, start = Memory(), time.perf_counter()
    _, params, _ = from_pretrained(source)
    seconds = time.perf_counter() - start
    memory.stop()
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    return {"seconds": seconds, "growth": memory.growth, "model": sum(sizes), "leaf": max(sizes)}


def export(source: str, folder: Path, rows: int, prompt: int) -> dict[str, Any]:
    """Write a checkpoint in float32 and `prompts.npy`, for both sides."""
    model, params, tokenizer = from_pretrained(source, dtype="float32")
    save_pretrained(folder, model, params, tokenizer)
    assert tokenizer is not None
    ids = tokenizer.encode([PASSAGE.read_text(encoding="utf-8")])[0].ids
    np.save(folder / "prompts.npy", np.array([ids[100 * i:100 * i + prompt] for i in range(rows)], np.int32))
    return {"bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params))}


def train(folder: Path, rows: int, length: int, runs: int) -> dict[str, Any]:
    model, params, _ = from_pretrained(folder)
    tokens = jnp.asarray(np.random.RandomState(0).randint(0, model.config.vocab_size, (rows, length)), jnp.int32)
    memory = Memory()
    step, state, frozen = step_of(model, params, tokens)
    seconds, losses = [], []
    for _ in range(runs + 2):
        start = time.perf_counter()
        state, metrics = step(state, frozen, tokens)
        losses.append(float(metrics["loss"]))
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            memory.mark()
    memory.stop()
    return {"first": seconds[0], "seconds": seconds[2:], "losses": losses, "steps_peak": memory.last,
            "trainable": sum(x.size for x in jax.tree.leaves(state.trainable))}


def decode(folder: Path, new: int, runs: int) -> dict[str, Any]:
    model, params, _ = from_pretrained(folder)
    prompts, generator, seconds = np.load(folder / "prompts.npy").tolist(), Generator(model), []
    for _ in range(runs + 1):
        start = time.perf_counter()
        answers = generator(params, prompts, max_new_tokens=new, eos=())
        seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "seconds": seconds[1:], "tokens": [one.tokens for one in answers]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("compile", "load", "export", "train", "decode"))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--source", default="")
    parser.add_argument("--folder", type=Path)
    for name, value in (("rows", 4), ("length", 256), ("prompt", 32), ("new", 128), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    told = {"compile": lambda: compile_step(args.layers), "load": lambda: load(args.source),
            "export": lambda: export(args.source, args.folder, args.rows, args.prompt),
            "train": lambda: train(args.folder, args.rows, args.length, args.runs),
            "decode": lambda: decode(args.folder, args.new, args.runs)}[args.what]()
    print(json.dumps({**told, "about": f"jax {jax.__version__}, {jax.default_backend()} x {jax.device_count()}"}))


if __name__ == "__main__":
    main()
