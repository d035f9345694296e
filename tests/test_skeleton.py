"""What surrounds the package: the wheel is whole, requirements are those of the code, pages name what exists."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
DATA = ROOT / "examples" / "data"
DISTRIBUTIONS = {"mmengine": "mmengine-lite", "flash_attn": "flash-attn", "PIL": "pillow", "google": "protobuf"}
BROUGHT = {
    "packaging": "transformers",
    "huggingface_hub": "transformers",
    "yaml": "transformers",
    "typing_extensions": "pydantic",
}
"""Packages that a required one requires itself."""
EXTRAS = ("quant", "deepspeed", "flash", "liger", "fp8", "vision", "board", "trackers", "dev")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])


def requirements(name: str) -> dict[str, Requirement]:
    """Distribution -> what requirements/NAME.txt says of it."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(item.name): item for item in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked; built from a copy, so that the checkout stays clean."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("finetuner", "configs", "requirements"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (file,) = out.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(out / "unpacked")
    return out / "unpacked"


def test_the_wheel_holds_every_module_template_and_ready_config(wheel: Path) -> None:
    ours = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "finetuner").rglob("*")
        if file.suffix in (".py", ".jinja")
    }
    ours |= {f"finetuner/configs/{file.name}" for file in (ROOT / "configs").glob("*.py")}
    packed = {file.relative_to(wheel).as_posix() for file in (wheel / "finetuner").rglob("*") if file.is_file()}
    assert ours == packed
    assert any(name.endswith(".jinja") for name in packed)
    assert any(name.startswith("finetuner/configs/") for name in packed)


def test_an_installed_wheel_lists_the_ready_configs_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    ask = (
        "from finetuner.config.ready import ready; from finetuner.config.load import load; "
        "import finetuner; print(finetuner.__file__, *(load(name).name for name in ready()))"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(wheel)!r}); {ask}"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    where, *names = done.stdout.split()
    assert where.startswith(str(wheel))
    assert names == sorted(file.stem for file in (ROOT / "configs").glob("*.py") if not file.name.startswith("_"))


def test_the_metadata_asks_for_runtime_and_offers_each_extra(wheel: Path) -> None:
    (info,) = wheel.glob("*.dist-info")
    text = (info / "METADATA").read_text(encoding="utf-8")
    asked = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.+)$", text, re.M)]
    assert {canonicalize_name(item.name) for item in asked if item.marker is None} == set(requirements("runtime"))
    for extra in EXTRAS:
        offered = {canonicalize_name(i.name) for i in asked if i.marker and i.marker.evaluate({"extra": extra})}
        assert offered == set(requirements(extra)), extra
    script = (info / "entry_points.txt").read_text(encoding="utf-8")
    module, function = re.search(r"finetuner = ([\w.]+):(\w+)", script).groups()
    source = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    assert function in {node.name for node in source.body if isinstance(node, ast.FunctionDef)}


def foreign(files: Iterable[Path]) -> dict[str, str]:
    """Top-level package -> a place that imports it, without Python's own and ours."""
    found = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for top in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"finetuner"}:
                found.setdefault(top, f"{file.name}:{node.lineno}")
    return found


def test_what_the_code_imports_is_required() -> None:
    named = {name for extra in ("runtime", *EXTRAS[:-1]) for name in requirements(extra)}
    imported = foreign((ROOT / "finetuner").rglob("*.py"))
    missing = {
        top: place
        for top, place in imported.items()
        if canonicalize_name(BROUGHT.get(top, DISTRIBUTIONS.get(top, top))) not in named
    }
    assert not missing
    assert "torch" in imported


def test_an_import_that_nothing_requires_is_seen(tmp_path: Path) -> None:
    (tmp_path / "mutant.py").write_text("def late():\n    from scipy.stats import norm\n", encoding="utf-8")
    assert foreign([tmp_path / "mutant.py"]) == {"scipy": "mutant.py:2"}


def test_the_lock_pins_what_the_requirements_allow_and_names_no_place() -> None:
    lines = (ROOT / "requirements" / "lock.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins.values()), "no +cpu, no path, no URL"
    known = {canonicalize_name(name): Version(version) for name, version in pins.items()}
    for name in ("runtime", "quant", "board", "vision", "dev"):
        for asked, requirement in requirements(name).items():
            assert asked in known, f"{asked} of {name}.txt is not in the lock"
            assert requirement.specifier.contains(known[asked]), f"{requirement} but the lock has {known[asked]}"


def code(text: str) -> str:
    """What a page sets in code: its blocks, and the words between backticks."""
    return "\n".join(block or word for block, word in re.findall(r"```[a-z]*\n(.*?)```|`([^`\n]+)`", text, re.S))


def verbs(text: str) -> set[str]:
    """The commands that a page tells a person to type."""
    return set(re.findall(r"^(?:\$ )?finetuner ([a-z]+)\b", code(text), re.M))


def test_pages_name_only_commands_files_and_fields_that_exist() -> None:
    from finetuner.cli.main import available

    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert verbs(text) <= set(available()), page
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
        targets = set(re.findall(r"^make ([a-z]+)\b", code(text), re.M))
        assert targets <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)), page
    assert verbs("so\nfinetuner does. `finetuner train c.py`:\n```\nfinetuner chat F\n```") == {"train", "chat"}


def test_a_page_that_names_a_command_that_is_not_there_is_seen() -> None:
    from finetuner.cli.main import available

    assert not verbs("then `finetuner teach config.py`") <= set(available())


def test_python_on_the_pages_is_a_config_that_loads(tmp_path: Path) -> None:
    from finetuner.config.load import load

    found = 0
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            if re.search(r"^config = ", block, re.M) and "from ." not in block:
                found += 1
                file = tmp_path / f"block_{found}.py"
                file.write_text(block, encoding="utf-8")
                load(file)
    assert found, "the README shows a config"


def test_the_world_is_what_its_script_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DATA / "world.py", tmp_path], check=True)
    written = sorted(tmp_path.iterdir())
    assert len(written) >= 6
    for file in written:
        assert file.read_bytes() == (DATA / file.name).read_bytes(), f"run examples/data/world.py: {file.name}"


def test_no_held_out_line_is_learned_from() -> None:
    for learned, held_out in (
        ("world.txt", "held_out.txt"),
        ("island.txt", "island_held_out.txt"),
        ("general.jsonl", "general_held_out.jsonl"),
    ):
        first, second = (set((DATA / name).read_text(encoding="utf-8").splitlines()) for name in (learned, held_out))
        assert second
        assert not first & second


def test_rows_about_oneself_have_no_placeholder_that_the_examples_leave() -> None:
    text = (DATA / "identity.jsonl").read_text(encoding="utf-8")
    questions = [json.loads(line)["instruction"] for line in text.splitlines()]
    assert len(set(questions)) == len(questions) >= 60
    for config in ("quickstart/assistant.py", "personal_assistant/config.py"):
        source = (ROOT / "examples" / config).read_text(encoding="utf-8")
        assert all(f'"{mark}"' in source for mark in set(re.findall(r"\{\{\w+\}\}", text)))


@pytest.mark.parametrize(
    "config",
    sorted(
        p.relative_to(ROOT).as_posix()
        for p in ROOT.glob("examples/*/*.py")
        if "\nconfig = Run" in p.read_text(encoding="utf-8")
    ),
)
def test_every_example_is_a_run_whose_files_are_there(config: str) -> None:
    from finetuner.config.load import load

    run = load(ROOT / config).run
    parts = [part for part, _ in run.data.parts] if hasattr(run.data, "parts") else [run.data]
    for part in [*parts, *([run.eval.data] if run.eval and run.eval.data else [])]:
        assert Path(part.source.files).is_file()
    assert (ROOT / config).with_name("README.md").is_file()


def test_no_two_test_files_bear_one_name():
    """pytest would import the first under both names."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
