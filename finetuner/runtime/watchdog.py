"""Ends a run of which a rank hangs or has gone, with every rank's stacks, where the others would wait for hours.

A rank that waits in a collective has no sign whether the one it waits for still comes. So each rank has a thread that
writes a beat into the store of the run: where its main thread is and since when. Ranks 0 and 1 read all beats and
judge (`beats.py`); each rank that learns of a verdict writes its stacks into its log and ends itself with exit code 5.

- A rank whose process has gone, or that failed while the others wait in a collective, ends them the same way.
- It needs only the store: our launcher, torchrun and srun, one machine or many, are the same to it.

"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import IO, Protocol

from finetuner.errors import FinetunerError, Problem, TrainingStopped
from finetuner.runtime.beats import OVER, SILENT, STEPS, Beat, judged
from finetuner.runtime.log import TOLD, tell
from finetuner.runtime.meeting import connect
from finetuner.runtime.ranks import rank, world

LIMIT = 600.0
"""Seconds that a step may take, unless longer ones have been seen."""
MERCY = 8.0
"""Seconds in which the ranks that another's failure reaches may end by themselves."""
ORPHANED = 20.0
"""Seconds that a rank gets to save and end after its launcher has been killed."""
EXIT = 5
WAITING = ("torch/distributed/", "runtime/dist.py")


class _Place:
    """Where the main thread is; it writes, the thread reads."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.phase, self.step, self.longest, self.since = "start or end", 0, 0.0, time.monotonic()

    def enter(self, phase: str) -> None:
        self.phase, self.since = phase, time.monotonic()


_place = _Place()


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A block of the main thread that is no step and may take as long as it needs."""
    before = _place.phase
    _place.enter(name)
    try:
        yield
    finally:
        _place.enter(before)


class Numbered(Protocol):
    """A step that is done."""

    @property
    def number(self) -> int: ...


def stepped(step: Numbered) -> bool:
    """A listener of the loop: the time until the next step counts from here. It never ends the run."""
    now = time.monotonic()
    if _place.phase == STEPS:
        _place.longest = max(_place.longest, now - _place.since)
    _place.step = step.number
    _place.enter(STEPS)
    return False


@contextlib.contextmanager
def watched(log: IO[str], limit: float) -> Iterator[None]:
    """A block of a run whose ranks watch one another; `limit` 0: none is taken for hanging.

    `kill -USR1` has a rank write its stacks into its log at any time; a crash (SIGSEGV) does so too.
    """
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    ours = not faulthandler.is_enabled()  # a test's own stays
    if ours:
        faulthandler.enable(log)
    _place.begin()
    watch = Watch(log, limit) if world() > 1 else None
    failed = ""
    try:
        if watch:
            watch.start()
        yield
    except FinetunerError as error:
        failed = str(error).split("\n")[0]
        raise
    except Exception as error:
        if watch and (cause := watch.lost()):
            raise TrainingStopped(cause) from error  # a rank that broke off mid-collective: the cause lies there
        failed = f"{type(error).__name__}: {error}".split("\n")[0]
        raise
    finally:
        if watch:
            watch.stop(failed)
        faulthandler.unregister(signal.SIGUSR1)
        if ours:
            faulthandler.disable()


class Watch:
    """The thread of one rank: beats, and judges where it is one of the judges."""

    def __init__(self, log: IO[str], limit: float) -> None:
        self._store = connect(timeout=datetime.timedelta(seconds=10))
        self._log, self._limit = log, limit
        self._tick = min(1.0, limit / 4) if limit else 1.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._seen: dict[int, tuple[int, float]] = {}
        self._mark: object = None
        self._moved, self._count = time.monotonic(), 0

    def start(self) -> None:
        """Begins to beat."""
        self._thread.start()

    def stop(self, failed: str) -> None:
        """Ends the watch; tells the others where this rank has failed."""
        self._over.set()
        self._thread.join(timeout=5)
        with contextlib.suppress(RuntimeError):  # the store is gone where rank 0 is
            if failed:
                self._store.compare_set("verdict", "", _verdict("lost", rank(), failed))
            self._store.set(f"beat/{rank()}", json.dumps(dataclasses.asdict(self._beat(OVER))))

    def lost(self) -> Problem | None:
        """What to tell where another rank has said that it failed."""
        with contextlib.suppress(RuntimeError):
            if self._store.check(["verdict"]):
                verdict = json.loads(self._store.get("verdict"))
                return _lost(verdict["rank"], verdict["found"]) if verdict["kind"] == "lost" else None
        return None

    def _run(self) -> None:
        reached, parent = time.monotonic(), os.getppid()
        while not self._over.wait(self._tick):
            if TOLD in os.environ and os.getppid() != parent and not self._over.wait(ORPHANED):
                os._exit(128 + signal.SIGTERM)
            try:
                self._store.set(f"beat/{rank()}", json.dumps(dataclasses.asdict(self._beat(_place.phase))))
                if rank() < 2 and self._limit:
                    self._judge()
                if self._store.check(["verdict"]):
                    self._obey(json.loads(self._store.get("verdict")))
                reached = time.monotonic()
            except RuntimeError:
                # The rank that held the store may have ended in order; then this one is about to end too.
                if time.monotonic() - reached > SILENT and not self._over.is_set():
                    self._end(Problem("E-RANK-LOST", "rank 0 has gone", found="its store is not reached"))

    def _beat(self, at: str) -> Beat:
        frames = sys._current_frames()
        frames.pop(threading.get_ident(), None)
        mark = {thread: _instructions(frame) for thread, frame in frames.items()}
        now = time.monotonic()
        if mark != self._mark:
            self._mark, self._moved = mark, now
        main = frames.get(threading.main_thread().ident or 0)
        self._count += 1
        age, still = now - _place.since, now - self._moved
        return Beat(at, _place.step, age, still, _place.longest, main is not None and _waits(main), self._count)

    def _judge(self) -> None:
        names = [f"beat/{number}" for number in range(world())]
        if not self._store.check(names):
            return
        beats = {number: Beat(**json.loads(text)) for number, text in enumerate(self._store.multi_get(names))}
        now = time.monotonic()
        for number, beat in beats.items():
            if number not in self._seen or self._seen[number][0] != beat.count:
                self._seen[number] = beat.count, now
        if found := judged(beats, {number: now - since for number, (_, since) in self._seen.items()}, self._limit):
            kind, suspect = found
            beat = beats[suspect]
            text = f"{beat.phase}, {beat.step} steps done, since {beat.age:.0f} s"
            self._store.compare_set("verdict", "", _verdict(kind, suspect, text))

    def _obey(self, verdict: Mapping[str, str | int]) -> None:
        kind, suspect, found = str(verdict["kind"]), int(verdict["rank"]), str(verdict["found"])
        if kind == "lost":
            if self._over.wait(MERCY):
                return  # the main thread ends by itself, and knows better why
            self._end(_lost(suspect, found))
        at = f"rank {suspect}"
        if kind == "silent":
            remedy = "see the log of its machine: memory that was full, a machine that went down"
            self._end(
                Problem("E-RANK-SILENT", f"{at} gives no sign of life", at, f"last seen in: {found}", remedy=remedy)
            )
        remedy = "see every rank's stacks in logs/rank-N.log; --hang-limit SECONDS gives more time, 0 any"
        fits = f"a step within {self._limit:g} s, or within ten times the longest one"
        what, stack = f"{at} hangs, and the others wait for it", self._stacks(suspect)
        self._end(
            Problem(
                "E-RANK-HANG",
                what,
                f"{at}: {found}",
                stack,
                fits,
                remedy,
            )
        )

    def _stacks(self, suspect: int) -> str:
        """Where the main thread of the suspected rank stands; it says so itself."""
        if rank() == suspect:
            main = sys._current_frames().get(threading.main_thread().ident or 0)
            self._store.set("stack", _described(main))
        with contextlib.suppress(RuntimeError):  # its process may be stopped altogether
            self._store.wait(["stack"], datetime.timedelta(seconds=3))
            return self._store.get("stack").decode()
        return "its process does not answer"

    def _end(self, problem: Problem) -> None:
        """Writes the stacks and ends the process: its main thread hears nothing."""
        print(f"\n{problem}\n", file=self._log, flush=True)
        faulthandler.dump_traceback(file=self._log, all_threads=True)
        first = True
        with contextlib.suppress(RuntimeError):
            first = self._store.add("told", 1) == 1
        if first or TOLD in os.environ:
            tell(str(problem))
        with contextlib.suppress(RuntimeError):
            # The first to end takes the main threads of the others along, before they have written their stacks.
            self._store.add("written", 1)
            for _ in range(30):
                if self._store.add("written", 0) >= world():
                    break
                time.sleep(0.1)
        if rank() == 0:
            time.sleep(1)  # it holds the store, from which the others still read
        os._exit(EXIT)


def _lost(number: int, found: str) -> Problem:
    remedy = f"see what it said, on the terminal of its machine or in logs/rank-{number}.log"
    return Problem("E-RANK-LOST", f"rank {number} has failed, and the others end with it", found=found, remedy=remedy)


def _verdict(kind: str, number: int, found: str) -> str:
    return json.dumps({"kind": kind, "rank": number, "found": found})


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _instructions(frame: FrameType) -> tuple[tuple[int, int], ...]:
    """Where each call of a thread's stack stands, to the instruction."""
    return tuple((id(one.f_code), one.f_lasti) for one in _frames(frame))


def _waits(frame: FrameType) -> bool:
    files = [(one.f_code.co_filename, one.f_code.co_name) for one in _frames(frame)]
    return any(name == "_engine_run_backward" or any(part in file for part in WAITING) for file, name in files)


def _described(frame: FrameType | None, depth: int = 8) -> str:
    """The innermost calls, one a line, the innermost first."""
    lines = [f"{one.f_code.co_filename}:{one.f_lineno} {one.f_code.co_name}" for one in _frames(frame)]
    return "\n".join(lines[:depth])
