"""Keeps the libraries' own reports down: what matters of them is told as an error of ours, or in our log.

- Threads may be inside at the same time: a checkpoint is written while the model answers. The first sets, the last one
  out puts back.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from logging import ERROR, getLogger

from transformers.utils import logging

# peft imports bitsandbytes wherever it is installed, which then says that kernels of a hub are missing.
getLogger("bitsandbytes").setLevel(ERROR)

_turn = threading.Lock()
_before: list[tuple[int, bool]] = []
"""Verbosity and progress bars as each of those inside found them."""


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, warnings and loading reports of transformers and peft in the block."""
    with _turn:
        _before.append((logging.get_verbosity(), logging.is_progress_bar_enabled()) if not _before else _before[0])
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    # Filters of warnings are the process's: two threads that put them back would leave the one what the other had set.
    is_main = threading.current_thread() is threading.main_thread()
    try:
        with warnings.catch_warnings() if is_main else nullcontext():
            if is_main:
                warnings.simplefilter("ignore")
            yield
    finally:
        with _turn:
            level, bars = _before.pop()
            if not _before:
                logging.set_verbosity(level)
                if bars:
                    logging.enable_progress_bar()
