"""`jpeft launch`: several processes on this machine train together, as they would on several machines."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO, Annotated

import typer

from jpeft.cli.meshes import PROCESS, PROCESSES
from jpeft.errors import ConfigError, RunError

GRACE = 5.0  # seconds that processes may take to end by themselves after one of them has ended with an error
_CHATTER = "connected peer ranks"  # Gloo says it of every group of devices
_FORCED = "--xla_force_host_platform_device_count"


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""

    @app.command(epilog="Example: [bold]jpeft launch --processes 2 --devices-per-process 4 -- "
                        "train configs/minilm_sharded.yaml[/bold]")
    def launch(
        words: Annotated[list[str], typer.Argument(
            metavar="-- train CONFIG ...", help="What each process runs: jpeft train with its options.")],
        processes: Annotated[int, typer.Option("--processes", min=1, help="How many.")],
        devices: Annotated[int, typer.Option(
            "--devices-per-process", min=1, help="Devices of each; on a CPU they are simulated.")] = 1,
    ) -> None:
        """Train in several processes on this machine; the first one prints and writes."""
        if words[0] != "train":
            raise ConfigError(f"jpeft launch runs jpeft train, not {words[0]!r}; write: jpeft launch --processes "
                              f"{processes} -- train CONFIG")
        if (code := run(words, processes, devices)) != 0:
            raise typer.Exit(code)


def run(words: Sequence[str], processes: int, devices: int) -> int:
    """Run `jpeft WORDS --distributed` in several processes, each line of output with the number of its process.

    Ctrl-C, or SIGTERM, has them save and end after the same step; a second one ends them at once. If one of them ends
    with an error, or is killed, the others are ended too.

    Args:
        words: `train` and its options.
        processes: how many.
        devices: of each process.

    Returns:
        The exit code: 0, 130 if interrupted, that of the first process that ended with an error otherwise.

    Raises:
        RunError: a process was killed.
    """
    group = _Group(words, processes, devices)
    handlers = {number: signal.signal(number, group.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return group.wait()
    finally:
        group.kill()
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Group:
    """The processes, and the threads that pass on what they say."""

    def __init__(self, words: Sequence[str], processes: int, devices: int) -> None:
        self._asked = 0
        self._lost = threading.Event()
        self._lock = threading.Lock()
        port = _free_port()
        command = [sys.executable, "-m", "jpeft.cli.main", *words, "--distributed"]
        # In a session of their own: Ctrl-C in a terminal reaches this process alone, which tells them.
        self._processes = [
            subprocess.Popen(command, env=environment(i, processes, devices, port), text=True, errors="replace",
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             start_new_session=True) for i in range(processes)]
        self._threads = [threading.Thread(target=self._pass_on, args=(i, source, target), daemon=True)
                         for i, process in enumerate(self._processes)
                         for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))]
        print(f"{processes} processes: {', '.join(str(process.pid) for process in self._processes)}", file=sys.stderr,
              flush=True)
        for thread in self._threads:
            thread.start()

    def wait(self) -> int:
        """Return when all have ended."""
        while (codes := [process.poll() for process in self._processes]).count(None):
            if any(codes):
                return self._failed()
            time.sleep(0.05)
        if any(codes):
            return self._failed()
        self._finish()
        return 0

    def stop(self, *_: object) -> None:
        """Have the processes save and end; called again, end them."""
        self._asked += 1
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if self._asked == 1 else signal.SIGKILL)

    def kill(self) -> None:
        """End those that are still there."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def _failed(self) -> int:
        """End the others after one has ended with an error; say what happened to it."""
        codes = [process.poll() for process in self._processes]
        first = min((i for i, code in enumerate(codes) if code), key=lambda i: int(codes[i] or 0) > 0)
        code, many = int(codes[first] or 0), len(codes)
        killed = code < 0
        if killed:
            self._lost.set()  # the others have nothing to say but that they miss it
        until = time.monotonic() + (0 if killed else 60 * GRACE if self._asked else GRACE)
        while time.monotonic() < until and any(process.poll() is None for process in self._processes):
            time.sleep(0.05)
        self._lost.set()
        self.kill()
        self._finish()
        if killed and self._asked < 2:
            raise RunError(f"process {first} of {many} was ended by {signal.Signals(-code).name}, and the others with "
                           "it; go on from the last checkpoint: the same command and --resume")
        return 130 if killed else code

    def _finish(self) -> None:
        for thread in self._threads:
            thread.join(GRACE)

    def _pass_on(self, number: int, source: IO[str] | None, target: IO[str]) -> None:
        for line in source or ():
            if not self._lost.is_set() and _CHATTER not in line:
                with self._lock:
                    print(f"[{number}] {line.rstrip()}", file=target, flush=True)


def environment(number: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """Return the environment of a process.

    Args:
        number: of the process.
        processes: how many there are.
        devices: of each: simulated ones on a CPU, its share of the accelerators of this machine elsewhere.
        port: of the first process, where all meet.
    """
    flags = re.sub(rf"{_FORCED}=\S+", "", os.environ.get("XLA_FLAGS", ""))
    own = range(number * devices, (number + 1) * devices)
    return {
        **os.environ, PROCESSES: str(processes), PROCESS: str(number),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, own)),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "XLA_FLAGS": f"{flags} {_FORCED}={devices}".strip(),
        "PYTHONUNBUFFERED": "1"}


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
