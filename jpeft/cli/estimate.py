"""The command `jpeft estimate`: what a training step takes, from a process of its own with simulated devices."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from typing import Annotated, Any

import typer

from jpeft import errors
from jpeft.errors import ConfigError, EstimateError, JpeftError

_EXAMPLE = "jpeft estimate --model llama3:8B --method lora:r=16 --mesh fsdp=8 --batch 8 --seq 4096"
_COUNT = "--xla_force_host_platform_device_count"


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("estimate", epilog=f"Example: [bold]{_EXAMPLE}[/bold]")(estimate)


def estimate(
    model: Annotated[str, typer.Option(
        "--model", help="A config.json, the folder that holds one, or family:size (llama3:1B, 3B, 8B, 70B, 405B).")],
    method: Annotated[list[str] | None, typer.Option(
        "--method", help="name:field=value,... as lora:r=16,on=attention, or full; may be given often.")] = None,
    mesh: Annotated[str, typer.Option(
        "--mesh", help="Devices, as fsdp=8 or data=2,fsdp=4,tensor=2.")] = "fsdp=1",
    batch: Annotated[int | None, typer.Option("--batch", help="Sequences of a step, on all devices.")] = None,
    seq: Annotated[int, typer.Option("--seq", help="Tokens of a sequence.")] = 4096,
    dtype: Annotated[str, typer.Option("--dtype", help="Of compute and of the frozen parameters.")] = "bf16",
    remat: Annotated[str, typer.Option("--remat", help="What a layer keeps: none, dots, names, full.")] = "dots",
    optimizer: Annotated[str, typer.Option("--optimizer", help="As train.optimizer of a job.")] = "adamw",
    attention: Annotated[str, typer.Option(
        "--attention", help="scores: those of a layer exist at a time, as in the models of jpeft; fused: a kernel "
                            "that holds none.")] = "scores",
    search: Annotated[bool, typer.Option("--search", help="Find the largest batch that fits --memory.")] = False,
    memory: Annotated[str | None, typer.Option("--memory", help="Of a device, as 80GB.")] = None,
    chip: Annotated[list[str] | None, typer.Option(
        "--chip", help="H100, H200, B200, v5e, v5p or v6e; may be given often; all of them where it is not.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print data.")] = False,
) -> None:
    """Say what a training step takes before a device is rented: memory, operations, traffic, time at least."""
    from jpeft.cli import request as requests
    from jpeft.cli.estimated import lines
    from jpeft.train.chips import CHIPS
    from jpeft.train.chips import chip as chip_of

    chips = [name for name in CHIPS if CHIPS[name] in [chip_of(one) for one in chip or []]] or list(CHIPS)
    if search and memory is None:
        if not chip or len(chips) != 1:
            raise ConfigError("--search needs the memory of a device: --memory 80GB, or one --chip")
        memory = f"{CHIPS[chips[0]].memory:.0f}"
    if memory is not None and not search:
        raise ConfigError("--memory is of --search; add it")
    if search and batch is not None:
        raise ConfigError(f"--search looks for the batch, and --batch {batch} is given; drop one of them")
    axes = requests.mesh(mesh)
    rows = axes.get("data", 1) * axes.get("fsdp", 1)
    raw, where = requests.model_config(model)
    request = requests.checked(requests.Request(
        raw, where, requests.rules(method or ["lora:r=16"]), axes, rows if batch is None else batch, seq,
        requests.choice(dtype, requests.DTYPES, "--dtype"), remat, optimizer, attention,
        None if memory is None else requests.memory(memory)))
    found = run(request)
    if as_json:
        print(json.dumps({"request": dataclasses.asdict(request), **found}), flush=True)
        return
    for line in lines(request, found, chips):
        print(line, flush=True)


def run(request: Any) -> dict[str, Any]:
    """Estimate in a process of its own, which has as many simulated devices as the mesh.

    Args:
        request: a `jpeft.cli.request.Request`.

    Returns:
        The fields of `jpeft.train.estimate.Estimate` as plain data, with `batch` and `compiled`.

    Raises:
        JpeftError: what the process raised.
        EstimateError: it ended without an answer.
    """
    flags = re.sub(rf"{_COUNT}=\S+", "", os.environ.get("XLA_FLAGS", ""))
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} {_COUNT}={request.devices}".strip(),
           "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-m", "jpeft.cli.estimate_worker"], env=env, text=True, capture_output=True,
                          input=json.dumps(dataclasses.asdict(request)), check=False)
    answer = next((line for line in reversed(done.stdout.splitlines()) if line.startswith("{")), None)
    if answer is None:
        last = " ".join(done.stderr.split())[-300:]
        raise EstimateError(f"the process that compiles ended with code {done.returncode} and no answer; it said: "
                            f"{last or 'nothing'}; a machine with more memory may help")
    found: dict[str, Any] = json.loads(answer)
    if "error" in found:
        kind = getattr(errors, found["kind"], None)
        raise (kind if isinstance(kind, type) and issubclass(kind, JpeftError) else EstimateError)(found["error"])
    return found
