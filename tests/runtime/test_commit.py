"""A committed folder is there as a whole or not at all, whatever ends the process, and whatever befalls a file."""

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from finetuner.errors import CheckpointError
from finetuner.runtime import manifest
from finetuner.runtime.commit import commit_dir, read_manifest, remove_dir, sweep, verify

SAVES = """
import sys
from pathlib import Path
from finetuner.runtime.commit import commit_dir, remove_dir
parent, same = Path(sys.argv[1]), sys.argv[2] == "same"
for step in (1, 2, 3):
    with commit_dir(parent / ("kept" if same else f"kept-{step}"), meta={"step": step}) as folder:
        (folder / "a.bin").write_bytes(bytes([step]) * 5000)
        (folder / "state").mkdir()
        (folder / "state" / "b.json").write_text('{"step": %d}' % step)
    if not same and step > 1:
        remove_dir(parent / f"kept-{step - 1}")
"""
ROTATES_FIRST = SAVES.replace(
    "for step in (1, 2, 3):\n", "for step in (1, 2, 3):\n    if step > 1: remove_dir(parent / f'kept-{step - 1}')\n"
).replace("if not same and step > 1", "if False")


def save(final: Path, text: str = "one", **meta: object) -> Path:
    with commit_dir(final, meta=meta) as folder:
        (folder / "a.txt").write_text(text)
        (folder / "state").mkdir()
        (folder / "state" / "b.bin").write_bytes(bytes(range(200)))
    return final


def oracle(folder: Path) -> bool:
    """Completeness, told by nothing but json and hashlib."""
    try:
        files = json.loads((folder / "MANIFEST.json").read_text())["files"]
        told = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
        real = {}
        for path in folder.rglob("*"):
            if path.is_file() and path.name != "MANIFEST.json":
                data = path.read_bytes()
                real[path.relative_to(folder).as_posix()] = (len(data), hashlib.sha256(data).hexdigest())
    except (OSError, ValueError):
        return False
    return bool(real) and told == real


def run(script: str, parent: Path, mode: str, **environment: str) -> int:
    command = [sys.executable, "-c", script, str(parent), mode]
    return subprocess.run(command, env=os.environ | environment, check=False, capture_output=True).returncode


def ended_at_every_point(script: str, mode: str, parent: Path) -> list[tuple[int, list[Path]]]:
    """For each fault point in turn: its number, and the complete folders that its crash left."""
    left = []
    for number in range(1, 200):
        folder = parent / str(number)
        folder.mkdir(parents=True)
        code = run(script, folder, mode, FINETUNER_FAULT=f"*:{number}")
        if code == 0:
            assert number > 30, "the script passes fewer fault points than it has"
            return left
        assert code == 137
        named = [path for path in folder.iterdir() if not path.name.startswith(".")]
        assert all(oracle(path) for path in named), f"a torn folder bears a name at point {number}"
        if mode == "same":
            sweep(folder)
        left.append((number, [path for path in folder.iterdir() if not path.name.startswith(".") and oracle(path)]))
    raise AssertionError("the script never ends")


def gaps(left: list[tuple[int, list[Path]]]) -> list[int]:
    """Fault points behind the first committed folder at which none was left."""
    begin = min(number for number, folders in left if folders)
    assert 5 < begin < 30
    return [number for number, folders in left if number > begin and not folders]


@pytest.mark.parametrize("mode", ["names", "same"])
def test_at_every_crash_point_after_the_first_save_a_complete_folder_is_there(mode: str, tmp_path: Path) -> None:
    assert gaps(ended_at_every_point(SAVES, mode, tmp_path)) == []


def test_the_crash_check_sees_a_rotation_before_the_commit(tmp_path: Path) -> None:
    assert gaps(ended_at_every_point(ROTATES_FIRST, "names", tmp_path))


def test_a_run_after_a_crash_sweeps_what_the_dead_left_and_nothing_else(tmp_path: Path) -> None:
    run(SAVES, tmp_path, "names", FINETUNER_FAULT="write:2")
    (tmp_path / ".tmp_alive_1").mkdir()
    (tmp_path / ".tmp_words").mkdir()
    (tmp_path / ".del_x_999999999").mkdir()
    assert any(path.name.startswith(".tmp_kept-2_") for path in tmp_path.iterdir())
    assert sweep(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp_alive_1", ".tmp_words", "kept-1"]


def test_sweep_brings_in_a_complete_folder_whose_process_died_before_the_rename(tmp_path: Path) -> None:
    assert run(SAVES, tmp_path, "names", FINETUNER_FAULT="rename:1") == 137
    assert not (tmp_path / "kept-1").exists()
    assert sweep(tmp_path) == [tmp_path / "kept-1"]
    assert oracle(tmp_path / "kept-1")


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    match how:
        case "delete":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "grow":
            path.write_bytes(data + b"\0")
        case "link":
            path.rename(path.with_suffix(".moved"))
            path.symlink_to(path.with_suffix(".moved"))
        case "folder":
            path.unlink()
            path.mkdir()
        case _ if how.startswith("flip"):
            place = int(how[4:]) * (len(data) - 1) // 100
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        case _:
            path.write_bytes(data[: len(data) * int(how) // 100])


@pytest.mark.parametrize("name", ["a.txt", "state/b.bin", "MANIFEST.json"])
@pytest.mark.parametrize("how", ["delete", "empty", "grow", "link", "folder", "flip0", "flip50", "flip100", "25", "99"])
def test_every_damage_to_every_file_is_seen_and_named(name: str, how: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "kept")
    assert verify(folder) is None
    damage(folder / name, how)
    if name == "MANIFEST.json" and how == "link":
        return
    reason = verify(folder)
    assert reason is not None
    assert name in reason


def test_swapped_files_are_seen(tmp_path: Path) -> None:
    with commit_dir(tmp_path / "kept") as folder:
        (folder / "a").write_bytes(b"12")
        (folder / "b").write_bytes(b"21")
    folder = tmp_path / "kept"
    (folder / "a").rename(folder / "c")
    (folder / "b").rename(folder / "a")
    (folder / "c").rename(folder / "b")
    assert verify(folder, contents=False) is None
    assert "sha256" in str(verify(folder))


def test_each_single_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    folder = save(tmp_path / "kept", step=5)
    data = (folder / "MANIFEST.json").read_bytes()
    for place in range(len(data)):
        for bit in range(8):
            (folder / "MANIFEST.json").write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            assert verify(folder) is not None, (place, bit)


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    entry = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    for name in ("../outside", str(tmp_path / "outside")):
        folder = tmp_path / "kept"
        folder.mkdir(exist_ok=True)
        (folder / "MANIFEST.json").write_text(manifest.manifest_text({name: entry}, {}))
        assert "outside" in str(verify(folder))


@pytest.mark.parametrize(
    "text", ["[]", "5", "null", "{", '{"format": 1}', '{"format": 2, "files": {}, "meta": {}}', ""]
)
def test_a_foreign_manifest_is_refused_without_a_crash(text: str, tmp_path: Path) -> None:
    (tmp_path / "MANIFEST.json").write_text(text)
    assert verify(tmp_path) is not None
    with pytest.raises(CheckpointError, match="E-CHECKPOINT-TORN"):
        read_manifest(tmp_path)


def test_meta_comes_back(tmp_path: Path) -> None:
    assert read_manifest(save(tmp_path / "kept", step=5, run="x"))["meta"] == {"step": 5, "run": "x"}


def interrupted(final: Path) -> None:
    with commit_dir(final) as folder:
        (folder / "a.txt").write_text("new")
        raise KeyboardInterrupt


def test_what_raises_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    save(tmp_path / "kept", "old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "a.txt").read_text() == "old"


def test_a_complete_folder_is_replaced_a_corrupt_one_set_aside(tmp_path: Path) -> None:
    save(tmp_path / "kept", "old")
    save(tmp_path / "kept", "new")
    assert (tmp_path / "kept" / "a.txt").read_text() == "new"
    for count in (1, 2):
        (tmp_path / "kept" / "a.txt").write_text("torn")
        save(tmp_path / "kept", "newer")
        assert len(list(tmp_path.glob("kept.corrupt*"))) == count
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "kept.corrupt", "kept.corrupt-2"]
    assert (tmp_path / "kept.corrupt" / "a.txt").read_text() == "torn"


def test_files_are_readable_by_others_as_far_as_the_umask_lets_them(tmp_path: Path) -> None:
    for umask, file_mode, folder_mode in ((0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o027, 0o640, 0o750)):
        before = os.umask(umask)
        try:
            with commit_dir(tmp_path / "kept") as folder:
                (folder / "state").mkdir()
                os.close(os.open(folder / "state" / "a", os.O_CREAT | os.O_WRONLY, 0o600))
        finally:
            os.umask(before)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "kept").rglob("*")}
        assert modes == {"state": folder_mode, "a": file_mode, "MANIFEST.json": file_mode}
        assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == folder_mode


def test_links_are_never_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("x")
    (tmp_path / f".tmp_kept_{os.getpid()}").symlink_to(victim)
    (tmp_path / f".del_kept_{os.getpid()}").symlink_to(victim)
    save(tmp_path / "kept")
    save(tmp_path / "kept")
    (tmp_path / "kept" / "inner").symlink_to(victim)
    remove_dir(tmp_path / "kept")
    (tmp_path / ".tmp_other_999999999").symlink_to(victim)
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    assert (victim / "precious").read_text() == "x"
    (tmp_path / "kept").symlink_to(victim)
    with pytest.raises(CheckpointError, match="E-COMMIT-LINK"):
        save(tmp_path / "kept")
    with pytest.raises(CheckpointError, match="E-COMMIT-LINK"), commit_dir(tmp_path / "other") as folder:
        (folder / "a").symlink_to(victim / "precious")


def test_a_folder_that_cannot_be_written_in_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="E-FOLDER-WRITE"):
        save(tmp_path / "file" / "kept")


def test_nothing_of_torch_is_imported() -> None:
    code = "import sys, finetuner.runtime.commit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
