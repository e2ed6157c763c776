"""The whole yardstick, on a model and a data set of no size: both sides run, and the table comes out."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from models.encoder_cases import BERT, VOCAB, Case, write
from parity import compare, yardstick

NEEDS = ("torch", "transformers", "peft", "flax", "tokenizers", "typer", "pydantic", "grain")
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")]

CASE = Case("bert-tiny", {**BERT, "model_type": "bert", "architectures": ["BertModel"]})
CONFIG = """
model: {{source: {folder}, dropout: 0.1}}
data: {{source: {folder}/rows.csv, classes: [even, odd], test: 20, validation: 10, max_length: 12, buckets: [8, 12]}}
rules: {{{rules}}}
train: {{epochs: 2, batch_size: 8, learning_rate: {rate}, eval_every: 4}}
"""
LORA = "layers/.*/kernel: {method: LoRA, rank: 2, alpha: 4}, "
HEAD = "(pooler|classifier)/.*: {method: Full}"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The configurations of the three methods, a checkpoint with a tokenizer, and rows."""
    import tokenizers

    folder = write(CASE, tmp_path / "model")
    named = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(4, VOCAB))]
    words = {word: i for i, word in enumerate(named)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    raw.save(str(folder / "tokenizer.json"))
    rng = np.random.RandomState(0)
    rows = [rng.randint(4, VOCAB, rng.randint(2, 10)).tolist() for _ in range(63)]
    lines = [f"{' '.join(f'w{i}' for i in row)},{row[0] % 2}" for row in rows]
    (folder / "rows.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    for name, rules, rate in (("", LORA + HEAD, 1e-2), ("_full", ".*: {method: Full}", 1e-3), ("_head", HEAD, 1e-2)):
        (tmp_path / f"tiny{name}.yaml").write_text(CONFIG.format(folder=folder, rules=rules, rate=rate))
    return tmp_path / "tiny.yaml"


def test_both_sides_and_the_table(config: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    command = [sys.executable, str(Path(yardstick.__file__)), "run", "--torch-python", sys.executable, "--config",
               str(config), "--work", str(work), "--seeds", "0", "--methods", "lora", "full", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {(r.side, r.method): r for r in yardstick.results(work)}
    assert set(found) == {(s, m) for s in compare.SIDES for m in ("lora", "full")}
    assert {(r.steps, len(r.correct), r.tests) for r in found.values()} == {(10, 20, found["peft", "lora"].tests)}
    for method in ("lora", "full"):
        assert found["jpeft", method].trainable == found["peft", method].trainable
    assert all(r.peak_bytes > 2**26 and r.step_ms > 0 for r in found.values())
    for line in ("lora  jpeft - peft", "jpeft lora - full", "peft  lora - full", "full  ms per step, median"):
        assert line in done.stdout
    times = {path: path.stat().st_mtime_ns for path in work.glob("*.json")}
    again = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert (again.returncode, again.stdout.splitlines()[-1]) == (0, done.stdout.splitlines()[-1])
    assert times == {path: path.stat().st_mtime_ns for path in work.glob("*.json")}
    settings = json.loads((work / "peft-lora-0.json").read_text())["about"]
    assert settings["learning_rate"] == 0.01
    merged_predicts_as_the_run(work, found["jpeft", "lora"].correct)


def merged_predicts_as_the_run(work: Path, correct: np.ndarray) -> None:
    """`jpeft merge` writes a folder that transformers loads, with the predictions of the run."""
    import transformers
    from parity import batchfile, torch_peft

    from jpeft.cli.main import main

    assert main(["merge", str(work / "runs" / "lora-0"), str(work / "merged")]) == 0
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        work / "merged", output_loading_info=True)
    assert not any(info[kind] for kind in info), info
    assert model.config.id2label == {0: "even", 1: "odd"}
    np.testing.assert_array_equal(torch_peft.right(model, batchfile.read(work / "batches-0.npz").test), correct)


def test_configurations_of_other_data_are_refused(config: Path, tmp_path: Path) -> None:
    full = tmp_path / "tiny_full.yaml"
    full.write_text(full.read_text().replace("test: 20", "test: 19"))
    done = subprocess.run([sys.executable, str(Path(yardstick.__file__)), "run", "--torch-python", "none", "--config",
                           str(config), "--work", str(tmp_path / "work")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "differ in data.test: not comparable" in done.stderr
