"""One thing at a time, done in the background while training goes on; what goes wrong there is raised here."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from finetuner.runtime.log import warn


class Writer:
    """A thread that writes. Leaving the block waits for it, whatever ends the block."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "writer")
        self._under_way: Future[None] | None = None

    def begin(self, job: Callable[[], None]) -> None:
        """Starts `job`, once the one before is done.

        Raises: what the one before raised.
        """
        self.wait()
        self._under_way = self._thread.submit(job)

    def check(self) -> None:
        """Raises what a job raised that has ended, without waiting for one that has not."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Waits for what is under way; signals are heard meanwhile.

        Raises: what it raised, once.
        """
        job, self._under_way = self._under_way, None
        if job is not None:
            job.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.wait()
        except Exception as late:
            if error is None:
                raise
            warn(f"besides, the last checkpoint was not written: {late}")
        finally:
            self._thread.shutdown()
