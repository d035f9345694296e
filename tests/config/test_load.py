"""A config file becomes its run, and whatever is wrong with it is told with file, line and a remedy."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from write_files import GOOD, write

from finetuner import NF4, AdamW, BatchSize, CausalLM, Dialogues, Epochs, Json, LoRA, Run
from finetuner.config import files
from finetuner.config import load as load_module
from finetuner.config.load import function_reference, load, resolve
from finetuner.dialogue.rows import alpaca
from finetuner.errors import ConfigError, Problem

WANTED = Run(
    model=CausalLM("base", adapter=LoRA(rank=64), quant=NF4()),
    data=Dialogues(Json("a.json"), rows=alpaca),
    optim=AdamW(lr=2e-4),
    batch=BatchSize(16),
    until=Epochs(3),
)
CHILD = """
from dataclasses import replace
from .base import config as small, model
config = replace(small, model=replace(model, path="bigger"))
"""
ROWS = """
from finetuner.dialogue.message import Dialogue
def mine(row):
    return Dialogue(())
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    files.forget(files.loaded())


def problems_of(path: Path | str, *overrides: str) -> list[Problem]:
    with pytest.raises(ConfigError) as raised:
        load(path, overrides)
    return list(raised.value.problems)


def test_a_file_gives_its_run_its_text_and_its_name(tmp_path: Path) -> None:
    file = write(tmp_path, {"my.run-2.5.py": GOOD})
    loaded = load(file)
    assert (loaded.run, loaded.path, loaded.name) == (WANTED, file, "my.run-2.5")
    assert loaded.source == file.read_text()


@pytest.mark.parametrize(
    "texts",
    [
        {"child.py": CHILD, "base.py": GOOD},
        {"child.py": CHILD.replace(".base", ".sub.base"), "sub/base.py": GOOD},
        {"deep/er/child.py": CHILD.replace(".base", "..base"), "deep/base.py": GOOD},
        {"a b/é.x/child.py": CHILD, "a b/é.x/base.py": GOOD},
        {"child/child.py": CHILD, "child/base.py": GOOD, "child/__init__.py": "raise AssertionError('executed')"},
    ],
    ids=["beside", "below", "above", "odd names", "in a package"],
)
def test_a_child_is_its_base_and_the_difference(texts: dict[str, str], tmp_path: Path) -> None:
    assert load(write(tmp_path, texts)).run == replace(WANTED, model=replace(WANTED.model, path="bigger"))
    assert not list(tmp_path.rglob("__pycache__"))


def test_config_may_be_a_function(tmp_path: Path) -> None:
    text = GOOD.replace("config = Run(", "def config(size=1):\n  return Run(")
    assert load(write(tmp_path, {"run.py": text})).run == WANTED


def test_overrides_apply(tmp_path: Path) -> None:
    assert load(write(tmp_path, {"run.py": GOOD}), ["optim.lr=1e-5"]).run == replace(WANTED, optim=AdamW(lr=1e-5))


def test_a_changed_file_is_executed_again_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    file = write(tmp_path, {"child.py": CHILD, "base.py": GOOD + ROWS.replace("mine", "other")})
    first, second = load(file).run, load(file).run
    assert first.model is second.model
    write(tmp_path, {"base.py": GOOD.replace("rank=64", "rank=8")})
    assert load(file).run.model.adapter == LoRA(rank=8)


WRONG = [
    ("no such file", {"other.py": ""}, "run.py", "E-CONFIG-PATH", "run.py", "finetuner list"),
    ("nearly a file", {"runs.py": ""}, "rums.py", "E-CONFIG-PATH", "rums.py", "did you mean runs.py?"),
    ("nearly a ready one", {"x.py": ""}, "qwen3_8b_qlora_thought", "E-CONFIG-PATH", "", "did you mean qwen3_8b_"),
    ("a long name", {"x.py": ""}, "x" * 300 + ".py", "E-CONFIG-PATH", "xxx", "finetuner list"),
    ("a NUL", {"run.py": "x = '\0'"}, "run.py", "E-CONFIG-", "run.py", ""),
    ("a folder", {"folder/run.py": ""}, "folder", "E-CONFIG-PATH", "folder", "NAME.py"),
    ("no Python", {"config.json": "{}"}, "config.json", "E-CONFIG-PATH", "config.json", "give the .py file"),
    ("empty", {"run.py": " \n"}, "run.py", "E-CONFIG-NONE", "run.py", "finetuner list"),
    ("no config", {"run.py": "x = 3"}, "run.py", "E-CONFIG-NONE", "run.py", "finetuner list"),
    ("other name", {"run.py": GOOD.replace("config =", "job =")}, "run.py", "E-CONFIG-NONE", "run.py", "config = job"),
    ("typo of config", {"run.py": "konfig = 3"}, "run.py", "E-CONFIG-NONE", "run.py", "did you mean config = konfig?"),
    ("syntax", {"run.py": "x = 1\ny = (2,\nz = 3\n"}, "run.py", "E-CONFIG-SYNTAX", "run.py:2", "caret"),
    ("syntax of a sibling", {"run.py": CHILD, "base.py": "x ="}, "run.py", "E-CONFIG-SYNTAX", "base.py:1", "caret"),
    ("indentation", {"run.py": "x = 1\n  y = 2"}, "run.py", "E-CONFIG-SYNTAX", "run.py:2", "caret"),
    ("package", {"run.py": "\n\nimport nopackage"}, "run.py", "E-CONFIG-IMPORT", "run.py:2", "pip install nopackage"),
    ("absolute sibling", {"run.py": "from bbase import x", "bbase.py": ""}, "run.py", "E-CONFIG-IMPORT", "run.py:1",
     "from .bbase import"),
    ("noun", {"run.py": "from finetuner import Lora"}, "run.py", "E-CONFIG-IMPORT", "run.py:1", "did you mean 'LoRA'?"),
    ("name", {"run.py": CHILD, "base.py": "models = 3\nconfig = 3"}, "run.py", "E-CONFIG-IMPORT", "run.py:2",
     "did you mean 'models'?"),
    ("no import", {"run.py": "model = CausalLM('x')"}, "run.py", "E-CONFIG-RAISED", "run.py:1",
     "from finetuner import CausalLM"),
    ("sibling", {"run.py": CHILD, "bases.py": GOOD}, "run.py", "E-CONFIG-SIBLING", "run.py:2", "did you mean .bases?"),
    ("cycle", {"run.py": "from .b import x\nconfig = 1", "b.py": "from .run import config"}, "run.py", "E-CONFIG-CYCLE",
     "b.py", "third file"),
    ("itself", {"run.py": "from .run import x"}, "run.py", "E-CONFIG-CYCLE", "run.py", "third file"),
    ("raises", {"run.py": "x = 1\ny = 1 / 0"}, "run.py", "E-CONFIG-RAISED", "run.py:2", "--debug"),
    ("raises below", {"run.py": CHILD, "base.py": "def f():\n  return {}['a']\nf()"}, "run.py", "E-CONFIG-RAISED",
     "base.py:2", "--debug"),
    ("function raises", {"run.py": "def config():\n  raise ValueError('no')"}, "run.py", "E-CONFIG-RAISED", "run.py:2",
     "--debug"),
    ("exit", {"run.py": "import sys\nsys.exit(3)"}, "run.py", "E-CONFIG-EXIT", "run.py:2", "remove the exit"),
    ("deep", {"run.py": "def f(): f()\nf()"}, "run.py", "E-CONFIG-RAISED", "run.py:1", "--debug"),
    ("arguments", {"run.py": "def config(size): ..."}, "run.py", "E-CONFIG-RUN", "run.py:1", "give size a default"),
    ("None", {"run.py": "def config(): ..."}, "run.py", "E-CONFIG-RUN", "run.py", "must return it"),
    ("dict", {"run.py": "config = {}"}, "run.py", "E-CONFIG-RUN", "run.py", "model = dict("),
    ("class", {"run.py": "from finetuner import Run\nconfig = Run"}, "run.py", "E-CONFIG-RUN", "run.py", "Run(...)"),
    ("noun for run", {"run.py": "from finetuner import *\nconfig = LoRA()"}, "run.py", "E-CONFIG-RUN", "run.py",
     "put it into a Run"),
    ("int", {"run.py": "config = 3"}, "run.py", "E-CONFIG-RUN", "run.py", "config = Run(...)"),
    ("lambda", {"run.py": GOOD.replace("rows=alpaca", "rows=lambda row: row")}, "run.py", "E-CONFIG-FUNCTION",
     "run.py:8", "such a function"),
    ("partial", {"run.py": "from functools import partial" + GOOD.replace("rows=alpaca", "rows=partial(alpaca)")},
     "run.py", "E-CONFIG-FUNCTION", "run.py", "such a function"),
    ("wrong node", {"run.py": GOOD.replace("lr=2e-4", "lr='x'")}, "run.py", "E-CONFIG-VALUE", "run.py:9", "change lr"),
    ("wrong node of a sibling", {"run.py": CHILD, "base.py": GOOD.replace("rank=64", "rnk=64")}, "run.py",
     "E-CONFIG-UNKNOWN", "base.py:5", "did you mean 'rank'?"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "name", "code", "where", "remedy"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)
def test_a_wrong_file_tells_code_place_and_remedy(
    texts: dict[str, str], name: str, code: str, where: str, remedy: str, tmp_path: Path
) -> None:
    write(tmp_path, texts)
    for _ in range(2):
        (problem,) = problems_of(name)
        assert problem.code.startswith(code)
        assert problem.where.startswith(where)
        assert remedy in problem.remedy
        assert len(str(problem).splitlines()) < 12


def test_a_syntax_error_shows_the_line_and_a_caret_below_the_place(tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, {"run.py": "x = 1\nlearning rate = 3\n"}))
    line, caret = str(problem).splitlines()[2:4]
    assert line == "  found:  learning rate = 3"
    assert caret.rstrip("^").isspace()
    assert line[caret.index("^") :].startswith(("learning", "rate"))


def test_a_cycle_is_told_as_the_way_round(tmp_path: Path) -> None:
    texts = {"a.py": "from .b import x", "b.py": "from .c import x", "c.py": "from .a import x"}
    (problem,) = problems_of(write(tmp_path, texts))
    assert problem.found == "a.py -> b.py -> c.py -> a.py"


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_bytes(b"x = '\xff'")
    (problem,) = problems_of("run.py")
    assert problem.code == "E-CONFIG-READ"
    assert "UTF-8" in problem.fits


def test_all_wrong_nodes_of_all_files_are_told_in_one_error(tmp_path: Path) -> None:
    base = GOOD.replace("rank=64", "rank=0").replace("lr=2e-4", "lr=-1")
    texts = {
        "run.py": CHILD.replace("config =", "LoRA(alpha=0)\nconfig =") + "\nfrom finetuner import NF9",
        "base.py": base,
    }
    texts["run.py"] = "from finetuner import LoRA\n" + texts["run.py"]
    found = problems_of(write(tmp_path, texts))
    assert [problem.where for problem in found] == ["base.py:5", "base.py:9", "run.py:5"]
    assert problems_of("run.py") == found


def test_a_file_has_a_limited_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "LIMIT_S", 2.0)
    text = "while True:\n  try:\n    while True: pass\n  except Exception: pass\n"
    (problem,) = problems_of(write(tmp_path, {"run.py": text}))
    assert problem.code == "E-CONFIG-TIME"
    assert problem.where == "run.py:3"
    assert "2 s" in problem.what


def test_a_thread_can_load(tmp_path: Path) -> None:
    file = write(tmp_path, {"run.py": GOOD})
    runs: list[Run] = []
    thread = threading.Thread(target=lambda: runs.append(load(file).run))
    thread.start()
    thread.join()
    assert runs == [WANTED]


def test_ctrl_c_stays_ctrl_c(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        load(write(tmp_path, {"run.py": "raise KeyboardInterrupt"}))


def test_built_in_functions_and_those_of_modules_have_references() -> None:
    assert function_reference(alpaca) == "finetuner.dialogue.rows:alpaca"
    assert resolve("finetuner.dialogue.rows:alpaca") is alpaca
    assert resolve(function_reference(os.path.join)) is os.path.join


def test_a_function_of_a_config_file_is_found_by_its_reference(tmp_path: Path) -> None:
    run = load(write(tmp_path, {"run.py": ROWS + GOOD.replace("rows=alpaca", "rows=mine")})).run
    reference = function_reference(run.data.rows)  # type: ignore[union-attr]
    assert reference == f"{tmp_path}/run.py:mine"
    assert resolve(reference) is run.data.rows  # type: ignore[union-attr]


def test_a_worker_process_can_unpickle_a_function_of_a_config_file(tmp_path: Path) -> None:
    """The worker has imported nothing of ours before; a module name that only this process knows would fail there."""
    file = write(
        tmp_path, {"run.py": CHILD + ROWS.replace("mine", "other"), "base.py": ROWS + GOOD.replace("=alpaca", "=mine")}
    )
    rows = load(file).run.data.rows  # type: ignore[union-attr]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(rows, [{}]) == [rows({})]
    assert pickle.loads(pickle.dumps(rows)) is rows
    assert rows.__module__ in sys.modules


@pytest.mark.parametrize("reference", ["x", "", "a:b:", "no.such:name", "os.path:jion", "/no/file.py:x", "os.path:sep"])
def test_a_reference_to_nothing_is_told(reference: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve(reference)
    (problem,) = raised.value.problems
    assert problem.code == "E-CONFIG-FUNCTION"
    assert problem.remedy


def test_what_a_config_prints_stays_out_of_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(write(tmp_path, {"run.py": GOOD + "print('hello')"}))
    assert capsys.readouterr() == ("", "hello\n")


def test_a_literal_secret_is_warned_of_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(write(tmp_path, {"run.py": GOOD + f"TOKEN = 'hf_{'aB3' * 10}'\n"}))
    told = capsys.readouterr().err
    assert "run.py:13: this looks like a secret" in told
    assert "aB3" not in told
