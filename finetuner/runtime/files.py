"""Files of rows: where they lie, what they are, and one row after another with its place.

- What a file is, is seen in the file: a gzip named .jsonl is read, a parquet file named .json is told.
- A row that cannot be read is a value, `BadRow`, so that the caller decides; a file that cannot be read is a DataError.
- Memory is flat: one row, or one block of a file, at a time.
"""

from __future__ import annotations

import errno
import glob
import gzip
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from finetuner.errors import DataError, Problem, nearest

MOST = 200_000_000
"""Bytes of a row; a longer one is refused."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used. `kind` is a stable short word by which reports count."""

    place: str
    kind: str
    reason: str
    found: str = ""
    fits: str = ""


Found: TypeAlias = tuple[str, dict[str, Any]] | BadRow
"""A place, "file:line", and the row there; or why there is none."""
Reader: TypeAlias = Callable[[str, BinaryIO], Iterator[Found]]
"""The rows of an opened file, given its name."""

MAGIC = (
    (b"PAR1", "a Parquet file", "Parquet(...)"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it"),
    (b"\xfd7zXZ", "an xz archive", "unpack it"),
    (b"BZh", "a bzip2 archive", "unpack it"),
    (b"ARROW1", "an Arrow file", "save it as Parquet"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "git lfs pull"),
)


def find_files(files: str | Sequence[str], suffixes: tuple[str, ...]) -> list[Path]:
    """The files that paths, globs and folders name, sorted within each; a folder gives those that end in `suffixes`.

    Raises:
        DataError: nothing is there, no file fits, or one cannot be looked at.
    """
    names = [files] if isinstance(files, str) else list(files)
    found = [path for name in names for path in _named(name, suffixes)]
    twice = next((path for number, path in enumerate(found) if path in found[:number]), None) if names[1:] else None
    if twice is not None:
        raise DataError(
            Problem(
                "E-DATA-TWICE",
                "a file is named twice",
                where=str(twice),
                found=", ".join(names),
                fits="each file once",
                remedy="take one of the two out; Mix repeats data on purpose",
            )
        )
    return found


def read_rows(path: Path, reader: Reader) -> Iterator[Found]:
    """The rows of one file through `reader`; a gzip file is unpacked on the way.

    Raises:
        DataError: the file cannot be opened, is of another kind, ends early, or holds no row.
    """
    empty = True
    try:
        with _opened(path) as file:
            _refuse_other_kinds(path, file)
            for found in reader(str(path), file):
                empty = False
                yield found
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        what = "a gzip file is cut or damaged"
        raise _refusal("E-DATA-GZIP", what, path, str(error), remedy="fetch it again") from None
    except OSError as error:
        raise unreadable(path, error) from None
    if empty:
        size = path.stat().st_size
        found_text = "0 bytes" if size == 0 else f"{size} bytes, but no row"
        raise _refusal("E-DATA-EMPTY", "a file of data is empty", path, found_text, "one row or more", "take it out")


def _opened(path: Path) -> BinaryIO:
    """The file's bytes, unpacked if it is a gzip file."""
    raw = path.open("rb")
    return cast(BinaryIO, gzip.open(raw)) if raw.peek(2)[:2] == b"\x1f\x8b" else raw


def unreadable(path: Path, error: OSError) -> DataError:
    """What to say of a path that the system does not let us read."""
    match error.errno:
        case errno.EACCES | errno.EPERM:
            return _refusal(
                "E-DATA-PERMISSION",
                "a file of data may not be read",
                path,
                "permission denied",
                remedy=f"chmod +r {path}",
            )
        case errno.ELOOP:
            return _refusal(
                "E-DATA-LOOP",
                "a link leads back to itself",
                path,
                "a loop of symbolic links",
                remedy="name the file itself",
            )
        case errno.ENOENT if path.is_symlink():
            target = os.readlink(path)
            remedy = f"mend the link, or name another file than {path}"
            return _refusal("E-DATA-MISSING", "a link leads to nothing", path, target, "a file", remedy)
        case errno.ENOENT:
            return _missing(str(path))
        case _:
            return _refusal(
                "E-DATA-READ",
                "a file of data cannot be read",
                path,
                error.strerror or str(error),
                remedy="see that it can be read: head " + str(path),
            )


def _named(name: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of one path, glob or folder."""
    path = Path(name).expanduser()
    if "\0" in name:
        raise _refusal("E-DATA-MISSING", "a path holds the character NUL", path, "\\x00", "a path", "write it anew")
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ENOENT and not path.is_symlink() and glob.has_magic(name):
            found = [Path(item) for item in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(item)]
            if found:
                return found
        raise unreadable(path, error) from None
    if stat.S_ISREG(mode):
        return [path]
    if not stat.S_ISDIR(mode):
        what, remedy = "a path of data is no file", "write the rows to a file first"
        raise _refusal("E-DATA-KIND", what, path, "a device, pipe or socket", "a file or folder", remedy)
    return _within(path, suffixes)


def _within(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files below `folder` that end in one of `suffixes`; hidden ones and linked folders are left out."""
    inside: list[Path] = []
    try:
        for root, folders, names in os.walk(folder, onerror=_raise):
            folders[:] = [item for item in folders if not item.startswith(".")]
            inside += [Path(root, item) for item in names if not item.startswith(".")]
    except OSError as error:
        raise unreadable(Path(error.filename), error) from None
    found = sorted(path for path in inside if path.name.lower().endswith(suffixes))
    if not found:
        others = ", ".join(sorted(path.name for path in inside)[:5])
        raise _refusal(
            "E-DATA-MISSING",
            "no file in this folder fits",
            folder,
            others or "an empty folder",
            "names that end in " + ", ".join(suffixes),
            "name the files themselves",
        )
    return found


def _missing(name: str) -> DataError:
    """Names what stands nearest to a path that is not there."""
    parent = Path(name).parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    wanted = Path(name).relative_to(parent).parts[0]
    try:
        names = sorted(name for name in os.listdir(parent) if not name.startswith("."))
    except OSError:
        names = []
    best = nearest(wanted, names)
    fits = "in " + str(parent.absolute()) + ": " + (", ".join(names[:8]) + (", ..." if names[8:] else "") or "nothing")
    remedy = f"did you mean {parent / best}?" if best else "give a path that is there"
    return DataError(Problem("E-DATA-MISSING", "no such file", where=name, found="nothing", fits=fits, remedy=remedy))


def _refuse_other_kinds(path: Path, file: BinaryIO) -> None:
    """Tells a file that is of another kind than text; `file` stands at its start again afterwards."""
    head = file.read(32)
    file.seek(0)
    for magic, kind, remedy in MAGIC:
        if head.startswith(magic):
            raise _refusal("E-DATA-KIND", "a file of data is of another kind", path, kind, "UTF-8 text", remedy)


def _refusal(code: str, what: str, path: Path, found: str, fits: str = "", remedy: str = "") -> DataError:
    return DataError(Problem(code, what, where=str(path), found=found, fits=fits, remedy=remedy))


def _raise(error: OSError) -> None:
    raise error
