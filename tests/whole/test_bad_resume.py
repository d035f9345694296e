"""A checkpoint, an adapter or a run's folder that cannot be used is told; what is whole is gone on from."""

from __future__ import annotations

import json
import shutil

import bad
import pytest
from bad import Case, both, edit, nothing
from safetensors.torch import load_file, save_file

LAST = "out/checkpoint-2"
CONFIG = LAST + "/adapter_config.json"


def at(path: str, change):
    """Changes a file of the world by its text."""

    def rewrite(folder):
        text = (folder / path).read_text()
        assert change(text) != text, f"{path} stays as it is"
        (folder / path).write_text(change(text))

    return rewrite


def gone(path: str):
    def remove(folder):
        target = folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return remove


def flip(folder) -> None:
    path = folder / LAST / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def torn(folder) -> None:
    path = folder / LAST / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def tensors(change):
    def rewrite(folder):
        path = folder / LAST / "adapter_model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})
        (folder / LAST / "MANIFEST.json").unlink()

    return rewrite


def named(folder) -> None:
    (folder / "empty").mkdir()


def other_run(folder) -> None:
    """A second run, whose checkpoint bears the first one's number."""
    shutil.copytree(folder / "out", folder / "second", symlinks=True)
    at("second/run.json", lambda text: text.replace(json.loads(text)["id"], "0" * 16))(folder)
    shutil.rmtree(folder / "second" / "checkpoint-1")


def of(path: str) -> tuple[str, ...]:
    return ("train", "config.py", "until=Steps(4)", "--resume", path)


MORE = ("train", "config.py", "until=Steps(4)")
RESUME = [
    Case("87 a missing folder", nothing, "E-CHECKPOINT-TORN", ("nowhere", "--resume auto"), of("nowhere")),
    Case("87 an empty folder", named, "E-CHECKPOINT-TORN", ("empty", "MANIFEST.json is missing"), of("empty")),
    Case("87 a run's folder", nothing, "E-CHECKPOINT-TORN", ("out", "--resume out/checkpoint-2"), of("out")),
    Case("87 a file", nothing, "E-CHECKPOINT-TORN", ("text.txt",), of("text.txt")),
    Case("87 torn", torn, "E-CHECKPOINT-TORN", ("adapter_model.safetensors has",), of(LAST)),
    Case("87 a bit flipped", flip, "E-CHECKPOINT-TORN", ("adapter_model.safetensors", "sha256"), of(LAST)),
    Case(
        "87 a newer format",
        at(LAST + "/MANIFEST.json", lambda t: t.replace('"format": 1', '"format": 9')),
        "E-CHECKPOINT-TORN",
        ("format 9", "this version reads 1"),
        of(LAST),
    ),
    Case(
        "87 all torn",
        both(torn, lambda f: (f / "out/checkpoint-1/MANIFEST.json").unlink()),
        "E-CHECKPOINT-NONE",
        ("checkpoint-2", "checkpoint-1", "--resume never"),
        MORE,
    ),
    Case(
        "87 another length",
        edit("length=96", "length=90"),
        "E-RESUME-CONFIG",
        ("out", "data.length: 96 -> 90", "never"),
        MORE,
    ),
    Case("87 another seed", edit('folder="out"', 'seed=7, folder="out"'), "E-RESUME-CONFIG", ("seed: 0 -> 7",), MORE),
    Case("87 another rank", edit("rank=4", "rank=2"), "E-RESUME-CONFIG", ("model.adapter.rank: 4 -> 2",), MORE),
    Case("87 another batch", edit("total=4", "total=2"), "E-RESUME-CONFIG", ("batch.total: 4 -> 2",), MORE),
    Case(
        "87 full after LoRA",
        edit("adapter=LoRA(rank=4, alpha=8)", "adapter=None"),
        "E-RESUME-CONFIG",
        ("model.adapter",),
        MORE,
    ),
    Case(
        "87 other rows",
        lambda f: (f / "rows.jsonl").write_text("".join(sorted((f / "rows.jsonl").open())[1:])),
        "E-RESUME-DATA",
        ("out", "--resume never"),
        MORE,
    ),
    Case(
        "87 a run of another config as --resume",
        other_run,
        "E-CHECKPOINT-FOREIGN",
        (LAST, "--folder"),
        ("train", "config.py", "until=Steps(4)", "folder=second", "--resume", LAST),
    ),
    Case(
        "87 a new folder from another run's checkpoint",
        nothing,
        "E-CHECKPOINT-FOREIGN",
        (LAST, "--folder"),
        ("train", "config.py", "until=Steps(4)", "folder=second", "--resume", LAST),
    ),
    Case(
        "run.json cut", at("out/run.json", lambda t: t[:20]), "E-RUN-RECORD", ("out/run.json", "--resume never"), MORE
    ),
    Case("config.json cut", at("out/config.json", lambda t: t[:20]), "E-RUN-RECORD", ("out/config.json",), MORE),
    Case("config.json gone", gone("out/config.json"), "E-RUN-RECORD", ("out/config.json",), MORE),
    Case("run.json a list", at("out/run.json", lambda t: "[]"), "E-RUN-RECORD", ("out/run.json",), MORE),
    Case(
        "a folder in the way of the links",
        both(lambda f: (f / "out/last").unlink(), lambda f: (f / "out/last").mkdir()),
        "E-CHECKPOINT-LINK",
        ("out/last", "move"),
        MORE,
    ),
]
GOES_ON = [
    Case("87 the newest is torn", torn, args=MORE),
    Case("87 one that is being written", lambda f: (f / "out/.tmp_checkpoint-4_1").mkdir(), args=MORE),
    Case("87 finished", nothing),
    Case(
        "87 finished, of another format", at(LAST + "/MANIFEST.json", lambda t: t.replace('"format": 1', '"format": 9'))
    ),
    Case("87 named", nothing, args=of("out/checkpoint-1")),
    Case(
        "a folder of something else",
        both(gone("out"), lambda f: (f / "out").mkdir(), lambda f: (f / "out/notes.txt").write_text("mine")),
    ),
    Case("an empty metrics file", lambda f: (f / "out/metrics.jsonl").write_text(""), args=MORE),
    Case("a cut metrics file", at("out/metrics.jsonl", lambda t: t[:-9]), args=MORE),
]
USED = [
    Case("84 the base is gone", both(lambda f: (f / "model").rename(f / "moved")), "E-CHAT-BASE", ("model", "--base")),
    Case("84 another base", lambda f: __import__("rig").tiny_llama(f / "model", hidden_size=64), "E-", ()),
    Case("85 no tensors", tensors(lambda held: {}), "E-", ("adapter",)),
    Case("85 empty tensors", tensors(lambda held: {n: t[:0] for n, t in held.items()}), "E-", ("adapter",)),
    Case("85 NaN", tensors(lambda held: {n: t * float("nan") for n, t in held.items()}), "E-", ("adapter",)),
    Case("85 torn", torn, "E-", ("adapter_model.safetensors",)),
    Case("no adapter_config.json", both(gone(LAST + "/adapter_config.json"), gone(LAST + "/MANIFEST.json")), "E-", ()),
    Case("no weights", both(gone(LAST + "/adapter_model.safetensors"), gone(LAST + "/MANIFEST.json")), "E-", ()),
    Case("adapter_config.json cut", both(at(CONFIG, lambda t: t[:30]), gone(LAST + "/MANIFEST.json")),
         "E-", ("adapter_config.json",)),
    Case("another kind of adapter", both(at(CONFIG, lambda t: t.replace('"LORA"', '"PROMPT_TUNING"')),
         gone(LAST + "/MANIFEST.json")), "E-", ("PROMPT_TUNING",)),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of two steps, LoRA."""
    import os

    from finetuner.cli.main import main

    folder = bad.base(tmp_path_factory.mktemp("trained"), model=", adapter=LoRA(rank=4, alpha=8)", until="Steps(2)")
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["train", "config.py"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A copy of it, whose adapter names the copied base."""
    bad.copy(trained, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", RESUME, ids=str)
def test_what_cannot_be_gone_on_from_is_told(case, here, capsys):
    case.wrong(here)
    before = sorted(path.name for path in (here / "out").iterdir())
    code, err = bad.run(case.command, capsys)
    bad.check(case, code, err, exit_code=4)
    assert set(before) <= {path.name for path in (here / "out").iterdir()}, "something was taken away"


@pytest.mark.parametrize("case", GOES_ON, ids=str)
def test_what_is_whole_is_gone_on_from(case, here, capsys):
    case.wrong(here)
    code, err = bad.run(case.command, capsys)
    bad.check(case, code, err)
    assert (here / "out" / ("checkpoint-4" if case.args else "checkpoint-2")).exists()


@pytest.mark.parametrize("out", ["text.txt", "model", "."])
def test_a_merge_never_goes_over_what_is_there(out, here, capsys):
    before = (here / "text.txt").read_text()
    code, err = bad.run(["merge", LAST, out], capsys)
    bad.check(Case(out, nothing, "E-OUT-EXISTS", ("another OUT",)), code, err, exit_code=4)
    assert (here / "text.txt").read_text() == before


@pytest.mark.parametrize("verb", ["chat", "merge"])
@pytest.mark.parametrize("case", USED, ids=str)
def test_what_cannot_be_used_is_told(case, verb, here, trained, monkeypatch, capsys):
    if case.name != "85 torn":
        at(LAST + "/adapter_config.json", lambda text: text.replace(str(trained), str(here)))(here)
    case.wrong(here)
    if (manifest := here / LAST / "MANIFEST.json").exists() and case.name != "85 torn":
        manifest.unlink()
    rest = ["--ask", "who?", "--max-tokens", "2"] if verb == "chat" else ["merged"]
    code, err = bad.run([verb, LAST, *rest], capsys)
    told = err.partition("error[")[2].partition("]")[0]
    bad.check(Case(case.name, nothing, told or "E-NOTHING", case.words), code, err, exit_code=4)
    assert not (here / "merged").exists()
