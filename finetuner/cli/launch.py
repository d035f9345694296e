"""Starts one process a rank on this machine, and ends all when one fails.

- The exit code is that of the rank that failed first, so that a script sees why (2 config, 3 data, 4 model, ...).
- One cause is told: a rank that a signal ended or that knows its error, before those that only lost their peers.
- SIGTERM and SIGINT are handed on: the ranks save and end, as one process does.
- No rank outlives the launcher, also where that is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from finetuner.cli.nodes import Nodes
from finetuner.errors import Problem
from finetuner.runtime.log import FOLLOWS, TOLD

GRACE = 20.0
"""Seconds that the other ranks get to end by themselves after one has failed."""
HURRY = 4.0
"""The same where the ranks themselves have found that one hangs or is silent: they have waited already."""
STUCK = ("error[E-RANK-HANG]", "error[E-RANK-SILENT]")
LAST_LINES = 5
"""Lines of a rank's log that are shown where it could not say what ended it."""


DIES_WITH = 1
"""PR_SET_PDEATHSIG of Linux's prctl.h."""
WHY = {
    signal.SIGKILL: "most often the system, for lack of memory (see dmesg): batch.per_device=1, or a smaller model",
    signal.SIGBUS: "most often a full /dev/shm or disk",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """A rank that did not end well."""

    rank: int
    code: int
    """As `subprocess` gives it: the exit code, or the signal's number below zero."""
    told: str
    """What it said of its end, if it could."""
    at: float
    """When it said so, or was seen to have ended."""


def launch(nodes: Nodes) -> int:
    """Runs this same command line as the ranks of this machine; gives the exit code."""
    with tempfile.TemporaryDirectory(prefix="finetuner-") as told:
        return launch_in(Path(told), nodes)


def launch_in(told: Path, nodes: Nodes) -> int:
    """As `launch`; the ranks leave what went wrong in the folder `told`."""
    ranks = start(told, nodes)
    asked = 0

    def hand_on(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = number
        for process in ranks.values():
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        failures = wait(ranks, told)
        # Ranks that a signal from outside ended, as it was meant to, have not failed.
        failures = [failure for failure in failures if failure.code not in (-asked, 128 + asked) or not asked]
        if failures:
            cause = cause_of(failures)
            print(report(cause, told, nodes.world), file=sys.stderr, flush=True)
            return 128 - cause.code if cause.code < 0 else cause.code
        return 128 + asked if any(process.returncode for process in ranks.values()) else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(told: Path, nodes: Nodes) -> dict[int, subprocess.Popen[bytes]]:
    """The processes of this machine, by rank."""
    port, ranks = str(nodes.port or free_port()), {}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nodes.nproc))}
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def tie() -> None:
        if libc is not None:
            libc.prctl(DIES_WITH, signal.SIGTERM)

    for local in range(nodes.nproc):
        rank = nodes.node_rank * nodes.nproc + local
        place = {"RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(nodes.world)}
        place |= {"LOCAL_WORLD_SIZE": str(nodes.nproc), "GROUP_RANK": str(nodes.node_rank)}
        place |= {"MASTER_ADDR": nodes.host, "MASTER_PORT": port, TOLD: str(told)}
        command = [sys.executable, "-m", "finetuner", *sys.argv[1:]]
        # A session of its own: Ctrl-C reaches a rank once, through the launcher; twice would end it unsaved.
        ranks[rank] = subprocess.Popen(
            command, env=threads | os.environ | place, start_new_session=True, preexec_fn=tie
        )  # fmt: skip
    return ranks


def wait(ranks: dict[int, subprocess.Popen[bytes]], told: Path) -> list[Failure]:
    """The ranks that failed by themselves; after the first one the others get `GRACE` seconds, then they are ended."""
    ended: dict[int, float] = {}
    deadline, late = float("inf"), set[int]()
    while any(process.poll() is None for process in ranks.values()):
        for rank, process in ranks.items():
            if rank not in ended and (process.poll() or said(told, rank)):
                ended[rank] = time.time()
                given = HURRY if said(told, rank).startswith(STUCK) else GRACE
                deadline = min(deadline, time.monotonic() + given)
        if time.monotonic() > deadline:
            late = end(ranks)
        time.sleep(0.1)
    failures = []
    for rank, process in ranks.items():
        file = told / f"rank-{rank}.txt"
        text, at = (
            (file.read_text("utf-8"), file.stat().st_mtime) if file.exists() else ("", ended.get(rank, time.time()))
        )
        if rank in late and text:
            failures.append(Failure(rank, 5, text, at))  # it told its end, and hung in it
        elif process.returncode and rank not in late:
            failures.append(Failure(rank, process.returncode, text, at))
    return failures


def said(told: Path, rank: int) -> str:
    """What a rank said of its end; the empty string if it has not."""
    file = told / f"rank-{rank}.txt"
    return file.read_text("utf-8") if file.exists() else ""


def end(ranks: dict[int, subprocess.Popen[bytes]]) -> set[int]:
    """Ends the ranks that still run, after each has written its stacks into its log; gives them."""
    late = {rank for rank, process in ranks.items() if process.poll() is None}
    for rank in late:
        ranks[rank].send_signal(signal.SIGUSR1)
    time.sleep(1)
    for rank in late:
        ranks[rank].kill()
        ranks[rank].wait()
    return late


def cause_of(failures: list[Failure]) -> Failure:
    """The failure that brought the others: never one that only lost its peers, where there is another; the first."""

    def order(failure: Failure) -> tuple[bool, float, int]:
        return failure.told.startswith(FOLLOWS), failure.at if failure.told else 0.0, failure.rank

    return min(failures, key=order)


def report(cause: Failure, told: Path, world: int) -> str:
    """What is told of the failure: the rank's own words, or how it ended and what it said last."""
    place, log = f"rank {cause.rank} of {world}", told / f"rank-{cause.rank}.log"
    path = Path(log.read_text("utf-8")) if log.exists() else None
    if cause.told:
        code = 128 - cause.code if cause.code < 0 else cause.code
        see = f"; its traceback: {path}" if path else ""
        return f"{cause.told}\n{place} ended first, with {code}{see}"
    where, found = (f"{place}, {path}", last_lines(path)) if path else (place, "it had no log yet")
    if cause.code > 0:
        return str(Problem("E-RANK-DIED", f"{place} ended without a word, with {cause.code}", where, found))
    name = signal.Signals(-cause.code).name
    why = WHY.get(signal.Signals(-cause.code), "the log holds the stack where it stood, if it could be written")
    return str(Problem("E-RANK-DIED", f"{place} was ended by {name}", where, found, remedy=why))


def last_lines(log: Path) -> str:
    """What a rank's log ends with; where Python saw a crash, how its account of that begins."""
    lines = log.read_text("utf-8", errors="replace").splitlines() if log.exists() else []
    crash = [index for index, line in enumerate(lines) if line.startswith("Fatal Python error")]
    shown = lines[crash[-1] :][: 2 * LAST_LINES] if crash else lines[-LAST_LINES:]
    return "\n".join(["it said last:", *shown])


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])
