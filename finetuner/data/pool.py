"""`parts_of`: chunks of rows -> encoded parts, in the order of the chunks, by several processes where there are many.

- Chunk k goes to worker k modulo their number, and each has one chunk at a time: neither side can block the other.
- A worker that dies closes its link, which is told at once; a parent that dies closes all links, and its workers end.
  (`concurrent.futures` may wait for ever in the first case, cpython #94777, and leaves workers behind in the second.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from finetuner.config.function import function_reference
from finetuner.data.worker import Encoding, Job, Part, serve
from finetuner.errors import DataError, FinetunerError, Problem
from finetuner.runtime.files import Found

FEW = 8
"""Chunks that are not worth starting workers for."""
Chunk = tuple[int, list[Found]]
"""The number of the first row, and the rows."""


def parts_of(job: Job, chunks: Iterator[Chunk], workers: int) -> Iterator[Part]:
    """The encoded chunks, in their order.

    Raises:
        DataError: E-DATA-WORKER, a worker has died.
    """
    head = list(islice(chunks, FEW))
    if workers < 2 or len(head) < FEW:
        encoding = Encoding(job)
        for first, chunk in chain(head, chunks):
            yield encoding(first, chunk)
        return
    assert not isinstance(job.rows, str)
    named = replace(job, rows=function_reference(job.rows))
    started = [_start(named) for _ in range(workers)]
    try:
        yield from _shared(started, chain(head, chunks))
    finally:
        for worker in started:
            worker.link.close()
        for worker in started:
            worker.process.join(timeout=5)
            worker.process.kill()
            worker.process.join()


@dataclass(slots=True)
class _Worker:
    process: SpawnProcess
    link: Connection
    busy: bool = False

    def give(self, chunk: Chunk) -> None:
        try:
            self.link.send(chunk)
        except ConnectionError:
            # It may have said why before it ended.
            self.take()
            raise self._death() from None
        self.busy = True

    def take(self) -> Part:
        try:
            part: Part | FinetunerError = self.link.recv()
        except (EOFError, ConnectionError):
            raise self._death() from None
        if isinstance(part, FinetunerError):
            raise part
        self.busy = False
        return part

    def _death(self) -> DataError:
        self.process.join()
        return DataError(
            Problem(
                "E-DATA-WORKER",
                "a process that reads rows has died",
                found=f"exit code {self.process.exitcode}",
                fits="enough memory for each",
                remedy="close other programs, and start again",
            )
        )


def _start(job: Job) -> _Worker:
    context = get_context("spawn")
    own, its = context.Pipe()
    process = context.Process(target=serve, args=(its, job), daemon=True)
    process.start()
    its.close()
    return _Worker(process, own)


def _shared(workers: list[_Worker], chunks: Iterator[Chunk]) -> Iterator[Part]:
    number = 0
    for number, chunk in enumerate(chunks, 1):
        worker = workers[(number - 1) % len(workers)]
        part = worker.take() if worker.busy else None
        worker.give(chunk)
        if part is not None:
            yield part
    for later in range(number, number + len(workers)):
        worker = workers[later % len(workers)]
        if worker.busy:
            yield worker.take()
