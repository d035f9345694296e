"""`show`, `list`, `copy`, `env`: what they print and write, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetuner.cli import copying, look
from finetuner.cli.main import main
from finetuner.config import files, ready
from finetuner.config.load import load

CONFIG = '''"""A tiny Run: for tests.

More.
"""
from finetuner import *
from {base} import model
config = Run(model=model, data=Dialogues(Json("a.json")), optim=AdamW(lr=1e-4), batch=BatchSize(8), until=Steps(5))
'''
PART = 'from finetuner import *\nmodel = CausalLM("base", adapter=LoRA(rank=8))\n'


@pytest.fixture(autouse=True)
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A made folder of ready configs: tiny.py, sub/deep.py (which imports from above) and the part _parts.py."""
    top = tmp_path / "ready"
    (top / "sub").mkdir(parents=True)
    (top / "_parts.py").write_text(PART)
    (top / "tiny.py").write_text(CONFIG.format(base="._parts"))
    (top / "sub/deep.py").write_text(CONFIG.format(base=".._parts").replace("tiny", "deep"))
    monkeypatch.setattr(ready, "folder", lambda: top)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"
    files.forget(files.loaded())


def test_show_prints_a_config_that_loads_to_the_same_run(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "tiny", "optim.lr=1e-3"]) == 0
    (house / "shown.py").write_text(capsys.readouterr().out)
    assert load("shown.py").run == load("tiny", ["optim.lr=1e-3"]).run


def test_show_json_has_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "tiny", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["model"]["adapter"]["type"] == "LoRA"
    assert data["schedule"] == {"type": "Cosine", "warmup": 0.03, "floor": 0.0}


@pytest.mark.parametrize("words", [[], ["TINY"], ["tiny run"], ["for tests"]])
def test_list_prints_names_and_lines_but_no_parts(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "tiny      A tiny Run: for tests." in lines or "tiny  A tiny Run: for tests." in lines
    assert not any("_parts" in line for line in lines)


def test_list_of_an_unknown_word_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "tinny"]) == 2
    assert "error[E-LIST-NONE]" in (told := capsys.readouterr().err)
    assert "did you mean tiny?" in told


@pytest.mark.parametrize(
    ("name", "dest", "main_file", "written"),
    [
        ("tiny", None, "tiny.py", {"tiny.py", "_parts.py"}),
        ("tiny.py", "new/folder", "new/folder/tiny.py", {"new/folder/tiny.py", "new/folder/_parts.py"}),
        ("tiny", "new/my.py", "new/my.py", {"new/my.py", "new/_parts.py"}),
        ("sub/deep", "new/sub", "new/sub/deep.py", {"new/sub/deep.py", "new/_parts.py"}),
    ],
)
def test_a_copy_loads_to_the_same_run(
    name: str, dest: str | None, main_file: str, written: set[str], house: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["copy", name, *([dest] if dest else [])]) == 0
    assert set(capsys.readouterr().out.split()) == written
    assert {p.relative_to(house).as_posix() for p in house.rglob("*") if p.is_file()} == written
    assert load(main_file).run == load(name.removesuffix(".py")).run


@pytest.mark.parametrize("taken", ["tiny.py", "_parts.py"])
def test_copy_never_overwrites(taken: str, house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (house / taken).write_text("mine")
    assert main(["copy", "tiny"]) == 2
    told = capsys.readouterr().err
    assert "error[E-COPY-EXISTS]" in told
    assert taken in told
    assert {p.name: p.read_text() for p in house.iterdir()} == {taken: "mine"}


def test_a_second_config_may_share_a_part_that_is_the_same(house: Path) -> None:
    assert main(["copy", "tiny", "one.py"]) == 0
    assert main(["copy", "tiny", "two.py"]) == 0
    assert main(["copy", "tiny", "two.py"]) == 2


def test_a_copy_without_its_parts_would_not_load(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant of the copy's law."""
    monkeypatch.setattr(copying, "imported", lambda file: iter(()))
    assert main(["copy", "tiny"]) == 0
    assert main(["show", "tiny.py"]) == 2


def test_copy_of_an_unknown_name_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["copy", "tinny"]) == 2
    assert "did you mean tiny?" in capsys.readouterr().err


def test_copy_into_a_file_is_told(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (house / "taken").write_text("x")
    assert main(["copy", "tiny", "taken"]) == 2
    assert "E-COPY-DEST" in capsys.readouterr().err


def test_env_tells_versions_devices_and_extras(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = look.version
    monkeypatch.setattr(look, "version", lambda package: "" if package == "bitsandbytes" else real(package))
    assert main(["env"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "pip install 'finetuner[quant]'" in lines["bitsandbytes"]
    assert "cpu" in lines["devices"]
    assert {"finetuner", "python", "torch", "transformers", "peft", "datasets", "deepspeed", "flash-attn"} <= set(lines)


def test_the_checkouts_own_configs_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a wheel they lie in the package, in a checkout beside it."""
    monkeypatch.undo()
    root = Path(__file__).parents[2]
    assert ready.folder() == root / "configs"
    monkeypatch.setattr(ready.finetuner, "__file__", str(tmp_path / "finetuner/__init__.py"))
    (tmp_path / "finetuner/configs").mkdir(parents=True)
    assert ready.folder() == tmp_path / "finetuner/configs"
