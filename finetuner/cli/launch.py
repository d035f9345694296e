"""Starts one process a rank on this machine, and ends all when one fails.

- The exit code is that of the rank that failed first, so that a script sees why (2 config, 3 data, 4 model, ...).
- SIGTERM and SIGINT are handed on: the ranks save and end, as one process does.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from finetuner.errors import Problem, UsageError

GRACE = 20.0
"""Seconds that the other ranks get to end by themselves after one has failed."""


def launch(nproc: int) -> int:
    """Runs this same command line as `nproc` ranks; gives the exit code."""
    if nproc < 1:
        remedy = "leave --nproc out for one process"
        raise UsageError(Problem("E-NPROC", "--nproc counts processes", "--nproc", str(nproc), "1 or more", remedy))
    with tempfile.TemporaryDirectory(prefix="finetuner-") as told:
        return launch_in(Path(told), nproc)


def launch_in(told: Path, nproc: int) -> int:
    """As `launch`; the ranks leave what went wrong in the folder `told`."""
    port = str(free_port())
    ranks = []
    for rank in range(nproc):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "FINETUNER_TOLD": str(told)}
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nproc))}
        command = [sys.executable, "-m", "finetuner", *sys.argv[1:]]
        ranks.append(subprocess.Popen(command, env=threads | os.environ | place))

    def hand_on(number: int, _frame: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        first, code = wait(ranks)
        cause = told / f"rank-{first}.txt"
        if cause.exists():
            print(cause.read_text(encoding="utf-8"), file=sys.stderr)
        if code:
            print(f"rank {first} of {nproc} ended first, with {code}", file=sys.stderr, flush=True)
        return code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait(ranks: list[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """(the rank that failed first, its exit code), or (0, 0); the others get `GRACE` seconds, then they are ended."""
    failed: tuple[int, int] | None = None
    deadline = float("inf")
    while any(process.poll() is None for process in ranks):
        for number, process in enumerate(ranks):
            code = process.poll()
            if code and failed is None:
                failed, deadline = (number, code), time.monotonic() + GRACE
        if time.monotonic() > deadline:
            for process in ranks:
                process.kill()
        time.sleep(0.1)
    late = ((number, process.returncode) for number, process in enumerate(ranks) if process.returncode)
    rank, code = failed or next(late, (0, 0))
    return rank, 128 - code if code < 0 else code


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])
