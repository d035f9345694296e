"""The command line: exit codes, one-screen errors without traceback, and no torch on the way to help or an error."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from finetuner.cli import main as main_module
from finetuner.cli.main import VERBS, Verb, available, main
from finetuner.errors import CheckpointError, DataError, Problem, TrainingStopped

ROOT = Path(__file__).parents[2]
CONFIG = """
from finetuner import *
config = Run(model=CausalLM("base"), data=Dialogues(Json("a.json")), optim=AdamW(lr=1e-4), batch=BatchSize(8),
             until=Steps(5))
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "run.py").write_text(CONFIG)
    return str(tmp_path / "run.py")


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A verb of the test's own, `finetuner probe`, whose `run` each test sets."""
    module = ModuleType("finetuner.cli.probe")
    module.add = lambda parser: parser.add_argument("--level", type=int)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "finetuner.cli.probe", module)
    monkeypatch.setattr(main_module, "available", lambda: {**available(), "probe": Verb("probe", "probes")})
    return module


def test_help_says_that_a_config_is_executed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "finetuner executes it" in text
    assert all(f"\n  {name} " in text for name in available())


def test_a_verb_is_offered_only_if_its_file_is_there() -> None:
    there = {path.stem for path in (ROOT / "finetuner/cli").glob("*.py")}
    assert set(available()) == {name for name, verb in VERBS.items() if verb.module in there}


@pytest.mark.parametrize("name", [name for name in available() if name in ("show", "list", "copy", "env")])
def test_each_verb_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"usage: finetuner {name}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("finetuner 0.")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["shw"], "did you mean `finetuner show`?"),
        (["xyzzy"], "see finetuner --help"),
        (["show"], "required: CONFIG\n"),
        (["show", "run.py", "--jsn"], "did you mean --json?"),
        (["show", "run.py", "--js"], "did you mean --json?"),
        (["show", "no_such.py"], "E-CONFIG-PATH"),
        (["list", "a", "b"], "unrecognized arguments"),
        (["probe", "--level", "x"], "invalid int value"),
    ],
)
def test_a_wrong_line_is_told_and_gives_2(
    words: list[str], told: str, verb: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error[E-")
    assert "remedy:" in err
    assert told in err


def test_no_command_prints_help_and_gives_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (DataError(Problem("E-DATA-X", "bad row")), 3, "error[E-DATA-X] bad row\n"),
        (CheckpointError(Problem("E-CKPT-X", "torn")), 4, "error[E-CKPT-X] torn\n"),
        (TrainingStopped(Problem("E-STOP-X", "nan")), 5, "error[E-STOP-X] nan\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (ValueError("one\ntwo"), 1, "unexpected error: ValueError: one; this is a bug, run again with --debug"),
        (ValueError("\x1b[31m"), 1, "unexpected error: ValueError: \\x1b[31m;"),
    ],
)
def test_an_exception_becomes_its_exit_code_and_one_line(
    raised: BaseException, code: int, told: str, verb: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(args: object) -> int:
        raise raised

    verb.run = fails  # type: ignore[attr-defined]
    assert main(["probe"]) == code
    assert capsys.readouterr().err.startswith(told)


@pytest.mark.parametrize("words", [["--debug", "probe"], ["probe", "--debug"], ["probe", "--level", "3", "--debug"]])
def test_debug_anywhere_shows_the_traceback(words: list[str], verb: ModuleType) -> None:
    def fails(args: object) -> int:
        raise DataError(Problem("E-X", "x"))

    verb.run = fails  # type: ignore[attr-defined]
    with pytest.raises(DataError):
        main(words)


def test_a_verbs_exit_code_is_the_commands(verb: ModuleType) -> None:
    verb.run = lambda args: args.level  # type: ignore[attr-defined]
    assert main(["probe", "--level", "7"]) == 7


def test_overrides_may_stand_between_the_options(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "--json", config, "optim.lr=1e-5"]) == 0
    first = capsys.readouterr().out
    assert main(["show", config, "optim.lr=1e-5", "--json"]) == 0
    assert capsys.readouterr().out == first
    assert '"lr": 1e-05' in first


def test_a_reader_that_leaves_is_no_error(config: str) -> None:
    code = f"{sys.executable} -m finetuner show {config} --json; echo rc $? >&2"
    done = subprocess.run(f"({code}) | true", shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stderr in ("rc 141\n", "rc 0\n")


PROBE = """
import sys
from finetuner.cli.main import main
code = main(sys.argv[1:])
heavy = sorted({"torch", "transformers", "datasets", "peft", "mmengine", "numpy"} & set(sys.modules))
print(code, heavy, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--help"], 0), (["show", "RUN"], 0), (["show", "RUN", "optim.lr=x"], 2), (["show", "no.py"], 2), (["list"], 0),
     (["show", "--help"], 0), (["train", "RUN", "optim.lr=x"], 2), (["train", "no.py"], 2)],
)  # fmt: skip
def test_no_heavy_package_is_imported(words: list[str], code: int, config: str) -> None:
    if words[0] not in available() and words[0] != "--help":
        pytest.skip("this command is not there yet")
    words = [config if word == "RUN" else word for word in words]
    done = subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.splitlines()[-1] == f"{code} []"


def test_help_takes_less_than_a_third_of_importing_torch() -> None:
    def seconds(*words: str) -> float:
        """The best of three, for the machine may be busy."""
        times = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, capture_output=True, cwd=ROOT)
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds("-m", "finetuner", "--help") <= 0.3 * seconds("-c", "import torch")
