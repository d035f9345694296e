"""A ready config copied out of the package, with the files that it imports, so that it runs where it lies."""

from __future__ import annotations

import os
from pathlib import Path

from finetuner.config.files import imported
from finetuner.config.node import spot
from finetuner.config.ready import ready
from finetuner.errors import ConfigError, Problem, UsageError, nearest


def copy_ready(name: str, dest: Path) -> list[Path]:
    """The files written: the config first, then those that it imports, at the same places relative to it.

    `dest` is a folder, or the copy's own name.py. A file that is there already with the same text is left as it is.

    Raises: UsageError E-COPY-NAME; ConfigError E-COPY-EXISTS before anything is written.
    """
    known = ready()
    name = name.removesuffix(".py")
    if name not in known:
        best = nearest(name, known)
        remedy = f"did you mean {best}?" if best else "see `finetuner list`"
        raise UsageError(Problem("E-COPY-NAME", f"there is no ready config {name!r}", found=name, remedy=remedy))
    source = known[name]
    target = dest if dest.suffix == ".py" else dest / source.name
    pairs = {source: target} | {
        file: Path(os.path.normpath(target.parent / os.path.relpath(file, source.parent)))
        for file in closure(source)
        if file != source
    }
    taken = [new for old, new in pairs.items() if occupied(new, old, exact=old == source)]
    if taken:
        remedy = "give another DEST, or move the file away"
        problems = [
            Problem("E-COPY-EXISTS", "copy never overwrites a file", spot(os.path.abspath(new)), remedy=remedy)
            for new in taken
        ]
        raise ConfigError(*problems)
    for old, new in pairs.items():
        try:
            new.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            where, remedy = spot(os.path.abspath(new.parent)), "give a folder that you may write to, or NAME.py in one"
            problem = Problem("E-COPY-DEST", "the folder to copy into cannot be made", where, str(error), remedy=remedy)
            raise ConfigError(problem) from error
        if not new.exists():
            new.write_bytes(old.read_bytes())
    return list(pairs.values())


def occupied(new: Path, old: Path, *, exact: bool) -> bool:
    """Whether a file stands in the way; one of the same text does not, unless it is the config itself (`exact`)."""
    if not os.path.lexists(new):
        return False
    return exact or not new.is_file() or new.read_bytes() != old.read_bytes()


def closure(file: Path) -> list[Path]:
    """The file and all config files that it imports, directly or through others."""
    found: list[Path] = []
    waiting = [file]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.append(current)
            waiting += imported(current)
    return found
