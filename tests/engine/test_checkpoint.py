"""Checkpoints are found by number, rotated after the commit, and never another run's."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from finetuner.engine import checkpoint
from finetuner.engine.checkpoint import complete, latest, link, linked, rotate, write
from finetuner.errors import CheckpointError


def fill(folder: Path) -> None:
    (folder / "weights").write_text(folder.name.rsplit("_", 1)[0])


def make(folder: Path, *steps: int, run: str = "mine") -> None:
    for step in steps:
        write(folder, step, fill, {"run": run})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def kept_by_oracle(steps: list[int], keep: int, best: int | None) -> set[str]:
    return {f"checkpoint-{step}" for step in [*sorted(steps)[-keep:], *([] if best is None else [best])]}


STEPS = [900, 950, 1000, 1050, 1100]


def rotation_errors(root: Path) -> list[tuple[int, int | None]]:
    """Cases of (keep, best) in which something else is kept than the oracle says, or a foreign thing was touched."""
    wrong = []
    for number, (keep, best) in enumerate(product((1, 2, 3), [None, *STEPS])):
        folder = root / str(number)
        (folder / "checkpoint-abc").mkdir(parents=True)
        (folder / "checkpoint-007").mkdir()
        (folder / "checkpoint-3").write_text("a file")
        (folder / "checkpoint-5").mkdir()
        make(folder, 9999, 100, run="another")
        foreign = names(folder)
        for step in STEPS:
            make(folder, step)
        link(folder, "last", folder / "checkpoint-1100")
        checkpoint.rotate(folder, "mine", keep, None if best is None else folder / f"checkpoint-{best}")
        if names(folder) != foreign | kept_by_oracle(STEPS, keep, best) | {"last"}:
            wrong.append((keep, best))
    return wrong


def test_rotation_keeps_the_newest_and_the_best_and_touches_nothing_foreign(tmp_path: Path) -> None:
    assert rotation_errors(tmp_path) == []


@pytest.mark.parametrize("mutant", ["string sort", "foreign counted", "best forgotten"])
def test_the_rotation_check_sees_a_mutant(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = checkpoint.rotate

    def anyone(*arguments: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_owner", lambda path: "mine")
            right(*arguments)

    match mutant:
        case "string sort":
            monkeypatch.setattr(checkpoint, "step_of", lambda path: path.name)
        case "foreign counted":
            monkeypatch.setattr(checkpoint, "rotate", anyone)
        case _:
            monkeypatch.setattr(checkpoint, "rotate", lambda folder, run, keep, best: right(folder, run, keep))
    assert rotation_errors(tmp_path)


def test_complete_lists_newest_first_by_number(tmp_path: Path) -> None:
    make(tmp_path, 2, 10, 9)
    (tmp_path / "checkpoint-10" / "weights").write_text("torn")
    assert [path.name for path in complete(tmp_path)] == ["checkpoint-9", "checkpoint-2"]
    assert complete(tmp_path / "nowhere") == []


def test_latest_passes_over_torn_and_foreign_ones_and_names_them(tmp_path: Path) -> None:
    make(tmp_path, 9, 10, 11)
    make(tmp_path, 9999, run="another")
    (tmp_path / "checkpoint-11" / "weights").unlink()
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-50").symlink_to("checkpoint-9")
    found, skipped = latest(tmp_path, "mine")
    assert found == tmp_path / "checkpoint-10"
    assert [(one.folder.name, one.kind) for one in skipped] == [
        ("checkpoint-9999", "foreign"),
        ("checkpoint-12", "torn"),
        ("checkpoint-11", "torn"),
    ]
    assert "weights is missing" in str(skipped[2])
    assert "another" in str(skipped[0])


def test_all_torn_is_told_apart_from_none(tmp_path: Path) -> None:
    assert latest(tmp_path, "mine") == (None, [])
    make(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}" / "weights").write_text("")
    found, skipped = latest(tmp_path, "mine")
    assert found is None
    assert [one.kind for one in skipped] == ["torn", "torn"]


def test_a_checkpoint_of_another_run_is_not_overwritten(tmp_path: Path) -> None:
    make(tmp_path, 5, run="another")
    with pytest.raises(CheckpointError, match="E-CHECKPOINT-FOREIGN"):
        make(tmp_path, 5)
    assert checkpoint._owner(tmp_path / "checkpoint-5") == "another"


def test_a_torn_folder_in_the_way_is_set_aside(tmp_path: Path) -> None:
    make(tmp_path, 5)
    (tmp_path / "checkpoint-5" / "weights").write_text("torn")
    make(tmp_path, 5)
    assert names(tmp_path) == {"checkpoint-5", "checkpoint-5.corrupt"}
    assert latest(tmp_path, "mine")[0] == tmp_path / "checkpoint-5"


def test_links_are_relative_and_move_at_once(tmp_path: Path) -> None:
    make(tmp_path, 1, 2)
    assert linked(tmp_path, "last") is None
    for step in (1, 2):
        link(tmp_path, "last", tmp_path / f"checkpoint-{step}")
        assert os.readlink(tmp_path / "last") == f"checkpoint-{step}"
        assert linked(tmp_path, "last") == tmp_path / f"checkpoint-{step}"
    rotate(tmp_path, "mine", 1)
    assert names(tmp_path) == {"checkpoint-2", "last"}
    (tmp_path / "best").mkdir()
    with pytest.raises(CheckpointError, match="E-CHECKPOINT-LINK"):
        link(tmp_path, "best", tmp_path / "checkpoint-2")


def test_links_that_leave_the_folder_are_not_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    make(tmp_path, 1)
    folder.mkdir()
    for target in ("../checkpoint-1", str(tmp_path / "checkpoint-1"), "nowhere"):
        (folder / "last").symlink_to(target)
        assert linked(folder, "last") is None
        (folder / "last").unlink()


SAVES = """
import sys
from pathlib import Path
from finetuner.engine.checkpoint import latest, link, rotate, write
from finetuner.runtime.commit import sweep
folder = Path(sys.argv[1])
sweep(folder)
for step in (9, 10, 11):
    made = write(folder, step, lambda to: (to / "weights").write_text(str(step)), {"run": "mine"})
    link(folder, "last", made)
    rotate(folder, "mine", 1)
"""


def test_with_one_kept_a_crash_anywhere_leaves_one_to_go_on_from(tmp_path: Path) -> None:
    seen: list[str | None] = []
    for number in range(1, 200):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = [sys.executable, "-c", SAVES, str(folder)]
        code = subprocess.run(command, env=os.environ | {"FINETUNER_FAULT": f"*:{number}"}, check=False).returncode
        found, _ = latest(folder, "mine")
        seen.append(found and found.name)
        if found is not None and (folder / "last").is_symlink():
            assert linked(folder, "last") is not None, "last points to nothing"
        if code == 0:
            break
        assert code == 137
    first = next(index for index, name in enumerate(seen) if name)
    assert None not in seen[first:]
    assert list(dict.fromkeys(seen)) == [None, "checkpoint-9", "checkpoint-10", "checkpoint-11"]
    assert subprocess.run(command, check=False).returncode == 0
    assert names(folder) == {"checkpoint-11", "last"}
