"""`jpeft compare` of a board: run what is missing, then write the table and the plot."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from jpeft.cli.board import bench, config, plot, results, table
from jpeft.cli.board.bench import Say
from jpeft.errors import ConfigError, RunError


def run(path: Path, settings: Sequence[str], only: Sequence[str], seeds: str | None, minutes: float | None,
        again: bool, say: Say) -> int:
    """Run a board.

    Args:
        path: its configuration.
        settings: `a.b=value` each.
        only: entries; none: all.
        seeds: numbers with commas between them; None: all.
        minutes: begin no run after this many; 0: none at all.
        again: replace results of another configuration.
        say: prints a line of the report.

    Returns:
        The exit code: 0, or 130 if a signal interrupted it.

    Raises:
        RunError: some runs failed; those that did not are in the file of results.
        JpeftError: the configuration or the file of results is wrong.
    """
    board = config.load(path, settings)
    wanted = board.chosen(only, _numbers(seeds))
    words = ["jpeft", "compare", str(path), *(word for one in settings for word in ("--set", one))]
    command = shlex.join(words)
    done = bench.session(board, wanted, command, say, Console(stderr=True), minutes, again)
    old = results.stale(board, done.found)
    shown = {one: result for one, result in done.found.items() if one not in old}
    if any(one in board.jobs for one in shown):
        notes = [f"{len(old)} results of another configuration are not shown"] * bool(old)
        written = table.markdown(board, shown, notes)
        for suffix, data in ((".md", written.encode()), (".png", plot.png(board, shown))):
            results.put(board.results.with_suffix(suffix), data)
        say("\n" + written)
        say(f"wrote {board.results}, {board.results.with_suffix('.md').name}, {board.results.with_suffix('.png').name}")
    if done.interrupted:
        print(f"interrupted; continue with: {command}", file=sys.stderr)
        return 130
    if done.failed:
        first, why = next(iter(done.failed.items()))
        raise RunError(f"{len(done.failed)} of the runs failed; {first}: {why}")
    if done.left:
        say(f"{len(done.left)} of {len(wanted)} runs are left; continue with: {command}")
    return 0


def _numbers(seeds: str | None) -> list[int]:
    try:
        return [] if seeds is None else [int(seed) for seed in seeds.split(",")]
    except ValueError as error:
        raise ConfigError(f"--seeds {seeds!r} must be numbers with commas between them, as 0,1") from error
