"""Two threads that are quiet at the same time leave the libraries as they found them."""

from __future__ import annotations

import threading
import warnings

from transformers.utils import logging

from finetuner.model.quiet import quiet


def interleaved():
    """(verbosity, bars, filters) inside and after: another thread enters first and leaves last, or the other way."""
    inside = threading.Event(), threading.Event()

    def other():
        with quiet():
            inside[0].set()
            inside[1].wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside[0].wait(10)
    with quiet():
        within = logging.get_verbosity(), logging.is_progress_bar_enabled()
        inside[1].set()
        thread.join()
        still = logging.get_verbosity(), logging.is_progress_bar_enabled()
    return within, still


def test_the_last_one_out_puts_back():
    level, bars, filters = logging.get_verbosity(), logging.is_progress_bar_enabled(), list(warnings.filters)
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        within, still = interleaved()
        assert within == still == (logging.ERROR, False)
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)
        assert list(warnings.filters) == filters
    finally:
        logging.set_verbosity(level)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
