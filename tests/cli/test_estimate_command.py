"""The command `estimate`: what it asks, what it prints, and its mistakes, each of them one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jpeft.cli import estimate, estimate_worker
from jpeft.cli.estimated import lines
from jpeft.cli.main import main
from jpeft.cli.request import Request, checked, model_config, rules

Capture = pytest.CaptureFixture[str]
TINY: dict[str, Any] = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
                        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


@pytest.mark.parametrize(("words", "message"), [
    (["--model", "lama3:8B"], "the family 'lama3' is none of llama3 (nearest: 'llama3')"),
    (["--model", "llama3:9B"], "(nearest: "),
    (["--model", "nowhere"], "--model 'nowhere' is no file and no family:size"),
    (["--method", "lora:r"], "'r' is no field=value, as lora:r=16"),
    (["--method", "lorra:r=8"], "there is no method 'lorra' (nearest: 'lora'"),
    (["--method", "lora:rnk=8"], "unknown key 'rules.all-linear.rnk'; the nearest is 'rules.all-linear.rank'"),
    (["--method", "lora:r=-1"], "rank"),
    (["--method", "lora", "--method", "dora"], "have a method already; say others with on=pattern"),
    (["--mesh", "fdsp=8"], "has the axis 'fdsp', none of data, fsdp, tensor, expert, sequence (nearest: 'fsdp'"),
    (["--mesh", "fsdp=x"], "must give each axis once, with a number of devices"),
    (["--mesh", "fsdp=99999"], "at most 4096 are simulated"),
    (["--dtype", "bf17"], "--dtype 'bf17' is none of bfloat16, float16, float32"),
    (["--remat", "dot"], "--remat 'dot' is none of none, full, dots, names (nearest: 'dots')"),
    (["--attention", "flash"], "--attention 'flash' is none of scores, fused"),
    (["--optimizer", "adamv"], "--optimizer 'adamv' is none of adamw, adam, sgd, lion, adafactor, muon, schedule_free"),
    (["--chip", "H10"], "the chip 'H10' is none of H100, H200, B200, v5e, v5p, v6e (nearest: 'H100')"),
    (["--search"], "--search needs the memory of a device: --memory 80GB, or one --chip"),
    (["--search", "--memory", "80 gigs"], "--memory '80 gigs' is no number of bytes, as 80GB"),
    (["--search", "--memory", "80GB", "--batch", "8"], "--search looks for the batch, and --batch 8 is given"),
    (["--memory", "80GB"], "--memory is of --search; add it"),
    (["--batch", "0"], "--batch 0 must be 1 or more"),
])
def test_a_mistake_is_one_line(words: list[str], message: str, here: Path, capsys: Capture) -> None:
    model = [] if "--model" in words else ["--model", str(here)]
    assert main(["estimate", *model, *words]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_methods_as_words() -> None:
    assert rules(["full"]) == {".*": {"method": "Full", "keep_base": False}}
    assert rules(["LoRA:r=8,alpha=16,on=.*/(query|value)/kernel", "bitfit"]) == {
        ".*/(query|value)/kernel": {"method": "LoRA", "rank": 8, "alpha": 16}, "bias": {"method": "BitFit"}}
    assert rules(["prefixtuning:length=8"]) == {".*/(key|value)/kernel": {"method": "PrefixTuning", "length": 8}}


def test_a_config_file_or_its_folder(here: Path) -> None:
    assert model_config(str(here)) == model_config(str(here / "config.json")) == (TINY, str(here / "config.json"))


def request(**more: Any) -> Request:
    fields: dict[str, Any] = {"rules": rules(["lora:r=2"]), "mesh": {"fsdp": 2}, "batch": 2, "length": 16}
    return checked(Request(**{"config": TINY, "where": "config.json", **fields, **more}))


def test_the_answer_says_what_is_whose(monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(json.dumps(estimate_worker.answer(json.loads(json.dumps(vars(request()))))))
    assert found["batch"] == 2
    assert found["total"] == sum(found[k] for k in ("base", "adapters", "optimizer", "inputs", "activations"))
    text = "\n".join(lines(request(), found, ["H100", "v5e"]))
    for part in ("LoRA(rank=2) on all-linear", "2 x 16 tokens in bfloat16 on 2 devices (fsdp 2), remat dots",
                 "activations", "the compiler's", "all-gather", "H100", "tokens/s at most", "nothing was allocated"):
        assert part in text
    assert "v5p" not in text


def test_errors_of_the_process_that_compiles_come_through() -> None:
    found = estimate_worker.answer(vars(request(batch=3)))
    assert found["kind"] == "ShardingError"
    assert "3 rows" in found["error"]


@pytest.mark.slow
def test_the_command_prints_a_plan(here: Path, capsys: Capture) -> None:
    words = ["estimate", "--model", str(here), "--mesh", "fsdp=4,tensor=2", "--seq", "64"]
    assert main([*words, "--batch", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["devices"], found["batch"]) == (8, 4)
    assert main([*words, "--search", "--memory", "2MB"]) == 0
    assert "largest batch for 2.0 MB: " in capsys.readouterr().out
    assert main([*words, "--batch", "6"]) == 1
    assert "a batch has 6 rows" in capsys.readouterr().err
    assert estimate.run(request())["devices"] == 2
