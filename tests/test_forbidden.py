"""What the program never does: run what it found in a folder, unpickle, or hand text to a shell.

Over the syntax tree, so that a docstring may name what the code may not do.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "finetuner"
CALLS = {"eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "yaml.load", "os.system", "os.popen",
         "marshal.loads", "runpy.run_path"}  # fmt: skip
IMPORTS = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "runpy"}
KEYWORDS = {("weights_only", False), ("shell", True), ("trust_remote_code", True)}
ALLOWED = {
    ("config/files.py", "exec"): "the config that the person names on the command line is their program",
    ("config/files.py", "compile"): "the same",
    ("config/files.py", "runpy.run_path"): "the same",
    ("config/files.py", "runpy"): "the same",
}


def findings(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=function, keywords=keywords):
                name = ast.unparse(function)
                found += [name] * (name in CALLS)
                for keyword in keywords:
                    if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in KEYWORDS:
                        found.append(f"{keyword.arg}={keyword.value.value}")
                if name == "torch.load" and "weights_only" not in {keyword.arg for keyword in keywords}:
                    found.append("torch.load without weights_only")
            case ast.Import(names=names):
                found += [alias.name for alias in names if alias.name in IMPORTS]
            case ast.ImportFrom(module=module) if module in IMPORTS:
                found.append(str(module))
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                        found += [f"{key.value}={value.value}"] * ((key.value, value.value) in KEYWORDS)
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_forbidden_is_called(path: Path) -> None:
    file = path.relative_to(ROOT).as_posix()
    assert [found for found in findings(path.read_text(encoding="utf-8")) if (file, found) not in ALLOWED] == []


@pytest.mark.parametrize(
    "source",
    ["eval('1')", "exec(text)", "import pickle", "pickle.load(file)", "torch.load(p, weights_only=False)",
     "torch.load(p)", "subprocess.run(c, shell=True)", "yaml.load(text)", "f(trust_remote_code=True)",
     "f(**{'trust_remote_code': True})", "from pickle import load"],
)  # fmt: skip
def test_each_forbidden_thing_is_seen(source: str) -> None:
    assert findings(source)


def test_switching_a_model_to_evaluation_is_not_forbidden() -> None:
    assert findings("model.eval()") == []
