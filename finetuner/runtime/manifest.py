"""MANIFEST.json: size and sha256 of each file of a folder, by which it is known to be whole.

- It carries its own hash and has one spelling: any changed bit shows.
- It names no file outside its folder.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from finetuner.errors import CheckpointError, Problem

MANIFEST = "MANIFEST.json"
FORMAT = 1


def verify(folder: Path, *, contents: bool = True) -> str | None:
    """None if `folder` is complete, else which file is wrong and how; `contents=False` reads sizes only."""
    try:
        files = read_manifest(folder)["files"]
    except CheckpointError as error:
        return error.problems[0].found
    for name, entry in files.items():
        path = folder / name
        try:
            status = path.lstat()
        except OSError:
            return f"{name} is missing"
        if not stat.S_ISREG(status.st_mode):
            return f"{name} is not a plain file"
        if status.st_size != entry["size"]:
            return f"{name} has {status.st_size} bytes of {entry['size']}"
        if contents and sha256_of(path) != entry["sha256"]:
            return f"{name} does not have the contents that were written (sha256 differs)"
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """`{"format": 1, "files": {name: {"size", "sha256"}}, "meta": ...}` as written by `commit_dir`.

    Raises:
        CheckpointError: E-CHECKPOINT-TORN if there is none, or not one bit for bit as `commit_dir` writes it.
    """
    path = folder / MANIFEST
    found = ""
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            found = f"{MANIFEST} has format {manifest['format']}; this version reads {FORMAT}: upgrade finetuner"
        elif manifest_text(manifest["files"], manifest["meta"]) != text:
            found = f"{MANIFEST} was changed after it was written"
        elif not all(set(entry) == {"size", "sha256"} for entry in manifest["files"].values()):
            found = f"{MANIFEST} does not give size and sha256 of each file"
        elif outside := [name for name in manifest["files"] if not _is_inside(name)]:
            found = f"{MANIFEST} names {outside[0]!r}, outside the folder"
    except OSError as error:
        found = f"{MANIFEST} is missing" if isinstance(error, FileNotFoundError) else f"{MANIFEST}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found = f"{MANIFEST} is not the JSON that was written"
    if found:
        raise CheckpointError(
            Problem(
                "E-CHECKPOINT-TORN",
                "this folder is not complete",
                where=str(folder),
                found=found,
                fits=f"a folder whose {MANIFEST} verifies",
                remedy="take another one, or make it again",
            )
        )
    return dict(manifest)


def sha256_of(path: Path) -> str:
    """The hash of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def manifest_text(files: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    """The manifest as it is written: one spelling for a content, with its own hash in it."""
    body = {"format": FORMAT, "files": files, "meta": dict(meta)}
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body | {"sha256": own}, indent=1, sort_keys=True) + "\n"


def _is_inside(name: str) -> bool:
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts and "\0" not in name
