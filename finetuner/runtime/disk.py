"""What a full disk looks like through each library that writes, and how it is told."""

from __future__ import annotations

import errno
import glob
import os
import re
import resource
import shutil
from pathlib import Path

from finetuner.errors import CheckpointError, Problem

FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
WORDS = re.compile(r"os error (28|27|122)\b|No space left on device|File too large|Disk quota exceeded|unexpected pos")
"""safetensors and torch tell a full disk by words of their own only; the last is torch's."""


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` means that a disk, a quota or a file size limit is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    return not isinstance(error, CheckpointError) and WORDS.search(str(error)) is not None


def told_full(error: BaseException, parent: Path, unfinished: Path) -> CheckpointError:
    """E-DISK-FULL: what was needed (as much as the largest `checkpoint-*`, or what was written), and what is free."""
    written = _size(unfinished)
    family = re.sub(r"^\.tmp_|[0-9]*_[0-9]+$", "", unfinished.name)
    need = max([written, *(_size(path) for path in parent.glob(f"{glob.escape(family)}*") if not path.is_symlink())])
    have = shutil.disk_usage(parent).free + written
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    a_file = f"; no file may have more than {_bytes(limit)}" if limit != resource.RLIM_INFINITY else ""
    more = "more than " if need == written else ""
    return CheckpointError(
        Problem(
            "E-DISK-FULL",
            f"disk full: need {more}{_bytes(need)}, have {_bytes(have)}{a_file}",
            where=str(parent),
            found=str(error),
            fits="twice the size of a checkpoint free",
            remedy="free some space, keep fewer checkpoints, or give another folder",
        )
    )


def _size(folder: Path) -> int:
    """Bytes of the files in `folder`; a file that goes meanwhile counts as none."""
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _bytes(number: int) -> str:
    value = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
