"""Tokenizers out of GGUF files: two kinds, what damages them, and the library that trains one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs gguf, which reads the files")
pytest.importorskip("tokenizers", reason="needs tokenizers, which the tokenizer is rebuilt with")

from interop.ggufs import write

from jpeft.errors import CheckpointError
from jpeft.interop.gguf_models import read_gguf
from jpeft.interop.tokenizer import Tokenizer, read


def byte_level() -> dict[str, Any]:
    """A byte-level vocabulary: all bytes, a few merges, control tokens behind them."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3", "Ċ Ċ", "! !"]
    tokens = [*alphabet, *(m.replace(" ", "") for m in merges), "<s>", "</s>", "<user>"]
    kinds = [1] * (len(tokens) - 3) + [3, 3, 4]
    return {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "kinds": kinds, "merges": merges,
            "bos": tokens.index("<s>"), "eos": tokens.index("</s>")}


def pieces() -> dict[str, Any]:
    """A sentencepiece vocabulary with byte fallback."""
    words = ["▁", "h", "e", "l", "o", "w", "he", "ll", "hell", "hello", "▁hello", "▁h"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))]
    return {"model": "llama", "tokens": tokens, "kinds": [2, 3, 3] + [6] * 256 + [1] * len(words), "scores": scores,
            "bos": 1, "eos": 2, "unk": 0}


def tokens_into(said: dict[str, Any]) -> Callable[[Any], None]:
    def finish(writer: Any) -> None:
        writer.add_tokenizer_model(said["model"])
        if "pre" in said:
            writer.add_tokenizer_pre(said["pre"])
        writer.add_token_list(said["tokens"])
        writer.add_token_types(said["kinds"])
        if "merges" in said:
            writer.add_token_merges(said["merges"])
        if "scores" in said:
            writer.add_token_scores(said["scores"])
        for name in ("bos", "eos", "unk", "pad"):
            if name in said:
                getattr(writer, f"add_{name}_token_id")(said[name])
        for name in ("bos_token", "eos_token", "space_prefix"):
            if f"add_{name}" in said:
                getattr(writer, f"add_add_{name}")(said[f"add_{name}"])
        if "template" in said:
            writer.add_chat_template(said["template"])
    return finish


def tokenizer(path: Path, said: dict[str, Any]) -> Tokenizer:
    values = {"model.embed_tokens.weight": np.zeros((len(said["tokens"]) + 3, 64), np.float32)}
    found = read_gguf(write(path, values=values, finish=tokens_into(said))).tokenizer
    assert found is not None
    return found


def test_byte_level_tokenizer(tmp_path: Path) -> None:
    found = tokenizer(tmp_path / "m.gguf", byte_level())
    texts = ["hello 123 wow!!", " Grüße\n\n", "naïve 東京 🙂", "a<s>b<user>c"]
    rows = found.encode(texts)
    assert rows[0].tokens == ["hello", "Ġ", "123", "Ġw", "o", "w", "!!"]
    assert "<s>" in rows[3].tokens
    assert "<user>" in rows[3].tokens
    assert [found.decode([row.ids], special=True)[0] for row in rows] == texts
    assert found.decode([rows[3].ids]) == ["ab<user>c"]
    assert (found.special, found.pad_id) == ({"bos_token": 265, "eos_token": 266}, 266)


@pytest.mark.parametrize(("pre", "text", "want"), [
    ("gpt-2", "x 123", ["x", "Ġ", "123"]),
    ("smollm", "x 123", ["x", "Ġ", "1", "2", "3"]),
    ("llama-bpe", "x 1234", ["<s>", "x", "Ġ", "123", "4"]),
    ("qwen2", "x 1234", ["x", "Ġ", "1", "2", "3", "4"]),
    ("gpt-2", "I'LL\n\n!", ["I", "'", "L", "L", "Ċ", "Ċ", "!"]),
    ("llama-bpe", "!\n\n", ["<s>", "!", "ĊĊ"]),
])  # fmt: skip
def test_words_of_each_kind(pre: str, text: str, want: list[str], tmp_path: Path) -> None:
    assert tokenizer(tmp_path / "m.gguf", {**byte_level(), "pre": pre}).encode([text])[0].tokens == want


def test_qwen_composes_and_llama_keeps_whole_tokens(tmp_path: Path) -> None:
    said = byte_level()
    assert tokenizer(tmp_path / "a.gguf", {**said, "pre": "qwen2"}).encode(["e\u0301"])[0].tokens == ["Ã", "©"]
    whole = {**said, "pre": "llama-bpe", "tokens": [*said["tokens"], "wow"], "kinds": [*said["kinds"], 1]}
    assert tokenizer(tmp_path / "b.gguf", whole).encode(["wow"])[0].tokens == ["<s>", "wow"]
    assert tokenizer(tmp_path / "c.gguf", {**whole, "pre": "gpt-2"}).encode(["wow"])[0].tokens == ["w", "o", "w"]


def test_sentencepiece_tokenizer(tmp_path: Path) -> None:
    found = tokenizer(tmp_path / "m.gguf", pieces())
    assert found.encode(["hello hello é"])[0].tokens == ["<s>", "▁hello", "▁hello", "▁", "<0xC3>", "<0xA9>"]
    assert found.decode([found.encode(["hello  é"])[0].ids]) == ["hello  é"]
    plain = tokenizer(tmp_path / "p.gguf", {**pieces(), "add_space_prefix": False, "add_bos_token": False,
                                            "add_eos_token": True})
    assert plain.encode(["hello h"])[0].tokens == ["hello", "▁h", "</s>"]
    assert plain.encode(["h"], ["e"])[0].tokens == ["h", "</s>", "e", "</s>"]
    assert plain.decode([plain.encode([" hello"])[0].ids]) == [" hello"]


def test_a_saved_tokenizer_reads_back(tmp_path: Path) -> None:
    said = {**byte_level(), "pre": "llama-bpe", "template": "{{ bos_token }}{{ messages[0].content }}"}
    found = tokenizer(tmp_path / "m.gguf", said)
    found.save(tmp_path)
    again = read(tmp_path, 0, 64, False)
    assert again is not None
    assert (again.special, again.pad_id, again.template) == ({**found.special}, 0, said["template"])
    assert again.encode(["hello 1234 <user>"])[0].ids == found.encode(["hello 1234 <user>"])[0].ids
    assert again.chat([{"role": "user", "content": "x"}]) == "<s>x"


@pytest.mark.parametrize(("change", "text"), [
    ({"pre": "tekken"}, "tokenizer.ggml.pre = 'tekken' is not implemented, only codeshell"),
    ({"model": "t5"}, "tokenizer.ggml.model = 't5' is not implemented, only 'gpt2' and 'llama'"),
    ({"merges": ["a"]}, "tokenizer.ggml.merges is no list of pairs"),
    ({"merges": ["qq zz"]}, "damaged tokenizer"),
    ({"eos": 999}, "eos_token = 999 is outside the vocabulary of 268 tokens"),
    ({"kinds": [1, 1]}, "tokenizer.ggml.token_type is no list of 268, one for each token"),
    ({"model": "llama"}, "has no tokenizer.ggml.scores"),
])  # fmt: skip
def test_damaged_tokenizers(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        tokenizer(tmp_path / "m.gguf", {**byte_level(), **change})
    assert "\n" not in str(caught.value)


def test_tokens_that_are_twice_or_too_many(tmp_path: Path) -> None:
    said = byte_level()
    with pytest.raises(CheckpointError, match=r"1 tokens are there twice \['h'\]"):
        tokenizer(tmp_path / "m.gguf", {**said, "tokens": ["h", *said["tokens"][1:]]})
    with pytest.raises(CheckpointError, match="268 tokens for a word table of 40 rows"):
        read_gguf(write(tmp_path / "n.gguf", finish=tokens_into(said)))


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_are_those_of_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    """A model trained on the spot, read through GGUF, against the library that trained it."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece, the oracle")
    files = [Path(__file__).parents[2] / name for name in ("README.md", "CONTRIBUTING.md")]
    text = [line for file in files for line in file.read_text().splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(tmp_path / "spm"), vocab_size=700, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=prefix, normalization_rule_name="identity",
        remove_extra_whitespaces=False, user_defined_symbols=["<turn>"], minloglevel=2)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    ids = range(theirs.get_piece_size())

    def kind(i: int) -> int:
        if theirs.is_unknown(i):
            return 2
        return 6 if theirs.is_byte(i) else 3 if theirs.is_control(i) else 4 if theirs.id_to_piece(i) == "<turn>" else 1

    said = {"model": "llama", "tokens": [theirs.id_to_piece(i) for i in ids], "kinds": [kind(i) for i in ids],
            "scores": [theirs.get_score(i) for i in ids], "bos": 1, "eos": 2, "unk": 0, "add_bos_token": False,
            "add_space_prefix": prefix}
    ours = tokenizer(tmp_path / "m.gguf", said)
    for line in [*text, "Grüße 東京 🙂", "  two  spaces  ", "x = [1, 2]\n\tpass"]:
        assert ours.encode([line])[0].ids == theirs.encode(line), line
        assert ours.decode([ours.encode([line])[0].ids]) == [line]
