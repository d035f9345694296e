"""`lock`: one process at a time, over all processes of a machine and of a shared file system; freed by death."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetuner.errors import Problem, UsageError


@contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Holds the lock file `path` (made where missing, never deleted, so that all lock the same file).

    Raises:
        UsageError: E-LOCK, another process holds it and `wait` is false.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        what, remedy = (
            "a folder cannot be written in",
            "give another folder (for a cache: XDG_CACHE_HOME=DIR), or mend it",
        )
        found = error.strerror or str(error)
        raise UsageError(Problem("E-FOLDER-WRITE", what, str(path.parent), found, remedy=remedy)) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip()
            raise UsageError(
                Problem(
                    "E-LOCK",
                    "another process is at work here",
                    where=str(path.parent),
                    found=f"process {holder}" if holder else "a lock that is held",
                    fits="one process at a time",
                    remedy="wait for it to end, or give another folder",
                )
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
