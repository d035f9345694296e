"""Fault points: places where a test may end or slow the process, as a power cut or a full disk queue would.

- `FINETUNER_FAULT=rename:3` ends the process, as kill -9 does, at the third pass of "rename"; `*:3` of any point.
- Passes are counted over all threads: a checkpoint is written by one of its own.
- `FINETUNER_SLOW=fsync:0.2` sleeps 0.2 s at each pass of "fsync", so that a kill from outside meets it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from typing import Literal, TypeAlias

Point: TypeAlias = Literal["mkdir", "open", "write", "fsync", "rename", "unlink", "link"]

_passes: Counter[str] = Counter()
_counting = threading.Lock()


def fault(point: Point) -> None:
    """Passes; or sleeps, or ends the process with code 137, where the environment asks for it."""
    slow, end = os.environ.get("FINETUNER_SLOW"), os.environ.get("FINETUNER_FAULT")
    if slow is not None:
        name, _, seconds = slow.partition(":")
        if name in (point, "*"):
            time.sleep(float(seconds))
    if end is not None:
        name, _, number = end.partition(":")
        with _counting:
            _passes.update((point, "*"))
            if name in (point, "*") and _passes[name] == int(number):
                os._exit(137)
