"""A full disk is told in one way, whichever library met it, and costs nothing that was there."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from finetuner.runtime.commit import commit_dir, verify

FULL = """
import sys
from pathlib import Path
from finetuner.errors import CheckpointError
from finetuner.runtime.commit import commit_dir
how, final = sys.argv[2], Path(sys.argv[1]) / "checkpoint-2"
try:
    with commit_dir(final) as folder:
        if how == "plain":
            (folder / "big").write_bytes(bytes(300_000))
        else:
            import torch, safetensors.torch
            if how == "torch":
                torch.save(torch.zeros(75_000), folder / "big")
            else:
                safetensors.torch.save_file({"a": torch.zeros(75_000)}, folder / "big")
except CheckpointError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("how", ["plain", "safetensors", "torch"])
def test_a_full_disk_is_told_and_the_old_folder_stays(how: str, tmp_path: Path) -> None:
    with commit_dir(tmp_path / "checkpoint-1") as folder:
        (folder / "a.txt").write_text("x" * 40_000)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), how], check=False, preexec_fn=limit, capture_output=True, text=True
    )
    assert done.returncode == 4, done.stderr
    assert "error[E-DISK-FULL] disk full: need " in done.stdout
    assert ", have " in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert verify(tmp_path / "checkpoint-1") is None
