"""What memory is left is the least that the machine and the process's control groups leave."""

from __future__ import annotations

import pytest

from finetuner.runtime.memory import available

GIB = 1 << 30


def machine(folder, *, free=None, group=None, limits=()):
    """A /proc and a /sys/fs/cgroup; `limits` are (folder, limit, used, cached)."""
    proc, groups = folder / "proc", folder / "groups"
    (proc / "self").mkdir(parents=True)
    groups.mkdir()
    if free is not None:
        (proc / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable:   {free >> 10} kB\n")
    if group is not None:
        (proc / "self" / "cgroup").write_text(f"1:cpu:/elsewhere\n0::{group}\n")
    for name, limit, used, cached in limits:
        (groups / name).mkdir(parents=True, exist_ok=True)
        (groups / name / "memory.max").write_text(f"{limit}\n")
        (groups / name / "memory.current").write_text(f"{used}\n")
        (groups / name / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nfile 7\n")
    return proc, groups


@pytest.mark.parametrize(
    ("made", "left"),
    [
        ({}, None),
        ({"free": 8 * GIB}, 8 * GIB),
        ({"free": 8 * GIB, "group": "/"}, 8 * GIB),
        ({"free": 8 * GIB, "group": "/", "limits": [("", 4 * GIB, 3 * GIB, GIB)]}, 2 * GIB),
        ({"free": GIB, "group": "/", "limits": [("", 4 * GIB, 0, 0)]}, GIB),
        ({"free": 8 * GIB, "group": "/a/b", "limits": [("a/b", "max", 1, 0), ("a", 5 * GIB, 2 * GIB, 0)]}, 3 * GIB),
        ({"free": 8 * GIB, "group": "/a", "limits": [("a", GIB, 2 * GIB, 0)]}, 0),
        ({"group": "/a", "limits": [("b", GIB, 0, 0)]}, None),
    ],
)
def test_the_least_counts(made, left, tmp_path):
    assert available(*machine(tmp_path, **made)) == left


def test_this_machine_says_something():
    left = available()
    assert left is None or left > 0
