"""The command line in bad company: no terminal, no room, no rights, wrong neighbours. Each is told, none hangs."""

from __future__ import annotations

import datetime
import fcntl
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import bad
import pytest
import world
from bad import Case, nothing

from finetuner.errors import UsageError
from finetuner.train.runner import check_home

WITHOUT_RIGHTS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
"""Root reads and writes everything; without these it is as everyone is."""


def call(*words: str, env: dict[str, str] | None = None, prefix: tuple[str, ...] = (), **options):
    command = [*prefix, sys.executable, "-m", "finetuner", *words]
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **options}
    done = subprocess.run(command, env=world.environment(**env or {}), stderr=subprocess.PIPE, timeout=120, **options)
    return done.returncode, done.stderr.decode()


def rights() -> tuple[str, ...]:
    if os.geteuid() != 0:
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("root, and no setpriv to give its rights up")
    return WITHOUT_RIGHTS


def a_file(name: str):
    def put(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("in the way")

    return put


PLACES = [
    Case("93 the folder is a file", a_file("out"), "E-FOLDER-FILE", ("out", "--folder")),
    Case("93 its parent is a file", nothing, "E-FOLDER-WRITE", ("text.txt",), ("folder=text.txt/out",)),
    Case("93 the logs are a file", a_file("out/logs"), "E-MACHINE", ("out/logs",)),
    Case("93 the metrics are a folder", lambda f: (f / "out/metrics.jsonl").mkdir(parents=True), "E-MACHINE",
         ("out/metrics.jsonl",)),
    Case("93 a link to nothing", lambda f: (f / "out").symlink_to("gone/away"), "E-MACHINE", ("out",)),
    Case("95 no CUDA", nothing, "E-DEVICE", ("engine.device=cpu",), ("engine.device=cuda",)),
    Case("a tracker that is not installed", nothing, "E-EXTRA", ("pip install", "log.to"), ('log.to=("wandb",)',)),
    Case("a checkpoint of nobody in the way", a_file("out/checkpoint-1"), "", ()),
]  # fmt: skip


@pytest.mark.parametrize("case", PLACES, ids=str)
def test_a_place_that_cannot_be_used_gives_2(case, here, capsys):
    case.wrong(here)
    code, err = bad.run(case.command, capsys)
    bad.check(case, code, err, exit_code=2)


@pytest.mark.parametrize("name", ["with blanks", "größe-日本", "new\nline", "-dash", "a'b\"c", "{}%s", "x" * 200])
def test_any_name_of_a_folder_works(name, here, capsys):
    code, err = bad.run(["train", "config.py", f"--folder={name}"], capsys)
    assert code == 0, err
    assert (here / name / "last").exists()


@pytest.mark.parametrize("name", ["/", "//", "/tmp/..", "/tmp/../"])
def test_no_run_is_written_into_the_root(name):
    """Asked without a run: one that went wrong would write there."""
    with pytest.raises(UsageError, match="E-FOLDER-FILE"):
        check_home(Path(name))


def test_two_runs_in_one_folder(here, capsys):
    held = os.open(here / ".out.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    (here / "link").symlink_to("out")
    code, err = bad.run(["train", "config.py", "folder=link"], capsys)
    os.close(held)
    bad.check(Case("two", nothing, "E-LOCK", ("another folder",)), code, err, exit_code=2)


@pytest.fixture
def hurried(monkeypatch):
    """Ranks that wait two seconds for one another."""
    from finetuner.runtime import meeting

    monkeypatch.setattr(meeting, "JOIN", datetime.timedelta(seconds=2))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return port


@pytest.mark.parametrize(
    ("rank", "size", "words"),
    [
        ("0", "2", ("RANK=0, WORLD_SIZE=2", "within 2 s", "unset RANK")),
        ("1", "2", ("RANK=1, WORLD_SIZE=2", "within 2 s")),
        ("2", "2", ("RANK=2, WORLD_SIZE=2", "RANK below 2")),
        ("0", "two", ("WORLD_SIZE", "'two'", "a whole number")),
        ("-1", "2", ("RANK", "'-1'")),
        ("", "2", ("RANK", "''")),
    ],
)
def test_a_rank_that_is_left_alone_is_told_within_a_minute(rank, size, words, here, hurried, monkeypatch, capsys):
    from finetuner.runtime import meeting

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    code, err = bad.run(["train", "config.py", "batch.per_device=1"], capsys)
    bad.check(Case("alone", nothing, "E-RANKS", words), code, err, exit_code=2)
    monkeypatch.undo()
    assert datetime.timedelta(seconds=60) >= meeting.JOIN


def test_a_port_that_is_taken(here, hurried, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with socket.socket() as held:
        held.bind(("127.0.0.1", hurried))
        held.listen()
        code, err = bad.run(["train", "config.py", "batch.per_device=1"], capsys)
    bad.check(Case("port", nothing, "E-PORT", (str(hurried), "MASTER_PORT=")), code, err, exit_code=2)


def test_ranks_with_different_configs_are_told(here, hurried):
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(hurried)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "finetuner", "train", "config.py", "batch.per_device=1", f"optim.lr=1e-{rank + 2}"],
            env=world.environment(RANK=str(rank), **env), stderr=subprocess.PIPE, cwd=here,
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=120)[1].decode() for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], told
    assert all("error[E-RANKS-CONFIG]" in text and "Traceback" not in text for text in told), told


def test_fewer_rows_than_ranks(here):
    (here / "rows.jsonl").write_text((here / "rows.jsonl").read_text().splitlines()[0])
    code, err = call("train", "config.py", "batch.per_device=1", "--nproc", "2")
    assert code == 0, err


def test_a_batch_that_ranks_cannot_share_is_told_before_they_start(here, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", None)
    code, err = bad.run(["train", "config.py", "--nproc", "1000"], capsys)
    bad.check(Case("1000", nothing, "E-BATCH-DIVIDE", ("1000 ranks",)), code, err, exit_code=2)


@pytest.mark.parametrize("words", [("list",), ("show", "config.py", "--json"), ("--help",)])
def test_a_reader_that_leaves_is_no_error(words, here):
    reading, writing = os.pipe()
    os.close(reading)
    code, err = call(*words, stdout=writing)
    os.close(writing)
    assert code == 141, err
    assert err == ""


def test_no_standard_output_at_all(here):
    code, err = call("show", "config.py", stdout=None, preexec_fn=lambda: os.close(1))
    assert code == 0, err
    assert "Traceback" not in err
    assert "unexpected" not in err


POOR = {
    "LC_ALL": "C",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONUTF8": "0",
    "OMP_NUM_THREADS": "0",
    "CUDA_VISIBLE_DEVICES": "9",
}
POOR |= {"HF_HOME": "/proc/no/such", "TZ": "Nowhere/None", "PYTHONHASHSEED": "1", "TERM": "", "COLUMNS": "0"}


def test_a_poor_environment_trains(here):
    """Few files may be open, no locale, no cache of the hub, no terminal, braces and umlauts in the system message."""
    bad.edit("length=96, pack=True", "length=200, system='größe {} {0} %s'")(here)
    few = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))  # noqa: E731
    code, err = call("train", "config.py", "--folder=größe", env=POOR, preexec_fn=few)
    assert code == 0, err
    assert (here / "größe" / "last").exists()
    code, err = call("train", "größe.py", env=POOR)
    bad.check(Case("an umlaut", nothing, "E-CONFIG-PATH", ("finetuner list",)), code, err, exit_code=2)


def test_what_may_not_be_read_or_written(here):
    prefix = rights()
    (here / "rows.jsonl").chmod(0)
    code, err = call("train", "config.py", prefix=prefix)
    bad.check(Case("31", nothing, "E-DATA-PERMISSION", ("rows.jsonl", "chmod +r")), code, err, exit_code=3)
    (here / "rows.jsonl").chmod(0o644)
    (here / "locked").mkdir(mode=0o555)
    code, err = call("train", "config.py", "folder=locked/out", prefix=prefix)
    bad.check(Case("93", nothing, "E-FOLDER-WRITE", ("locked", "another folder")), code, err, exit_code=2)
    (here / "config.py").chmod(0)
    code, err = call("train", "config.py", prefix=prefix)
    bad.check(Case("unreadable", nothing, "E-CONFIG-READ", ("config.py",)), code, err, exit_code=2)


def test_a_limit_of_a_files_size_is_told_as_a_full_disk(here):
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # noqa: E731
    code, err = call("train", "config.py", preexec_fn=small)
    bad.check(Case("full", nothing, "E-DISK-FULL", ("out",)), code, err, exit_code=4)


def test_chat_ends_with_its_input_whatever_comes(here):
    typed = b"\n \n\xff\xfe\n/quit\n" + b"x" * 20_000 + b"\nhello {} %s"
    command = ("chat", "model", "--system", "{} {0} %s", "--max-tokens", "2", "--device", "cpu")
    (here / "typed").write_bytes(typed)
    with (here / "typed").open("rb") as file:
        code, err = call(*command, stdin=file)
    assert code == 0, err
    assert "no command /quit" in err
    assert "not UTF-8" in err
    assert "Traceback" not in err
    assert call(*command)[0] == 0


def test_memory_that_is_full_is_told(here, monkeypatch, capsys):
    from finetuner.engine.torch_engine import TorchEngine

    def full(*_args, **_options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:130] DefaultCPUAllocator: can't allocate memory: 9 GB")

    monkeypatch.setattr(TorchEngine, "accumulate", full)
    code, err = bad.run(["train", "config.py"], capsys)
    bad.check(Case("memory", nothing, "E-MEMORY", ("9 GB", "batch.per_device=1")), code, err, exit_code=5)
