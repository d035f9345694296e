"""One log: rank 0 speaks to the terminal, every rank keeps a file of its own.

- Control characters are written as escapes: no row of data can drive a terminal.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from finetuner.errors import printable
from finetuner.runtime.ranks import is_main, rank

_log = logging.getLogger("finetuner")
_log.setLevel(logging.INFO)
_log.propagate = False


class _Speaker(logging.Handler):
    """Writes to whatever standard error is at the moment, so that a progress bar or a test can stand in between."""

    def emit(self, record: logging.LogRecord) -> None:
        if is_main():
            print(record.getMessage(), file=sys.stderr, flush=True)


_log.addHandler(_Speaker())


def say(text: str) -> None:
    """Tells the person, once over all ranks."""
    _log.info(printable(text))


def warn(text: str) -> None:
    """Tells the person something that may be wrong."""
    _log.warning("warning: %s", printable(text))


def keep(folder: Path) -> logging.Handler:
    """Writes this rank's log into `folder`/rank-N.log too, until the handler is given to `drop`."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank-{rank()}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    _log.addHandler(handler)
    return handler


def drop(handler: logging.Handler) -> None:
    """Ends a log that `keep` began."""
    _log.removeHandler(handler)
    handler.close()
