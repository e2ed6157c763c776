"""The command line `jpeft`: train, launch, eval, predict, generate, merge, explain, methods, compare, estimate."""

from __future__ import annotations

import contextlib
import shlex
import sys
import traceback as tracebacks
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as _error:
    raise SystemExit(f"error: the command line needs {_error.name}; pip install 'jpeft[train]'") from _error

from jpeft.cli import estimate, generate, launch
from jpeft.errors import ConfigError, JpeftError, RunError

app = typer.Typer(
    name="jpeft", help="Parameter-efficient fine-tuning for JAX.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]})

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, as in configs/.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, as runs/quickstart.")]
Settings = Annotated[list[str] | None, typer.Option(
    "--set", metavar="KEY=VALUE", help="Set a field of the configuration, as train.epochs=1; the value is YAML.")]


@app.callback()
def _options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
) -> None:
    """Parameter-efficient fine-tuning for JAX."""


def _say(text: str = "") -> None:
    print(text, flush=True)


def _example(text: str) -> dict[str, Any]:
    return {"epilog": f"Example: [bold]{text}[/bold]"}


@app.command(**_example("jpeft train configs/quickstart.yaml --set train.epochs=1 --name short"))
def train(
    config: ConfigFile, settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in its folder, if there is one.")] = False,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run's folder.")] = None,
    hook: Annotated[list[str] | None, typer.Option(
        "--hook", metavar="MODULE:CLASS", help="Another tracker, as train.hooks; may be given often.")] = None,
    distributed: Annotated[bool, typer.Option(
        "--distributed", help="As one of the processes of SLURM, Kubernetes, MPI, a TPU pod or jpeft launch.")] = False,
) -> None:
    """Train an adapter and test it."""
    if distributed:
        from jpeft.cli import meshes

        meshes.join()
    more = [f"train.hooks=[{', '.join(map(repr, hook))}]"] if hook else []
    _train(config, [*(settings or []), *more], resume, name)


def _train(config: Path, settings: list[str], resume: bool, name: str | None) -> None:
    from jpeft.cli import tables
    from jpeft.cli.config import load

    words = ["jpeft", "train", str(config), *(w for s in settings for w in ("--set", s))]
    command = shlex.join([*words, *(["--name", name] if name else [])])
    job = load(config, settings, name)
    from jpeft.cli.job import run
    from jpeft.core import hosts

    first, alone = hosts.first(), not hosts.several()
    found = run(job, command, resume, _say if first else lambda text: None, Console(stderr=True, quiet=not first))
    if isinstance(found, str):
        if first:
            again = f"{command} --resume" if alone else "the same command and --resume"
            print(f"{found}\ncontinue with: {again}", file=sys.stderr)
        raise typer.Exit(130)
    if not first:
        return
    _say()
    for line in tables.result(found):
        _say(line)
    _say(f"run folder      {job.folder}")


@app.command("eval", **_example("jpeft eval runs/quickstart --split validation"))
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN_OR_CONFIG", help="A run's folder, or its configuration.")],
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "test",
) -> None:
    """Measure a run's adapter: loss, and accuracy, F1, ranks, perplexity or right answers."""
    from jpeft.cli import build, job
    from jpeft.errors import nearest

    if split not in build.SPLITS:
        raise ConfigError(f"--split {split!r} is none of {', '.join(build.SPLITS)} ({nearest(split, build.SPLITS, 1)})")
    adapted = _adapted(run)
    found = job.evaluate_split(adapted.loaded, adapted, split)
    _say(f"{split}: {adapted.loaded.task.line(found.after)}")
    for note in found.notes:
        _say(note)


@app.command(**_example("jpeft predict runs/quickstart --text 'a warm and funny film' --text 'a mess'"))
def predict(
    run: Run,
    text: Annotated[list[str] | None, typer.Option(
        "--text", help="A text to classify, tag, answer or embed; may be given often.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="A file with a text on each line.")] = None,
    out: Annotated[Path | None, typer.Option(
        "--out", metavar="NPY", help="Of a model of embeddings: write the vectors of all texts to this file.")] = None,
) -> None:
    """Print class, probability and text, or answer and text, or words with tags, or similarities, for each text."""
    texts = list(text or [])
    if file is not None:
        try:
            texts += file.read_text(encoding="utf-8").rstrip("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--file {file} cannot be read ({error}); give a text file in UTF-8") from error
    if not texts:
        raise ConfigError("there is nothing to predict; give --text or --file")
    if out is not None and out.suffix != ".npy":
        raise ConfigError(f"--out {out} must be a file that ends in .npy")
    adapted = _adapted(run)
    if out is not None:
        import numpy as np

        vectors, notes = adapted.loaded.task.vectors(adapted, texts)
        np.save(out, vectors)
        lines = [f"wrote {out}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers"]
    else:
        lines, notes = adapted.loaded.task.predict(adapted, texts)
    for line in lines:
        _say(line)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


generate.register(app)
estimate.register(app)
launch.register(app)


@app.command(**_example("jpeft merge runs/quickstart merged"))
def merge(
    run: Run, out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
) -> None:
    """Write model and adapter as one plain Hugging Face folder: no cost at inference, no jpeft needed."""
    from jpeft.cli.job import write_model

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists already and is not empty; name a new folder")
    write_model(_adapted(run), out)
    _say(f"wrote {out}: config.json, model.safetensors, tokenizer files")


def _adapted(run: Path) -> Any:
    from jpeft.cli import build

    adapted, notes = build.trained(run)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return adapted


@app.command(**_example("jpeft explain configs/quickstart.yaml --set 'rules={attention: {method: DoRA, rank: 4}}'"))
def explain(config: ConfigFile, settings: Settings = None) -> None:
    """Show what a configuration would train, and at what cost, without training it."""
    from jpeft.cli.config import load

    job = load(config, settings or [])
    from jpeft.cli import build, meshes
    from jpeft.core import explain as core

    loaded = build.load_model(job)
    _say(str(core.explain(loaded.plan, shardings=meshes.places(job.mesh, loaded.plan, loaded.params))))
    for note in loaded.model.notes:
        _say(note)


@app.command(**_example("jpeft methods --markdown"))
def methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table, that of the README.")] = False,
) -> None:
    """List the methods: equation, paper, size, and what each can do."""
    from jpeft.cli import listing, tables

    if markdown:
        _say(listing.document())
    else:
        _console().print(tables.table(listing.HEAD, listing.rows(), left=len(listing.HEAD)), listing.NOTE, sep="\n")


@app.command(**_example("jpeft compare configs/compare_minilm.yaml --only lora --max-minutes 30"))
def compare(
    targets: Annotated[list[Path], typer.Argument(
        metavar="RUN...", help="Folders of runs, or configurations; or the configuration of one board.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    run: Annotated[bool, typer.Option("--run", help="Run, or finish, the configurations that lack a result.")] = False,
    settings: Settings = None,
    only: Annotated[list[str] | None, typer.Option(
        "--only", metavar="ENTRY", help="Of a board: run this entry; may be given often.")] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", metavar="0,1", help="Of a board: run these seeds.")] = None,
    minutes: Annotated[float | None, typer.Option(
        "--max-minutes", min=0, help="Of a board: begin no run after this time; 0 only writes table and plot.")] = None,
    again: Annotated[bool, typer.Option(
        "--again", help="Of a board: replace results of another configuration.")] = False,
) -> None:
    """Show the results of several runs in one table; or run a board, entry by entry, and write table and plot."""
    from jpeft.cli.board.config import is_board

    boards = [target for target in targets if target.suffix in (".yaml", ".yml") and is_board(target)]
    if boards and len(targets) > 1:
        raise ConfigError(f"{boards[0]} is a board, which is run alone; name it without the others")
    if boards:
        from jpeft.cli.board import command as board

        if (code := board.run(boards[0], settings or [], only or [], seeds, minutes, again, _say)) != 0:
            raise typer.Exit(code)
        return
    if settings or only or seeds or minutes is not None or again:
        raise ConfigError("--set, --only, --seeds, --max-minutes and --again are for boards; drop them, or name "
                          "one, such as configs/compare_minilm.yaml")
    _compare(targets, markdown, run)


def _compare(targets: Sequence[Path], markdown: bool, run: bool) -> None:
    from jpeft.cli import runs, tables
    from jpeft.cli.config import load

    found, missing = [], []
    for target in targets:
        config = target.suffix in (".yaml", ".yml")
        folder = load(target).folder if config else runs.find(target)
        if run and config and runs.summary(folder) is None:
            _train(target, [], True, None)
        summary = runs.summary(folder)
        if summary is None:
            missing.append(f"{target}: no result; jpeft train {target if config else folder / runs.CONFIG} --resume")
        else:
            found.append(summary)
    for line in missing:
        print(line, file=sys.stderr)
    if not found:
        raise RunError("none of the runs has a result; run them, or add --run to run the configurations now")
    rows = tables.compared(found)
    if markdown:
        _say(tables.markdown(tables.heads(found), rows, left=2))
    else:
        _console().print(tables.table(tables.heads(found), rows, left=2))


def _console() -> Console:
    """Return a console for tables: as wide as they are where the output is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; an error is one line on the standard error stream.

    Args:
        args: words after `jpeft`; None: those of the process.

    Returns:
        The exit code: 0, 1 after an error, 2 for wrong options, 130 if interrupted.
    """
    words = list(sys.argv[1:] if args is None else args)
    show = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        app(words, prog_name="jpeft")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except (JpeftError, OSError) as error:
        if show:
            tracebacks.print_exc()
        with contextlib.suppress(BrokenPipeError):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except Exception:
        if "--distributed" not in words:
            raise
        tracebacks.print_exc()
    else:
        return 0
    if "--distributed" in words:
        from jpeft.cli import meshes

        meshes.leave(1)
    return 1


if __name__ == "__main__":
    sys.exit(main())
