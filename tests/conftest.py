"""Tests run offline, on one thread, with no cache but their own."""

import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", NO_COLOR="1")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "whole")]


def pytest_configure(config):
    """Each test process has a sample cache of its own."""
    import tempfile

    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="finetuner-tests-")
