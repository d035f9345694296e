"""`commit_dir`: a folder that is there as a whole or not at all, whatever ends the process meanwhile.

Fill `.tmp_NAME_PID` beside it -> fsync each file -> MANIFEST.json (size and sha256 of each file) -> fsync
-> rename to NAME -> fsync the parent.

- A folder is complete if its manifest verifies; nothing else is trusted.
- What is deleted is renamed to `.del_NAME_PID` first: a half-deleted folder never bears a name that counts.
- A crash between the two renames of a replacement leaves no NAME; `sweep` then brings the new, complete one in.
- `fault` passes at every step that a crash could fall behind, so that tests can end the process at each.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from finetuner.errors import CheckpointError, Problem
from finetuner.runtime.disk import is_disk_full, told_full
from finetuner.runtime.fault import fault
from finetuner.runtime.manifest import MANIFEST, manifest_text, read_manifest, sha256_of, verify

__all__ = [
    "MANIFEST",
    "commit_dir",
    "fsync",
    "read_manifest",
    "remove_dir",
    "sweep",
    "unfinished",
    "verify",
    "write_file",
]

LEFTOVER = re.compile(r"\.(?P<kind>tmp|del)_(?P<name>.+)_(?P<pid>[0-9]+)", re.DOTALL)


@contextmanager
def commit_dir(final: Path, *, meta: Mapping[str, Any] = MappingProxyType({})) -> Iterator[Path]:
    """The folder to fill; when the block ends well it bears the name `final`, when it raises nothing is left of it.

    A complete folder at `final` is replaced; a corrupt one is set aside as `NAME.corrupt`.

    Raises:
        CheckpointError: the disk is full (E-DISK-FULL), the folder cannot be written in, `final` is a link.
    """
    temporary = _start(final)
    try:
        yield temporary
        _seal(temporary, meta)
        _bring_in(temporary, final)
    except BaseException as error:
        full = told_full(error, final.parent, temporary) if is_disk_full(error) else None
        if temporary.exists():
            _delete(_set_out(temporary))  # renamed first: other ranks may be writing into it
        if full is not None:
            raise full from error
        raise


def unfinished(final: Path, pid: int) -> Path:
    """The folder that process `pid` fills, and that `final` will be."""
    return final.parent / f".tmp_{final.name}_{pid}"


def sweep(parent: Path) -> list[Path]:
    """Ends what dead processes left in `parent` half done, and says which folders that brought in.

    A leftover is deleted, unless it is complete and the place of its name is free: its process died just before the
    rename. Folders of processes that live (other than this one) are theirs.
    """
    brought_in = []
    for path in sorted(parent.iterdir()) if parent.is_dir() else []:
        match = LEFTOVER.fullmatch(path.name)
        if match is None or _lives_elsewhere(int(match["pid"])):
            continue
        final = parent / match["name"]
        if match["kind"] == "tmp" and not path.is_symlink() and not os.path.lexists(final) and verify(path) is None:
            _rename(path, final)
            brought_in.append(final)
        else:
            _delete(path)
    return brought_in


def remove_dir(folder: Path) -> None:
    """Deletes `folder`; from the first moment on nothing bears its name."""
    _delete(_set_out(folder))


def _start(final: Path) -> Path:
    if final.is_symlink():
        raise CheckpointError(
            Problem(
                "E-COMMIT-LINK",
                "a link stands where a folder is to be written",
                where=str(final),
                found=f"a link to {os.readlink(final)}",
                fits="a free name",
                remedy=f"remove the link {final}",
            )
        )
    temporary = unfinished(final, os.getpid())
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(temporary):
            _delete(temporary)
        fault("mkdir")
        os.mkdir(temporary, 0o755)
    except OSError as error:
        if is_disk_full(error):
            raise told_full(error, final.parent, temporary) from error
        raise CheckpointError(
            Problem(
                "E-FOLDER-WRITE",
                "a folder cannot be written in",
                where=str(final.parent),
                found=error.strerror or str(error),
                fits="a folder that you may write in",
                remedy="give another folder, or mend its permissions",
            )
        ) from error
    return temporary


def _seal(folder: Path, meta: Mapping[str, Any]) -> None:
    """Fsyncs every file of `folder`, gives it mode 0644 less the umask, and writes the manifest."""
    files: dict[str, dict[str, Any]] = {}
    folders = [folder]
    mode = _mode_of_new_file(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        kind = path.lstat().st_mode
        if stat.S_ISDIR(kind):
            os.chmod(path, mode | (mode & 0o444) >> 2)
            folders.append(path)
        elif stat.S_ISREG(kind):
            os.chmod(path, mode)
            fsync(path)
            files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        else:
            raise CheckpointError(
                Problem(
                    "E-COMMIT-LINK",
                    "only plain files can be committed",
                    where=str(folder / name),
                    found="a link or a device",
                    remedy="copy the file itself",
                )
            )
    write_file(folder / MANIFEST, manifest_text(files, meta).encode())
    for inner in reversed(folders):
        fsync(inner)


def write_file(path: Path, data: bytes) -> None:
    """Writes a new file and fsyncs it; it passes the fault points within, so that half a file can be tested."""
    fault("open")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        fault("write")
        file.write(data[len(data) // 2 :])
        file.flush()
        fault("fsync")
        os.fsync(file.fileno())


def _bring_in(temporary: Path, final: Path) -> None:
    """The commit point: `temporary` gets its name, and what bore it goes."""
    old = None
    if final.is_dir() and not any(final.iterdir()):
        final.rmdir()
    elif os.path.lexists(final):
        if verify(final) is None:
            old = _set_out(final)
        else:
            _quarantine(final)
    _rename(temporary, final)
    if old is not None:
        _delete(old)


def _quarantine(path: Path) -> None:
    target, number = path.with_name(f"{path.name}.corrupt"), 1
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{path.name}.corrupt-{number}")
    _rename(path, target)


def _set_out(folder: Path) -> Path:
    """Renames `folder` to the name of what is being deleted."""
    doomed = folder.with_name(f".del_{folder.name}_{os.getpid()}")
    if os.path.lexists(doomed):
        _delete(doomed)
    _rename(folder, doomed)
    return doomed


def _rename(source: Path, target: Path) -> None:
    fault("rename")
    os.rename(source, target)
    fault("rename")
    fsync(target.parent)


def _delete(path: Path) -> None:
    """Deletes a tree (or a link, never what it points to), file by file."""
    if path.is_symlink() or not path.is_dir():
        fault("unlink")
        path.unlink()
        return
    for root, folders, files in os.walk(path, topdown=False, followlinks=False):
        for name in files:
            fault("unlink")
            os.unlink(os.path.join(root, name))
        for name in folders:
            inner = os.path.join(root, name)
            os.unlink(inner) if os.path.islink(inner) else os.rmdir(inner)
    fault("unlink")
    path.rmdir()


def fsync(path: Path) -> None:
    """Waits until a file, or a folder's names, are on the disk."""
    fault("fsync")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mode_of_new_file(folder: Path) -> int:
    """0644 less the umask; seen on a new file, since the umask cannot be read without changing it for all threads."""
    probe = folder / ".mode"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()


def _lives_elsewhere(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError as error:
        return error.errno == errno.EPERM
    return True
