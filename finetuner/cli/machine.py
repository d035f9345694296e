"""What the machine could not do for a command, a file, memory, a process more, told like any other error."""

from __future__ import annotations

import errno

from finetuner.errors import FinetunerError, Problem, TrainingStopped, UsageError

LESS = "batch.per_device=1, a smaller data.length, model.checkpointing=True, an adapter, or model.quant=NF4()"
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe [", "gloo/transport")
"""What gloo says, as a plain RuntimeError, of a process that it no longer reaches."""
LIMITS = {
    errno.EMFILE: "raise the limit of open files: ulimit -n 4096",
    errno.ENFILE: "end other programs: the machine has no more open files to give",
    errno.EAGAIN: "raise the limit of processes: ulimit -u",
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some space of your quota",
    errno.EFBIG: "raise the limit of a file's size: ulimit -f",
    errno.EACCES: "mend its permissions, or give another place",
    errno.EROFS: "give a place that can be written to",
}


def of_the_machine(error: Exception) -> FinetunerError | None:
    """The error to tell, or None where `error` is no matter of the machine."""
    # torch's kind of it has this name; it is not imported for the sake of an error.
    names = [kind.__name__ for kind in type(error).__mro__]
    no_room = "OutOfMemoryError" in names or "MemoryError" in names or "can't allocate memory" in str(error)
    if no_room:
        found = str(error).split("\n")[0][:300]
        return TrainingStopped(Problem("E-MEMORY", "memory is full", found=found, fits="less at once", remedy=LESS))
    if "DistError" in names or any(text in str(error) for text in LOST):
        found, remedy = (
            str(error).split("\n")[0][:300],
            "see what that rank said: its machine's terminal, logs/rank-N.log",
        )
        return TrainingStopped(Problem("E-RANK-LOST", "another rank of the run has gone", found=found, remedy=remedy))
    if isinstance(error, OSError) and error.errno is not None:
        where = str(error.filename or "the operating system")
        remedy = LIMITS.get(error.errno, "see that it is there and yours, or give another; --debug shows where")
        what = "a file, a folder or the machine refuses"
        return UsageError(Problem("E-MACHINE", what, where, error.strerror or str(error), remedy=remedy))
    return None
