"""One log: rank 0 speaks to the terminal, every rank keeps a file of its own.

- Control characters are written as escapes: no row of data can drive a terminal.
- A rank's file holds all that it said, the traceback of what ended it, and the stacks that `watchdog` asks for.
- A rank that our launcher started leaves in the folder FINETUNER_TOLD what went wrong and where its log lies.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from finetuner.errors import printable
from finetuner.runtime.ranks import is_main, rank

TOLD = "FINETUNER_TOLD"
FOLLOWS = "error[E-RANK-LOST]"
"""How a rank's error begins that is but the end of another rank."""

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


def tell(text: str) -> None:
    """Says what ended this process; a rank of our launcher leaves it to that, which tells it once for all."""
    if TOLD in os.environ:
        place = Path(os.environ[TOLD], f"rank-{rank()}")
        place.with_suffix(".new").write_text(text, encoding="utf-8")
        place.with_suffix(".new").replace(place.with_suffix(".txt"))
        return
    print(text, file=sys.stderr, flush=True)
    if (report := os.environ.get("TORCHELASTIC_ERROR_FILE")) and not text.startswith(FOLLOWS):
        # torchrun shows the earliest of these as the root cause.
        about = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(report).write_text(json.dumps({"message": about}), encoding="utf-8")


def keep(folder: Path) -> logging.FileHandler:
    """Writes this rank's log into `folder`/rank-N.log too, until the handler is given to `drop`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{rank()}.log"
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    _log.addHandler(handler)
    if TOLD in os.environ:
        Path(os.environ[TOLD], f"rank-{rank()}.log").write_text(str(path.resolve()), encoding="utf-8")
    return handler


@contextlib.contextmanager
def tracing(handler: logging.FileHandler) -> Iterator[TextIO]:
    """Gives the log's file; an error of the block goes into it with its traceback, where the terminal shows a line."""
    assert handler.stream is not None, "opened when made"
    try:
        yield handler.stream
    except Exception as error:
        caught = (type(error), error, error.__traceback__)
        handler.handle(_log.makeRecord(_log.name, logging.ERROR, "", 0, "ended by:", (), caught))
        raise


def drop(handler: logging.Handler) -> None:
    """Ends a log that `keep` began."""
    _log.removeHandler(handler)
    handler.close()
