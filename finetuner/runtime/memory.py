"""How much memory of this machine a process may still take."""

from __future__ import annotations

import re
from pathlib import Path

AVAILABLE = re.compile(r"^MemAvailable:\s+([0-9]+) kB$", re.MULTILINE)
CACHE = re.compile(r"^inactive_file ([0-9]+)$", re.MULTILINE)
GROUP = re.compile(r"^0::/(.*)$", re.MULTILINE)


def available(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can be taken before something is swapped out or ended; None where the system does not say.

    The kernel's own estimate (proc_meminfo(5), MemAvailable), and what is left to each control group (version 2) that
    the process is in: a container sees the memory of the whole machine in the first.
    """
    found = AVAILABLE.search(_text(proc / "meminfo"))
    group = GROUP.search(_text(proc / "self" / "cgroup"))
    inner = groups / group[1] if group else groups
    limits = [left for folder in (inner, *inner.parents) if folder.is_relative_to(groups) for left in _left(folder)]
    known = [*limits, *([int(found[1]) * 1024] if found else [])]
    return min(known, default=None)


def _left(group: Path) -> list[int]:
    """What a group with a limit may still take; what is cached of files counts as free, as in MemAvailable."""
    limit, used = _text(group / "memory.max").strip(), _text(group / "memory.current").strip()
    if not (limit.isdecimal() and used.isdecimal()):
        return []
    cached = CACHE.search(_text(group / "memory.stat"))
    return [max(0, int(limit) - int(used) + (int(cached[1]) if cached else 0))]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
