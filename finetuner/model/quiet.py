"""Keeps the libraries' own reports down: what matters of them is told as an error of ours, or in our log."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger

from transformers.utils import logging

# peft imports bitsandbytes wherever it is installed, which then says that kernels of a hub are missing.
getLogger("bitsandbytes").setLevel(ERROR)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, warnings and loading reports of transformers and peft in the block."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
