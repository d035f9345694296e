"""One folder filled by several ranks' threads, which never talk: markers in the folder tell the main rank who is done.

    main rank:    make the folder -> begin -> own files -> collect: wait for each rank's marker -> commit
    other ranks:  wait for `begin` -> own files, fsynced -> marker "done" with their sizes, or "failed" with the reason

- Ranks agree on the folder's name and on a token beforehand, so that none takes an older folder for this one.
- A wait ends when nothing has been written for `PATIENCE`: a rank may have died, or not see the main rank's disk.
- Where the main rank gave up, its folder is gone; the others then stop quietly, since the main rank tells why.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from finetuner.errors import CheckpointError, FinetunerError, Problem
from finetuner.runtime.commit import fsync, write_file
from finetuner.runtime.disk import is_disk_full, told_full
from finetuner.runtime.fault import fault
from finetuner.runtime.log import warn

PATIENCE = 600.0
"""Seconds without a new byte from the others."""
GLANCE = 0.02
"""Seconds between two looks."""


def begin(folder: Path, token: str) -> None:
    """On the main rank: from here on the others write into `folder`."""
    fault("mkdir")
    _markers(folder, token).mkdir()


def collect(folder: Path, token: str, ranks: Iterable[int]) -> None:
    """On the main rank: waits until each of `ranks` has written its files, and removes the markers.

    Raises:
        CheckpointError: a rank failed (with what it tells itself), or nothing came of it for long (E-RANKS-WRITE).
    """
    waiting, sizes, since = set(ranks), -1, time.monotonic()
    while waiting := {rank for rank in waiting if not _is_done(folder, token, rank)}:
        now = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if now != sizes:
            sizes, since = now, time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            who = ", ".join(f"rank {rank}" for rank in sorted(waiting))
            raise _silent(folder, f"nothing of {who} for {PATIENCE:.0f} s")
        time.sleep(GLANCE)
    shutil.rmtree(_markers(folder, token))


def contribute(folder: Path, token: str, rank: int, names: Sequence[str], fill: Callable[[Path], None]) -> None:
    """On another rank: has `fill` write the files `names` into `folder`, and tells the main rank.

    Raises: what `fill` raises, as the main rank then does; E-RANKS-WRITE where the main rank's folder does not appear.
    """
    markers, since = _markers(folder, token), time.monotonic()
    while not markers.is_dir():
        if time.monotonic() - since > PATIENCE:
            raise _silent(folder, f"rank {rank} has not seen the main rank's folder for {PATIENCE:.0f} s")
        time.sleep(GLANCE)
    try:
        fill(folder)
        for name in names:
            fsync(folder / name)
        _mark(markers, rank, "done", {name: (folder / name).stat().st_size for name in names})
    except Exception as error:
        if not markers.is_dir():
            warn(f"rank {rank}: the main rank gave up {folder.name}, so this part of it is not written")
            return
        told = _told(error, folder, rank)
        for name in names:
            (folder / name).unlink(missing_ok=True)  # on a full disk, room for the marker
        _mark(markers, rank, "failed", [asdict(problem) for problem in told.problems])
        raise told from error


def _is_done(folder: Path, token: str, rank: int) -> bool:
    markers = _markers(folder, token)
    failed, done = markers / f"rank-{rank}.failed", markers / f"rank-{rank}.done"
    if failed.exists():
        raise CheckpointError(*(Problem(**problem) for problem in json.loads(failed.read_text(encoding="utf-8"))))
    if not done.exists():
        return False
    for name, size in json.loads(done.read_text(encoding="utf-8")).items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            raise _silent(folder / name, f"{found} bytes of the {size} that rank {rank} wrote")
    return True


def _mark(markers: Path, rank: int, kind: Literal["done", "failed"], body: object) -> None:
    """The marker is there as a whole or not at all."""
    half = markers / f"rank-{rank}.part"
    half.unlink(missing_ok=True)
    write_file(half, json.dumps(body).encode())
    fault("rename")
    os.replace(half, markers / f"rank-{rank}.{kind}")


def _markers(folder: Path, token: str) -> Path:
    return folder / f".ranks-{token}"


def _told(error: Exception, folder: Path, rank: int) -> FinetunerError:
    if isinstance(error, FinetunerError):
        return error
    if is_disk_full(error):
        return told_full(error, folder.parent, folder)
    what, remedy = f"rank {rank} could not write its part of a checkpoint", "see the log of this rank"
    found = f"{type(error).__name__}: {error}"
    return CheckpointError(Problem("E-RANKS-WRITE", what, str(folder.parent), found, remedy=remedy))


def _silent(where: Path, found: str) -> CheckpointError:
    what, fits = "a checkpoint that several ranks write is not complete", "one folder that all ranks see"
    remedy = "give a folder on a disk that all machines share: --folder DIR; see the logs of the ranks"
    return CheckpointError(Problem("E-RANKS-WRITE", what, str(where), found, fits, remedy))
