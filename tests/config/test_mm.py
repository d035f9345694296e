"""A file in mmengine's notation gives the run that a plain config gives, and its typos are told as there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from write_files import GOOD, write

from finetuner import NF4, AdamW, CausalLM, Cosine, Dialogues, Fresh, Hub, Json, LoRA, Mix, Run, Steps
from finetuner.config import files
from finetuner.config import mm as mm_module
from finetuner.config.load import load
from finetuner.config.mm import is_mmengine
from finetuner.errors import ConfigError, Problem

BASE = """
from finetuner import NF4, AdamW, BatchSize, CausalLM, Dialogues, Epochs, Json, LoRA
from finetuner.dialogue.rows import alpaca

rank = 64
sizes = [1, 2]
lora = dict(type=LoRA, rank=rank)
model = dict(type=CausalLM, path="base", adapter=lora, quant=dict(type=NF4))
data = dict(type=Dialogues, source=dict(type=Json, files="a.json"), rows=alpaca)
optim = dict(type=AdamW, lr=2e-4)
batch = dict(type=BatchSize, total=16)
until = dict(type=Epochs, count=3)
"""
STRINGS = """
model = dict(type="CausalLM", path="base", adapter=dict(rank=64), quant=dict(type="NF4"))
data = {"type": "Dialogues", "source": dict(type="finetuner.Json", files="a.json"), "rows": "alpaca"}
optim = dict(lr=2e-4)
batch = dict(total=16)
until = dict(type="Epochs", count=3)
"""
READ = """
from mmengine.config import read_base

with read_base():
    from .base import *

"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    files.forget(files.loaded())


@pytest.fixture
def wanted(tmp_path: Path) -> Run:
    return load(write(tmp_path / "plain", {"run.py": GOOD})).run


def child(text: str, folder: Path) -> Path:
    return write(folder, {"run.py": READ + text, "base.py": BASE})


def problems_of(file: Path) -> list[Problem]:
    with pytest.raises(ConfigError) as raised:
        load(file)
    return list(raised.value.problems)


@pytest.mark.parametrize("text", [BASE, STRINGS, "import finetuner as ft\n" + BASE.replace("=LoRA,", "=ft.LoRA,")])
def test_dicts_give_the_nodes_that_a_plain_config_gives(text: str, tmp_path: Path, wanted: Run) -> None:
    assert load(write(tmp_path, {"run.py": text})).run == wanted


def test_a_base_is_inherited_and_changed_in_place(tmp_path: Path, wanted: Run) -> None:
    text = """
model.update(dict(path="bigger", dtype="float32"))
model.adapter.rank = 8
optim = dict(lr=1e-5, betas=[0.9, 0.95], rates={"a": 1e-6})
schedule = dict(type="Cosine", warmup=dict(type="Steps", count=5))
"""
    model = CausalLM("bigger", adapter=LoRA(rank=8), quant=NF4(), dtype="float32")
    optim = AdamW(lr=1e-5, betas=(0.9, 0.95), rates={"a": 1e-6})
    run = load(child(text, tmp_path)).run
    assert run == replace(wanted, model=model, optim=optim, schedule=Cosine(warmup=Steps(5)))


def test_a_base_of_the_older_notation_is_merged(tmp_path: Path, wanted: Run) -> None:
    file = write(tmp_path, {"run.py": '_base_ = ["./base.py"]\nmodel = dict(path="bigger")\n', "base.py": STRINGS})
    assert load(file).run == replace(wanted, model=replace(wanted.model, path="bigger"))


def test_mixes_and_models_of_ones_own_can_be_laid_out(tmp_path: Path, wanted: Run) -> None:
    text = """
one = dict(type="Dialogues", source=dict(type="Hub", name="x"), rows="alpaca")
data = dict(type="Mix", parts=[(data, 1.0), (one, 2.0)])
model = dict(type="CausalLM", path=dict(type="Fresh", config=dict(model_type="llama", x=[1]), tokenizer="t"))
"""
    run = load(child(text, tmp_path)).run
    second = replace(wanted.data, source=Hub("x"))  # type: ignore[arg-type]
    assert isinstance(wanted.data, Dialogues)
    model = CausalLM(Fresh({"model_type": "llama", "x": [1]}, "t"))
    assert run == replace(wanted, data=Mix(((wanted.data, 1.0), (second, 2.0))), model=model)
    assert wanted.data.source == Json("a.json")


def test_overrides_apply(tmp_path: Path, wanted: Run) -> None:
    file = child("", tmp_path)
    assert load(file, ["model.adapter.rank=8"]).run.model.adapter == LoRA(rank=8)
    assert load(file).run == wanted


WRONG = [
    ("model.update(dtyp='float32')", "E-CONFIG-UNKNOWN", "run.py:6: model.dtyp", "did you mean 'dtype'?"),
    ("model.update(\n  dict(dtype='bf16'))", "E-CONFIG-VALUE", "run.py:7: model.dtype", "did you mean 'bfloat16'?"),
    ("model.adapter.rnk = 3", "E-CONFIG-UNKNOWN", "run.py:6: model.adapter.rnk", "did you mean 'rank'?"),
    ("model.adapter = None", "E-QUANT-FULL", "run.py: model", "add adapter=LoRA()"),
    ("schedule = dict(type='Cosin')", "E-CONFIG-UNKNOWN", "run.py:6: schedule", "did you mean Cosine?"),
    ("schedule = dict(warmup=0.1)", "E-CONFIG-MISSING", "run.py:6: schedule", "add type=Constant"),
    (
        "schedule = dict(\n  type='Cosine',\n  warmup='soon')",
        "E-CONFIG-VALUE",
        "run.py:8: schedule.warmup",
        "change warm",
    ),
    ("until = dict(type='LoRA')", "E-CONFIG-VALUE", "run.py: until", "change until"),
    ("optm = dict(lr=1e-4)", "E-CONFIG-UNKNOWN", "run.py:6: optm", "did you mean 'optim'?"),
    ("train_cfg = dict(type='EpochBasedTrainLoop')", "E-CONFIG-UNKNOWN", "run.py:6: train_cfg", "remove it"),
    ("sed = 3", "E-CONFIG-UNKNOWN", "run.py:6: sed", "did you mean 'seed'?"),
    ("data.rows = 'alpace'", "E-CONFIG-FUNCTION", "run.py:6: data.rows", "did you mean 'alpaca'?"),
    ("x = 1 / 0", "E-CONFIG-RAISED", "run.py:6", "--debug"),
    ("x = (", "E-CONFIG-SYNTAX", "run.py:6", "caret"),
    ("data.rows = lambda row: row", "E-CONFIG-FUNCTION", "run.py:6", "such a function"),
]


@pytest.mark.parametrize(("text", "code", "where", "remedy"), WRONG)
def test_a_wrong_file_tells_code_place_and_remedy(
    text: str, code: str, where: str, remedy: str, tmp_path: Path
) -> None:
    found = problems_of(child(text, tmp_path))
    assert [problem.code for problem in found] == [code]
    assert found[0].where.startswith(where.replace("run.py: until", "run.py:6: until"))
    assert remedy in found[0].remedy


def test_all_typos_are_told_at_once(tmp_path: Path) -> None:
    text = "model.update(dtyp='x', attention='y')\noptm = dict(lr=1)\nschedule = dict(type='Cosin')"
    assert [p.where for p in problems_of(child(text, tmp_path))] == [
        "run.py:6: model.dtyp", "run.py:6: model.attention", "run.py:8: schedule", "run.py:7: optm",
    ]  # fmt: skip


def test_helpers_are_no_typos(tmp_path: Path, wanted: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "paths = ['a']\nseeds = 3\nextra = seeds + 1\nlora.rank = 8\noptims = dict(lr=1e-3)\noptim.update(optims)"
    file = child(text, tmp_path)
    assert load(file).run.optim.lr == 1e-3
    monkeypatch.setattr(mm_module, "read_names", lambda file: set())
    assert {p.what for p in problems_of(file)} >= {"Run has no field 'seeds'", "Run has no field 'optims'"}


def test_a_base_that_is_not_there_is_told(tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, {"run.py": READ}))
    assert (problem.code, problem.where) == ("E-CONFIG-SIBLING", "run.py:3")
    assert "base.py" in problem.found


def test_bases_in_a_circle_are_told_as_the_way_round(tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, {"run.py": READ, "base.py": READ.replace(".base", ".run")}))
    assert (problem.code, problem.found) == ("E-CONFIG-CYCLE", "run.py -> base.py -> run.py")


@pytest.mark.parametrize(
    ("source", "answer"),
    [(BASE, True), (STRINGS, True), (READ, True), ("_base_ = 'x'", True), (GOOD, False), ("x = (", False),
     ("model = dict(a=1)\nconfig = f(model)", False), ("def config(): ...\nmodel = {}", False), ("x = {}", False)],
)  # fmt: skip
def test_which_notation_a_file_is_in_is_seen_in_its_text(source: str, answer: bool) -> None:
    assert is_mmengine(source) is answer


def test_mmengine_is_imported_only_for_its_own_notation(tmp_path: Path) -> None:
    code = "import sys; from finetuner.config.load import load; load(sys.argv[1]); print('mmengine' in sys.modules)"
    for text, answer in ((GOOD, "False"), (BASE, "True")):
        file = write(tmp_path, {f"{answer}.py": text})
        words = [sys.executable, "-c", code, file]
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        assert done.stdout.strip() == answer


def test_a_star_outside_read_base_is_told_with_its_line(tmp_path: Path) -> None:
    text = BASE.replace(
        "from finetuner import NF4, AdamW", "from finetuner import *\nfrom finetuner import NF4, AdamW", 1
    )
    assert "import *" in text
    (problem,) = problems_of(write(tmp_path, {"run.py": text}))
    assert problem.code == "E-CONFIG-STAR"
    assert problem.where.startswith("run.py:")
