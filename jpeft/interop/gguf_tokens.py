"""The tokenizer inside a GGUF file, rebuilt for the `tokenizers` package: byte-level BPE and sentencepiece BPE."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jpeft.errors import CheckpointError
from jpeft.interop.gguf import File
from jpeft.interop.tokenizer import MAIN, Tokenizer

_ROLES = {"bos": "bos_token", "eos": "eos_token", "eot": "eot_token", "eom": "eom_token", "unknown": "unk_token",
          "padding": "pad_token", "seperator": "sep_token", "mask": "mask_token"}
_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4
_SPACE = "▁"

# What a word is, before BPE. The first is GPT-2's and is built into the package's byte-level step.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_THREE = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_ONE = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL


class Words(NamedTuple):
    """How a `tokenizer.ggml.pre` cuts text into words.

    Attributes:
        pattern: of one word; "": GPT-2's.
        digits: cut every digit off first.
        whole: a word that is a token stays whole, whatever the merges say.
        compose: normalise to NFC.
        begin: put the begin token in front where the file does not say.
    """

    pattern: str = ""
    digits: bool = False
    whole: bool = False
    compose: bool = False
    begin: bool = False


_LLAMA = Words(_THREE, whole=True, begin=True)
WORDS: Mapping[str, Words] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jina-en", "jina-es", "jina-de"), Words()),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), Words(digits=True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Words(_THREE)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), Words(_ONE, compose=True)),
    "stablelm2": Words(_ONE),
}


def tokenizer_of(file: File, rows: int, max_length: int) -> Tokenizer | None:
    """Rebuild the tokenizer of a file; None if it has none.

    Args:
        file: the file.
        rows: rows of the model's word table.
        max_length: the longest sequence that the model takes.

    Raises:
        CheckpointError: it is damaged or of a kind that is not implemented.
    """
    said = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()
            if key.startswith("tokenizer.ggml.")}
    if "model" not in said:
        return None
    tokens, kinds = _vocabulary(file.where, said, rows)
    special = {role: int(said[f"{key}_token_id"]) for key, role in _ROLES.items() if f"{key}_token_id" in said}
    beyond = [f"{role} = {number}" for role, number in special.items() if not 0 <= number < len(tokens)]
    if beyond:
        raise CheckpointError(f"{file.where}: {', '.join(beyond)} is outside the vocabulary of {len(tokens)} tokens; "
                              "download it again")
    try:
        raw, begin = _build(file.where, said, tokens, special)
        _add(raw, tokens, kinds)
        _frame(raw, said, begin, tokens, special)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises the bare class
        raise CheckpointError(f"{file.where} has a damaged tokenizer ({error}); download it again") from error
    template = file.metadata.get("tokenizer.chat_template", "")
    pad = special.get("pad_token", special.get("eos_token", 0))
    return Tokenizer(raw, pad, max_length, False, special, _files(raw, tokens, special, template, max_length),
                     template if isinstance(template, str) else "")


def _vocabulary(where: str, said: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    tokens = said.get("tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise CheckpointError(f"{where} names a tokenizer but has no list tokenizer.ggml.tokens; download it again")
    if len(tokens) > rows:
        raise CheckpointError(f"{where} has {len(tokens)} tokens for a word table of {rows} rows; download it again")
    kinds = said.get("token_type", [_NORMAL] * len(tokens))
    for name, values in (("token_type", kinds), ("scores", said.get("scores", kinds))):
        if not isinstance(values, list) or len(values) != len(tokens):
            raise CheckpointError(f"{where}: tokenizer.ggml.{name} is no list of {len(tokens)}, one for each token; "
                                  "download it again")
    if len(set(tokens)) != len(tokens):
        twice = sorted({t for t in tokens if tokens.count(t) > 1})[:3] if len(tokens) < 10_000 else []
        raise CheckpointError(f"{where}: {len(tokens) - len(set(tokens))} tokens are there twice {twice or ''}; their "
                              "ids cannot be told apart")
    return tokens, kinds


def _build(where: str, said: Mapping[str, Any], tokens: Sequence[str], special: Mapping[str, int]) -> tuple[Any, bool]:
    """Return the tokenizer without its added tokens, and whether a begin token goes in front by default."""
    kind = said["model"]
    if kind == "gpt2":
        return _bytes(where, said, tokens)
    if kind == "llama":
        return _pieces(where, said, tokens, special), True
    raise CheckpointError(f"{where}: tokenizer.ggml.model = {kind!r} is not implemented, only 'gpt2' and 'llama'; put "
                          "the model's tokenizer.json to use")


def _bytes(where: str, said: Mapping[str, Any], tokens: Sequence[str]) -> tuple[Any, bool]:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    if said.get("pre") not in WORDS:
        raise CheckpointError(f"{where}: tokenizer.ggml.pre = {said.get('pre')!r} is not implemented, only "
                              f"{', '.join(sorted(WORDS))}")
    words = WORDS[said["pre"]]
    merges = [tuple(merge.split(" ")) for merge in said.get("merges", ())]
    if not merges or any(len(merge) != 2 for merge in merges):
        raise CheckpointError(f"{where}: tokenizer.ggml.merges is no list of pairs; download it again")
    raw = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, ignore_merges=words.whole))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if words.digits else []
    if words.pattern:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(words.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=bool(said.get("add_space_prefix", False)),
                                          use_regex=not words.pattern))
    raw.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if words.compose:
        raw.normalizer = normalizers.NFC()
    raw.decoder = decoders.ByteLevel()
    return raw, words.begin


def _pieces(where: str, said: Mapping[str, Any], tokens: Sequence[str], special: Mapping[str, int]) -> Any:
    import tokenizers
    from tokenizers import decoders, models, normalizers

    if "scores" not in said:
        raise CheckpointError(f"{where} has no tokenizer.ggml.scores, which order the pieces; download it again")
    vocabulary = {t: i for i, t in enumerate(tokens)}
    unknown = tokens[special["unk_token"]] if "unk_token" in special else None
    fallback = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    raw = tokenizers.Tokenizer(models.BPE(vocabulary, merges_of(tokens, said["scores"]), unk_token=unknown,
                                          fuse_unk=True, byte_fallback=fallback))
    prefix = bool(said.get("add_space_prefix", True))
    raw.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(_SPACE)] if prefix else []), normalizers.Replace(" ", _SPACE)])
    raw.decoder = decoders.Sequence([
        decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
        *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return raw


def merges_of(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return the BPE merges that sentencepiece's pieces stand for: two pieces that make a third, the best score first.

    Example:
        >>> merges_of(["a", "b", "ab", "abb"], [0.0, 0.0, -1.0, -2.0])
        [('a', 'b'), ('ab', 'b')]
    """
    ids = {t: i for i, t in enumerate(tokens)}
    found = [(-score, ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
             for piece, score in zip(tokens, scores, strict=True)
             for cut in range(1, len(piece)) if piece[:cut] in ids and piece[cut:] in ids]
    return [(left, right) for *_, left, right in sorted(found)]


def _add(raw: Any, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Declare the tokens that are found in a text before it is cut: those of control, and the user's own."""
    import tokenizers

    def one(token: str, special: bool) -> Any:
        return tokenizers.AddedToken(token, special=special, normalized=False)

    named = [(t, k) for t, k in zip(tokens, kinds, strict=True) if t]
    raw.add_special_tokens([one(t, True) for t, k in named if k in (_CONTROL, _UNKNOWN)])
    raw.add_tokens([one(t, False) for t, k in named if k == _USER])


def _frame(raw: Any, said: Mapping[str, Any], begin: bool, tokens: Sequence[str], special: Mapping[str, int]) -> None:
    """Put the begin and end tokens around a text where the file says so."""
    from tokenizers import processors

    wanted = {"bos_token": said.get("add_bos_token", begin), "eos_token": said.get("add_eos_token", False)}
    ends = [role for role, wish in wanted.items() if wish and role in special]
    if not ends:
        return
    first, last = ([tokens[special[role]]] if role in ends else [] for role in ("bos_token", "eos_token"))
    raw.post_processor = processors.TemplateProcessing(
        single=[*first, "$A:0", *last], pair=[*first, "$A:0", *last, *(f"{t}:1" for t in first), "$B:1",
                                              *(f"{t}:1" for t in last)],
        special_tokens=[(tokens[special[role]], special[role]) for role in ends])


def _files(raw: Any, tokens: Sequence[str], special: Mapping[str, int], template: Any, limit: int) -> dict[str, bytes]:
    """Return what a checkpoint folder has in place of the file's keys."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": limit,
              "clean_up_tokenization_spaces": False,
              **{role: tokens[number] for role, number in special.items() if role not in ("eot_token", "eom_token")}}
    files = {MAIN: raw.to_str(pretty=True).encode(),
             "tokenizer_config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}
    if isinstance(template, str) and template:
        files["chat_template.jinja"] = template.encode()
    return files
