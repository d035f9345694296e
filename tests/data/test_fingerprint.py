"""Laws of the cache's name: whatever makes other samples makes another name, and nothing else does."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fake
import pytest

import finetuner
from finetuner.config.data import Csv, Dialogues, Documents, Json, Skip
from finetuner.data import fingerprint as fingerprint_module
from finetuner.data.fingerprint import fingerprint

MODULE = """
import re
import helpers_of_rows
from helpers_of_rows import tidy

WORDS = {"hello": "hi", "bye": ("so", "long")}
PATTERN = re.compile("a+")
SUFFIX = "."

class Cleaner:
    mark = "m"
    def clean(self, text):
        return text.strip()

CLEANER = Cleaner()

def inner(text):
    return text + SUFFIX

def rows(row, *, keep=3):
    def nested(text):
        return [inner(part) for part in text.split()]
    from late_helper import late
    text = tidy(row["q"]) + helpers_of_rows.more(row["a"]) + WORDS["hello"]
    return CLEANER.clean(PATTERN.sub("b", text)), nested("x")
"""
HELPERS = """
LIMIT = 5
def deep(text):
    return text[:LIMIT]
def tidy(text):
    return deep(text).strip()
def more(text):
    return text
def unused(text):
    return text
"""
LATE = "def late(text):\n    return text\n"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Describes `rows` of the module after some text of it was replaced; each time as if in a fresh process."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def described(old: str = "", new: str = "") -> str:
        for name, source in (("module_of_rows", MODULE), ("helpers_of_rows", HELPERS), ("late_helper", LATE)):
            (tmp_path / f"{name}.py").write_text(source.replace(old, new) if old else source)
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        sys.dont_write_bytecode = True
        return "\n".join(fingerprint_module.describe(importlib.import_module("module_of_rows").rows))

    return described


CHANGES = {
    "its body": ('sub("b"', 'sub("c"'),
    "its default": ("keep=3", "keep=4"),
    "a helper": ("text + SUFFIX", "SUFFIX + text"),
    "a helper's constant": ('SUFFIX = "."', 'SUFFIX = "!"'),
    "a constant": ('"hi"', '"ho"'),
    "a constant within a constant": ('"long")', '"short")'),
    "a pattern": ('"a+"', '"a*"'),
    "an object's method": ("text.strip()\n\nCLEANER", "text.lstrip()\n\nCLEANER"),
    "an object's class attribute": ('mark = "m"', 'mark = "n"'),
    "an inner function": ("text.split()]", "text.split(',')]"),
    "an imported helper": ("deep(text).strip()", "deep(text).rstrip()"),
    "a helper of a helper": ("text[:LIMIT]", "text[LIMIT:]"),
    "a constant of a helper of a helper": ("LIMIT = 5", "LIMIT = 6"),
    "a function of an imported module": ("def more(text):\n    return text", "def more(text):\n    return text * 2"),
    "a helper that is imported late": ("def late(text):\n    return text", "def late(text):\n    return text * 2"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_row_function_is_known_by_all_that_it_does(name: str, world: Callable[..., str]) -> None:
    old, new = CHANGES[name]
    assert any(old in source for source in (MODULE, HELPERS, LATE))
    before = world()
    assert world(old, new) != before
    assert world() == before


@pytest.mark.parametrize(
    ("old", "new"), [("\nSUFFIX", "\n# a comment\n\nSUFFIX"), ("def unused(text):", "def unused(txt):")]
)
def test_what_a_row_function_does_not_use_does_not_matter(old: str, new: str, world: Callable[..., str]) -> None:
    assert world() == world(old, new)


def test_a_function_known_by_its_name_alone_would_be_seen(
    world: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutant of the law above."""
    monkeypatch.setattr(fingerprint_module, "_function", lambda function, seen: iter([function.__qualname__]))
    assert world() == world(*CHANGES["a helper"])


def test_closures_and_partial_objects_are_looked_into() -> None:
    def closed(value: Any) -> Callable[[], Any]:
        return lambda: value

    describe = lambda value: "\n".join(fingerprint_module.describe(value))  # noqa: E731
    assert describe(closed(1)) != describe(closed(2))
    assert describe(closed({1, 2})) == describe(closed({2, 1}))
    cycle: list[Any] = []
    cycle.append(cycle)
    assert describe(closed(cycle))


# The name of a cache


def named(data: Any, spec: Any) -> str:
    return fingerprint(data, spec).digest


@dataclass
class Case:
    """A data set and its encoder, to be changed one thing at a time."""

    folder: Path
    data: dict[str, Any] = field(default_factory=dict)
    spec: Any = field(default_factory=fake.FakeSpec)
    content: str = '{"q": "a", "a": "b"}\n'

    def name(self) -> str:
        path = self.folder / "a.jsonl"
        path.write_text(self.content)
        os.utime(path, (1, 1))
        values: dict[str, Any] = {"source": Json(str(path)), "rows": fake.ask} | self.data
        return named(Dialogues(**values), self.spec)


def other_rows(row: Any) -> Any:
    return fake.ask({"q": row["q"], "a": row["a"] + "!"})


NINE = {
    "template text": {"spec": fake.FakeSpec(template="other")},
    "tokenizer file": {"spec": fake.FakeSpec(tokenizer_json="other")},
    "length": {"data": {"length": 100}},
    "row function": {"data": {"rows": other_rows}},
    "file content with the same size and time": {"content": '{"q": "a", "a": "c"}\n'},
    "too_long": {"data": {"too_long": "drop"}},
    "turns": {"spec": fake.FakeSpec(turns="last"), "data": {"turns": "last"}},
    "system": {"spec": fake.FakeSpec(system="be kind"), "data": {"system": "be kind"}},
    "replace": {"data": {"replace": (("a", "b"),)}},
    "on_bad_row": {"data": {"on_bad_row": Skip(1)}},
}


@pytest.mark.parametrize("name", NINE)
def test_whatever_makes_other_samples_makes_another_name(name: str, tmp_path: Path) -> None:
    case = Case(tmp_path)
    before = case.name()
    assert replace(case, **NINE[name]).name() != before
    assert case.name() == before


def test_the_kind_of_data_and_of_source_count(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("q,a\n")
    spec: Any = fake.FakeSpec()
    names = [
        named(kind(source(str(tmp_path / "a")), rows=fake.ask), spec)
        for kind in (Dialogues, Documents)
        for source in (Json, Csv)
    ]
    names.append(named(Dialogues(Csv(str(tmp_path / "a"), delimiter=";"), rows=fake.ask), spec))
    assert len(set(names)) == 5


def test_the_packages_version_and_code_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path)
    before = case.name()
    monkeypatch.setattr(finetuner, "__version__", "0.0.0.other")
    assert case.name() != before
    monkeypatch.undo()
    assert case.name() == before
    monkeypatch.setattr(fingerprint_module, "OWN", fingerprint_module.OWN[1:])
    assert case.name() != before


def test_packing_and_time_do_not_count(tmp_path: Path) -> None:
    case = Case(tmp_path)
    before = case.name()
    assert replace(case, data={"pack": False}).name() == before
    os.utime(tmp_path / "a.jsonl", (9, 9))
    assert case.name() == before


def test_a_name_taken_from_size_and_time_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant of the law on contents."""
    monkeypatch.setattr(fingerprint_module, "_sha256", lambda path: str(path.stat().st_size))
    with pytest.raises(AssertionError):
        test_whatever_makes_other_samples_makes_another_name("file content with the same size and time", tmp_path)


def test_another_process_gives_the_same_name(tmp_path: Path) -> None:
    before = Case(tmp_path).name()
    code = f"from pathlib import Path; from test_fingerprint import Case; print(Case(Path({str(tmp_path)!r})).name())"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.stdout.strip() == before, done.stderr


def test_the_packages_own_row_functions_are_described() -> None:
    from finetuner.dialogue import rows

    functions = [value for value in vars(rows).values() if isinstance(value, types.FunctionType)]
    texts = {"\n".join(fingerprint_module.describe(function)) for function in functions}
    assert len(texts) == len(functions) > 4
