"""How memory is held is set before there is any, told, and left to whoever has said otherwise."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys

import pytest

from finetuner.runtime import allocator
from finetuner.runtime.allocator import NAME, OLD_NAMES, keep_freed, set_before_torch, settle

GLIBC = platform.libc_ver()[0] == "glibc"


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """An environment that says nothing of memory."""
    for name in [name for name in os.environ if name.startswith(allocator.OWN) or name in (NAME, *OLD_NAMES)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(NAME, "x")  # so that it is put back
    monkeypatch.delenv(NAME)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(allocator, "say", lines.append)
    return lines


def test_cudas_segments_grow_unless_the_person_says_how_torch_allocates(monkeypatch):
    set_before_torch()
    assert os.environ[NAME] == "expandable_segments:True"
    for name in (NAME, *OLD_NAMES):
        monkeypatch.delenv(NAME, raising=False)
        monkeypatch.setenv(name, "max_split_size_mb:64")
        set_before_torch()
        assert [os.environ.get(known) for known in (NAME, *OLD_NAMES)].count("max_split_size_mb:64") == 1
        assert "expandable_segments:True" not in os.environ.values()
        monkeypatch.delenv(name)


def test_torch_reads_the_name_that_is_set():
    """The library itself knows it: a renamed variable would be set for nobody."""
    import torch

    libraries = os.path.join(os.path.dirname(torch.__file__), "lib")
    with open(os.path.join(libraries, "libc10.so"), "rb") as file:
        assert NAME.encode() in file.read()


def test_what_cuda_goes_by_is_told(said, monkeypatch):
    set_before_torch()
    settle("cuda")
    monkeypatch.setenv(OLD_NAMES[0], "backend:native")
    settle("cuda")
    assert said == [f"CUDA memory: {NAME}=expandable_segments:True", f"CUDA memory: {OLD_NAMES[0]}=backend:native"]


@pytest.mark.skipif(not GLIBC, reason="needs glibc")
def test_a_cpu_keeps_what_was_freed_and_tells(said):
    settle("cpu")
    assert len(said) == 1
    assert "stays with the process" in said[0]


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_CONF"])
def test_a_persons_own_allocator_settings_are_left_alone(name, said, monkeypatch):
    monkeypatch.setattr(allocator, "keep_freed", lambda: pytest.fail("settings of ours over the person's"))
    monkeypatch.setenv(name, "1")
    settle("cpu")
    assert not said


def test_nothing_is_set_or_told_without_glibc(said, monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("no mallopt to call"))
    assert not keep_freed()
    settle("cpu")
    settle("mps")
    assert not said


MAPPED = """
import ctypes, sys
from finetuner.runtime.allocator import keep_freed
if sys.argv[1] == "keep":
    assert keep_freed()
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
block = malloc(100 << 20)
ctypes.memset(block, 1, 100 << 20)
free(block)
print(open("/proc/self/status").read())
"""


@pytest.mark.skipif(not GLIBC, reason="needs glibc")
def test_a_large_block_that_was_freed_stays_with_the_process():
    held = {}
    for kind in ("keep", "own"):
        done = subprocess.run([sys.executable, "-c", MAPPED, kind], capture_output=True, text=True, check=True)
        held[kind] = int(re.search(r"VmRSS:\s+(\d+) kB", done.stdout).group(1)) / 1024
    assert held["keep"] - held["own"] > 80, held
