"""A board of two entries on the tiny model: it resumes, it is strict about its files, and it writes table and plot."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cli.tinyjob import Tiny
from rich.console import Console

from jpeft.cli.board import bench, config, plot, results, table
from jpeft.cli.board.claims import claim
from jpeft.cli.board.config import Run
from jpeft.cli.main import main
from jpeft.errors import ConfigError, NonFiniteLossError, ReportError

BOARD = """
seeds: [0, 1]
reference: full
tasks:
  films:
    model: {{source: {tiny.model}, dropout: 0.0}}
    data: {{source: {tiny.data}, classes: [negative, positive], test: 16, validation: 16, max_length: 8, buckets: [8]}}
    train: {{steps: 2, batch_size: 32, warmup: 0}}
rules:
  (pooler|classifier)/.*: {{method: Full, learning_rate: 1e-2}}
entries:
  full: {{rules: {{.*: {{method: Full}}}}, learning_rate: 1e-3}}
  lora: {{rules: {{attention: {{method: LoRA, rank: 2, alpha: 4}}}}}}
without: {{Chain: it holds other methods}}
"""


@pytest.fixture(scope="module")
def home(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("board") / "small.yaml"
    path.write_text(BOARD.format(tiny=tiny))
    return path


@pytest.fixture(scope="module")
def done(home: Path) -> Path:
    """The board after two sessions: a signal ended the first in its second run."""
    run, seen = bench.Bench.run, []

    def interrupted(self: Any, one: Run, command: str) -> Any:
        seen.append(one)
        return run(self, one, command) if len(seen) == 1 else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.Bench, "run", interrupted)
        assert main(["compare", str(home)]) == 130
    assert seen == [Run("films", "full", 0), Run("films", "full", 1)]
    assert list(results.read(home.with_suffix(".json"))) == seen[:1]
    first = home.with_suffix(".json").read_text().splitlines()[1].rstrip(",")
    assert main(["compare", str(home)]) == 0
    lines = home.with_suffix(".json").read_text().splitlines()
    assert lines[1].rstrip(",") == first  # with its date: it has not run again
    assert len(lines) == 4 + 2
    return home


def test_sessions_share_a_file(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another session adds while a run is at work is kept, and not done again."""
    board, found = config.load(done), results.read(done.with_suffix(".json"))
    board = board._replace(results=tmp_path / "new" / "shared.json")
    first, *others = board.jobs
    ran, said = [], []

    def run(self: bench.Bench, one: Run, command: str) -> results.Result:
        ran.append(one)
        for other in others[1:]:
            results.add(board.results, board.jobs, found[other])
        return found[one]

    monkeypatch.setattr(bench.Bench, "run", run)
    monkeypatch.setattr(bench.Bench, "notes", lambda self, one: [])
    monkeypatch.setattr(bench, "_headline", lambda board, made: "done")
    ended = bench.session(board, list(board.jobs), "jpeft compare", said.append, Console(quiet=True))
    assert ran == [first, others[0]]
    assert list(ended.found) == list(results.read(board.results)) == list(board.jobs)
    assert not ended.left
    assert sum("another session has done it" in line for line in said) == 2


def test_sessions_work_on_different_entries(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second session begins while the first is in its first run; what the first is at work on is left to it."""
    board, found = config.load(done), results.read(done.with_suffix(".json"))
    board = board._replace(results=tmp_path / "shared.json")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ran, said, second = [], [], []

    def run(self: bench.Bench, one: Run, command: str) -> results.Result:
        ran.append(one)
        if len(ran) == 1:
            second.append(bench.session(board, list(board.jobs), "jpeft compare", said.append, Console(quiet=True)))
        return found[one]

    monkeypatch.setattr(bench.Bench, "run", run)
    monkeypatch.setattr(bench.Bench, "notes", lambda self, one: [])
    monkeypatch.setattr(bench, "_headline", lambda board, made: "done")
    first = bench.session(board, list(board.jobs), "jpeft compare", said.append, Console(quiet=True))
    full, lora = ([Run("films", entry, seed) for seed in (0, 1)] for entry in ("full", "lora"))
    assert ran == [full[0], *lora, full[1]]
    assert second[0].left == full
    assert not first.left
    assert list(results.read(board.results)) == list(board.jobs)
    assert sum("another session is at work" in line for line in said) == 2


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    command = ("import sys, pathlib; from jpeft.cli.board import claims, config\n"
               "with claims.claim(pathlib.Path(sys.argv[1]), config.Run('films', 'full', 0)) as mine:\n"
               "    print(mine, flush=True); input()")
    path, env = tmp_path / "results.json", {**os.environ, "TMPDIR": str(tmp_path)}
    other = subprocess.Popen([sys.executable, "-c", command, path], env=env, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "True\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path))
        for entry, mine in (("full", False), ("lora", True)):
            with claim(path, Run("films", entry, 1)) as free:
                assert free is mine
        other.kill()
        other.communicate()
        with claim(path, Run("films", "full", 1)) as free:
            assert free
        patch.setattr(tempfile, "tempdir", str(path))
        path.write_text("no folder")
        with pytest.raises(ReportError, match="at work on an entry: fix the folder, or set TMPDIR"), claim(
                path, Run("films", "full", 1)):
            pass


def test_differences_are_of_the_seeds_that_both_have(done: Path) -> None:
    board, found = config.load(done), results.read(done.with_suffix(".json"))
    full, lora = (found[Run("films", entry, 1)] for entry in ("full", "lora"))
    some = {run: one for run, one in found.items() if run != Run("films", "lora", 0)}
    line = next(line for line in table.lines(board, some, "films") if line.entry == "lora")
    assert line.gain is not None
    assert line.gain.mean == pytest.approx(lora.test["accuracy"] - full.test["accuracy"])
    alone = {Run("films", "full", 0): found[Run("films", "full", 0)], Run("films", "lora", 1): lora}
    assert all(line.gain is None for line in table.lines(board, alone, "films"))


def test_threads_take_turns_at_a_file(done: Path, tmp_path: Path) -> None:
    found = list(results.read(done.with_suffix(".json")).values())
    runs = [dataclasses.replace(found[i % 4], seed=i) for i in range(32)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda one: results.add(tmp_path / "shared.json", [], one), runs))
    assert sorted(one.seed for one in results.read(tmp_path / "shared.json")) == list(range(32))


@pytest.mark.slow
def test_results_say_what_ran(done: Path) -> None:
    found = results.read(done.with_suffix(".json"))
    board = config.load(done)
    assert list(found) == list(board.jobs)
    one = found[Run("films", "lora", 1)]
    assert (one.learning_rate, one.methods, one.steps, one.rows) == (1e-3, "LoRA(rank=2, alpha=4) + Full", 2, 16)
    assert one.right is not None
    assert one.right.mean() == pytest.approx(one.test["accuracy"])
    assert one.command == f"jpeft compare {done}"
    assert one.base > one.trainable > 0
    assert min(one.adapter_bytes, one.temp_bytes, one.seconds, one.compile_seconds, one.ms_per_step or 0) > 0
    assert one.about["jax"]
    assert found[Run("films", "lora", 0)].compile_seconds == one.compile_seconds  # of one program


@pytest.mark.slow
def test_a_finished_board_runs_nothing(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = done.with_suffix(".json").read_bytes()
    monkeypatch.setattr(bench.Bench, "run", None)
    assert main(["compare", str(done)]) == 0
    assert done.with_suffix(".json").read_bytes() == before


@pytest.mark.slow
def test_table_and_plot(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done.with_suffix(".png").unlink()
    assert main(["compare", str(done), "--max-minutes", "0"]) == 0
    written = done.with_suffix(".md").read_text()
    assert written in capsys.readouterr().out
    assert "| lora | LoRA(rank=2, alpha=4) + Full | 0.001 |" in written
    assert "minus full [95 %]" in written
    assert "Without an entry: Chain: it holds other methods" in written
    assert done.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_session_stops_after_its_minutes(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(home), "--set", f"results={tmp_path / 'new.json'}"]
    assert main([*words, "--max-minutes", "1e-9", "--only", "lora", "--seeds", "1"]) == 0
    assert "1 of 1 runs are left" in capsys.readouterr().out
    assert not (tmp_path / "new.json").exists()


@pytest.mark.slow
def test_results_of_other_values_are_not_mixed(done: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    other = ["compare", str(done), "--set", "entries.lora.learning_rate=0.5"]
    assert main(other) == 1
    assert "small.json holds lora on films, seed 0 and 1 more with other values" in capsys.readouterr().err
    board = config.load(done, ["entries.lora.learning_rate=0.5"])
    found = results.read(board.results)
    assert results.missing(board, found, list(board.jobs), again=True) == [Run("films", "lora", s) for s in (0, 1)]
    assert results.missing(board, found, board.chosen(["full"], []), again=False) == []
    monkeypatch.setattr(bench.Bench, "run", None)
    assert main([*other, "--max-minutes", "0"]) == 0
    assert "2 results of another configuration are not shown" in capsys.readouterr().out
    assert main(["compare", str(done), "--max-minutes", "0"]) == 0  # leaves the table as it was


def test_a_run_that_fails_does_not_end_the_board(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def fails(self: Any, one: Run, command: str) -> Any:
        seen.append(one)
        raise NonFiniteLossError("loss is nan after step 1;\nlower the learning rate")

    monkeypatch.setattr(bench.Bench, "run", fails)
    assert main(["compare", str(home), "--set", f"results={tmp_path / 'new.json'}", "--seeds", "0"]) == 1
    assert [one.entry for one in seen] == ["full", "lora"]
    assert "2 of the runs failed; full on films, seed 0: loss is nan" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("text", "said"), [
    ('{"format": 1, "resul', "is no file of results"), ('{"format": 7, "results": []}', "of format 1"),
    ('{"format": 1, "results": [{"task": "films"}]}', "has not the fields of a run"),
    ("TWICE", "holds full on films, seed 0 twice"), ("HITS", "'hits' of full on films, seed 0 is damaged"),
    ("KIND", "'seed' of result 0 (counted from 0) is 'zero'")])
def test_damaged_results_are_an_error(done: Path, tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "small.json"
    data = json.loads(done.with_suffix(".json").read_text())
    if text == "TWICE":
        data["results"].append(data["results"][0])
    elif text == "HITS":
        data["results"][0]["hits"] = data["results"][0]["hits"][:-4]
    elif text == "KIND":
        data["results"][0]["seed"] = "zero"
    path.write_text(json.dumps(data) if text.isupper() else text)
    with pytest.raises(ReportError, match=said.replace("(", r"\(").replace(")", r"\)")):
        results.read(path)


@pytest.mark.parametrize(("setting", "said"), [
    ("entries.lora.learning_rat=1", "unknown key 'entries.lora.learning_rat'; the nearest is 'entries.NAME.learning_"),
    ("refrence=full", "unknown key 'refrence'; the nearest is 'reference'"),
    ("entries.lora.rules.attention.rnk=1", "entry lora on task films: unknown key 'rules.attention.rnk'"),
    ("entries.lora.train.epoch=1", "unknown key 'train.epoch'; the nearest is 'train.epochs'"),
    ("entries.lora.rules.attention.learning_rate=-1", "rules.attention.learning_rate = -1 must be a number above 0"),
    ("tasks.films.modl={}", "unknown key 'tasks.films.modl'; nearest: 'model'"),
    ("entries.lora.train.patience=2", "train.patience is for single runs"),
    ("reference=ful", "reference = 'ful' is no entry; nearest: 'full'"),
    ("without.LoRAs=x", "without.LoRAs is no method"), ("seeds=[1, 1]", "more than once"),
    ("tasks.films.data.clases=2", "unknown key 'data.clases'; the nearest is 'data.classes'")])
def test_mistakes_are_named(home: Path, setting: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(home, [setting])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_of_boards(home: Path, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in [
        (["compare", str(home), "--only", "lorra"], "--only 'lorra' is no entry of small; nearest: 'lora'"),
        (["compare", str(home), "--seeds", "0,7"], "--seeds has 7"),
        (["compare", str(home), "--seeds", "a"], "must be numbers"),
        (["compare", str(home), str(job)], "is a board, which is run alone"),
        (["compare", str(job), "--only", "lora"], "are for boards"),
        (["train", str(home)], f"run it with: jpeft compare {home}"),
    ]:
        assert main(words) == 1
        assert said in capsys.readouterr().err


def test_frontier_of_losses_points_down() -> None:
    assert plot.frontier([(1, 9.0), (2, 8.0), (3, 8.5)], more=False) == [0, 1]


def test_each_task_has_a_head_for_its_classes(home: Path, tmp_path: Path) -> None:
    """One model in two tasks is read for each of them."""
    data = yaml.safe_load(home.read_text())
    more = {**data["tasks"]["films"]["data"], "classes": ["negative", "positive", "neither"]}
    data["tasks"]["three"] = {**data["tasks"]["films"], "data": more}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(data))
    board = config.load(tmp_path / "two.yaml")
    made = bench.Bench(board, Console(stderr=True))
    for task, classes in (("films", 2), ("three", 3), ("films", 2)):
        loaded = made._load(board.jobs[Run(task, "lora", 0)])
        assert loaded.params["classifier"]["bias"].shape == (classes,)


@pytest.mark.slow
def test_few_parameters_and_near_the_reference(done: Path) -> None:
    board = config.load(done)
    found = {run: made for run, made in results.read(board.results).items() if run.seed == 0}
    full = found[Run("films", "full", 0)]
    right = np.arange(16) % 4 > 0
    found = {run: results.Result(**{**vars(one), "hits": results.pack(right), "test": {"accuracy": 0.75},
                                    "base": 100 * one.trainable if run.entry == "lora" else one.base})
             for run, one in found.items()}
    made = table.lines(board, found, "films")
    assert table.small(board, made) == ["lora"]
    assert next(line.gain for line in made if line.entry == "full") is None
    assert full.percent == 100
