"""Every wrong config and every wrong command line gets its one-screen error, before any folder of a model is read.

The world has no model at all: a message about one would show that it was looked for first.
"""

from __future__ import annotations

import bad
import pytest
from bad import Case, both, edit, nothing, write

from finetuner.config import load

LR = "lr=1e-2"
MODEL = 'CausalLM("model", dtype="float32", checkpointing=False)'
SOURCE = 'Json("rows.jsonl")'


def adapter(fields: str) -> str:
    return MODEL[:-1] + f", adapter=LoRA({fields}))"


def value(name: str, old: str, new: str, *words: str) -> Case:
    """A value that does not fit its field."""
    return Case(name, edit(old, new), "E-CONFIG-VALUE", ("config.py:", *words))


def usage(name: str, *args: str, code: str = "E-USAGE", words: tuple[str, ...] = ()) -> Case:
    return Case(name, nothing, code, words, args)


CONFIGS = [
    Case("1 no such file", nothing, "E-CONFIG-PATH", ("absent.py", "finetuner list"), ("train", "absent.py")),
    Case("1 nearly a file", nothing, "E-CONFIG-PATH", ("did you mean config.py?",), ("train", "confg.py")),
    Case(
        "2 a folder", lambda f: (f / "runs").mkdir(), "E-CONFIG-PATH", ("a folder", "runs/NAME.py"), ("train", "runs")
    ),
    Case("2 another kind of file", nothing, "E-CONFIG-PATH", ("rows.jsonl", "Python file"), ("train", "rows.jsonl")),
    Case("3 empty", write(config_py=""), "E-CONFIG-NONE", ("config.py", "an empty file", "config = Run(")),
    Case("3 comments only", write(config_py="# a run\n"), "E-CONFIG-NONE", ("config.py",)),
    Case("3 not UTF-8", write(config_py=b"# \xe9\n"), "E-CONFIG-READ", ("config.py", "UTF-8")),
    Case("4 syntax", edit("optim=", "optim=*="), "E-CONFIG-SYNTAX", ("config.py:8", "optim=*=", "^")),
    Case(
        "5 package",
        edit("config =", "import deepsped\nconfig ="),
        "E-CONFIG-IMPORT",
        ("config.py:5", "deepsped", "pip install"),
    ),
    Case("5 name", edit("import *", "import Rum"), "E-CONFIG-IMPORT", ("config.py:3", "did you mean 'Run'?")),
    Case(
        "6 cycle",
        both(edit("config =", "from .other import x\nconfig ="), write(other_py="from .config import config\nx = 1\n")),
        "E-CONFIG-CYCLE",
        ("config.py -> other.py -> config.py", "third file"),
    ),
    Case(
        "7 base config", edit("config =", "from .bass import x\nconfig ="), "E-CONFIG-SIBLING", ("config.py:5", "bass")
    ),
    Case("8 raises", edit("config =", "1 / 0\nconfig ="), "E-CONFIG-RAISED", ("ZeroDivisionError", "config.py:5")),
    Case("8 a name that is not there", edit("AdamW(", "Adamw("), "E-CONFIG-RAISED", ("config.py:8", "AdamW")),
    Case("8 exits", edit("config =", "raise SystemExit(0)\nconfig ="), "E-CONFIG-EXIT", ("config.py:5", "remove")),
    Case("8 no end", edit("config =", "while True: pass\nconfig ="), "E-CONFIG-TIME", ("config.py:5", "2 s")),
    Case(
        "10 unknown key",
        edit(LR, "lr=1e-2, weight_decai=0.1"),
        "E-CONFIG-UNKNOWN",
        ("config.py:8", "did you mean 'weight_decay'?"),
    ),
    Case("10 unknown key of a Run", edit("folder=", "foldr="), "E-CONFIG-UNKNOWN", ("config.py:5", "folder")),
    Case("11 wrong section", edit(LR, "lr=1e-2, rank=8"), "E-CONFIG-UNKNOWN", ("config.py:8", "LoRA")),
    value("13 a text for a number", LR, 'lr="2e-4"', "AdamW.lr", "'2e-4'", "2e-4"),
    value("14 lr -1", LR, "lr=-1", "AdamW.lr", "-1", "above 0"),
    value("14 lr 0", LR, "lr=0", "AdamW.lr", "above 0"),
    value("14 lr nan", LR, "lr=float('nan')", "AdamW.lr", "nan"),
    value("14 lr infinite", LR, "lr=float('inf')", "AdamW.lr", "inf"),
    value("14 lr 1e3", LR, "lr=1e3", "AdamW.lr", "1000.0", "10"),
    value("14 lr True", LR, "lr=True", "AdamW.lr", "True"),
    value("14 lr a complex", LR, "lr=1j", "AdamW.lr", "1j"),
    value("14 a weight decay below 0", "weight_decay=0.01", "weight_decay=-0.1", "AdamW.weight_decay"),
    value("14 a weight decay that is nan", "weight_decay=0.01", "weight_decay=float('nan')", "AdamW.weight_decay"),
    value("14 clip infinite", LR, "lr=1e-2, clip=float('inf')", "AdamW.clip"),
    value("14 beta 1", LR, "lr=1e-2, betas=(0.9, 1.0)", "AdamW.betas[1]"),
    value("14 warmup -0.1", 'folder="out"', "schedule=Cosine(warmup=-0.1)", "Cosine.warmup"),
    value("15 epochs 0", "Steps(1)", "Epochs(0)", "Epochs.count", "above 0"),
    value("15 epochs nan", "Steps(1)", "Epochs(float('nan'))", "Epochs.count"),
    value("15 epochs infinite", "Steps(1)", "Epochs(float('inf'))", "Epochs.count"),
    value("15 steps 0", "Steps(1)", "Steps(0)", "Steps.count"),
    value("15 steps 1.5", "Steps(1)", "Steps(1.5)", "Steps.count", "1.5"),
    value("15 a bare number", "until=Steps(1)", "until=3", "Run.until", "write Steps(3) or Epochs(3)"),
    Case(
        "15 both",
        edit("until=Steps(1)", "until=Steps(1), until=Epochs(1)"),
        "E-CONFIG-SYNTAX",
        ("config.py:10", "repeated"),
    ),
    Case("15 neither", edit("until=Steps(1),", ""), "E-CONFIG-MISSING", ("config.py:5", "until")),
    value("16 batch 0", "total=4", "total=0", "BatchSize.total"),
    value("16 batch -1", "total=4", "total=-1", "BatchSize.total", "-1"),
    value("16 batch True", "total=4", "total=True", "BatchSize.total", "True"),
    value("16 batch 1.5", "total=4", "total=1.5", "BatchSize.total", "1.5"),
    value("16 per_device 0", "per_device=2", "per_device=0", "BatchSize.per_device"),
    Case("17 a batch that does not divide", edit("total=4", "total=5"), "E-BATCH-DIVIDE", ("batch.total=4",)),
    value("22 length 1", "length=96", "length=1", "Dialogues.length", "8"),
    value("22 pack a text", "pack=True", 'pack="yes"', "Dialogues.pack", "'yes'"),
    Case(
        "23 4-bit without an adapter",
        edit(MODEL, MODEL[:-1] + ", quant=NF4())"),
        "E-QUANT-FULL",
        ("config.py:6", "adapter=LoRA()"),
    ),
    value("24 a dtype that is not there", 'dtype="float32"', 'dtype="fp16"', "CausalLM.dtype", "bfloat16"),
    value("24 an engine as a text", 'folder="out"', 'engine="deepspeed"', "Run.engine", "Torch"),
    value("25 rank 0", MODEL, adapter("rank=0"), "LoRA.rank"),
    value("25 alpha 0", MODEL, adapter("alpha=0"), "LoRA.alpha"),
    value("25 dropout 1", MODEL, adapter("dropout=1"), "LoRA.dropout"),
    value("25 dropout nan", MODEL, adapter("dropout=float('nan')"), "LoRA.dropout"),
    value("25 targets a text", MODEL, adapter("targets='q_proj'"), "LoRA.targets", "q_proj"),
    Case("25 no target", edit(MODEL, adapter("targets=()")), "E-LORA-TARGETS", ("config.py:6", "all-linear")),
    Case("a Mix of one", edit("Dialogues(", "Mix(((Dialogues("), "E-CONFIG-SYNTAX", ("config.py:",)),
    Case("Skip(0)", edit("pack=True", "on_bad_row=Skip(0)"), "E-CONFIG-VALUE", ("Skip.limit",)),
    value("a seed below 0", 'folder="out"', "seed=-1", "Run.seed"),
    value("a source as a text", SOURCE, '"rows.jsonl"', "Dialogues.source", "write Json('rows.jsonl') or"),
    value("rows as a text", SOURCE, SOURCE + ', rows="openai"', "Dialogues.rows"),
    value("a model as a text", MODEL, '"model"', "Run.model", "write CausalLM('model')"),
    value("an empty path", '"model"', '""', "CausalLM.path"),
    Case("config is no Run", edit("config = Run(", "config = dict("), "E-CONFIG-RUN", ("config.py", "Run(")),
    Case("no config", edit("config = Run(", "confg = Run("), "E-CONFIG-NONE", ("did you mean config = confg?",)),
    Case("Eval of nothing", edit('folder="out"', "eval=Eval()"), "E-EVAL", ("config.py", "fraction")),
    Case(
        "two at once", edit(LR, "lr=-1, clipp=1"), "E-CONFIG-UNKNOWN", ("AdamW.lr does not fit", "did you mean 'clip'?")
    ),
]
OVERRIDES = [
    usage("unknown field", "optim.leraning_rate=1", code="E-OVERRIDE-PATH", words=("optim.leraning_rate",)),
    usage("near field", "optim.weight_decai=1", code="E-OVERRIDE-PATH", words=("optim.weight_decay?",)),
    usage("wrong section", "lr=1", code="E-OVERRIDE-PATH", words=("did you mean optim.lr?",)),
    usage("no value", "optim.lr=", code="E-CONFIG-VALUE", words=("override 'optim.lr='",)),
    usage("no =", "optim.lr", code="E-OVERRIDE-FORM", words=("write optim.lr=",)),
    usage("a text for a number", "optim.lr=fast", code="E-CONFIG-VALUE", words=("override 'optim.lr=fast'",)),
    usage("below nothing", "model.adapter.rank=8", code="E-OVERRIDE-PATH", words=("model.adapter=LoRA(rank=...)",)),
    usage("both of a pair", "model.quant=NF4()", code="E-QUANT-FULL", words=("override", "adapter=LoRA()")),
    usage("a call", "optim.lr=__import__('os').getpid()", code="E-CONFIG-VALUE", words=("override",)),
]
LINES = [
    usage("91 unknown verb", "trian", words=("did you mean `finetuner train`?",)),
    usage("91 no config", "train", words=("CONFIG",)),
    usage("91 unknown option", "--foldr", "x", words=("did you mean --folder?",)),
    usage("91 option without value", "--folder", words=("--folder",)),
    usage("92 nproc a text", "--nproc", "two", words=("--nproc", "two")),
    usage("92 nproc 0", "--nproc", "0", code="E-NPROC", words=("1 or more",)),
    usage("92 nproc -1", "--nproc=-1", code="E-NPROC", words=("1 or more",)),
    usage("chat without a model", "chat", words=("FOLDER_OR_MODEL",)),
    usage("merge without a place", "merge", "out", words=("OUT",)),
    usage("chat asks nothing", "chat", "model", "--ask", " ", words=("--ask",)),
    usage("chat draws too wildly", "chat", "model", "--temperature", "nan", words=("from 0 to 10",)),
    usage("copy of nothing", "copy", "no_such_ready_config", code="E-COPY-NAME", words=("finetuner list",)),
    usage("rows beyond all", "preview", "config.py", "--rows", "1e99", words=("--rows",)),
    usage("rows below 0", "preview", "config.py", "--rows", "-3", words=("--rows",)),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = bad.base(tmp_path_factory.mktemp("sound"))
    (folder / "model").rename(folder / "elsewhere")
    return folder


@pytest.mark.parametrize("case", CONFIGS + OVERRIDES + LINES, ids=str)
def test_a_wrong_config_or_line_gives_2_before_a_model_is_looked_for(case, sound, tmp_path, monkeypatch, capsys):
    if case.code == "E-CONFIG-TIME":  # for the others the limit stays: a busy machine is slow
        monkeypatch.setattr(load, "LIMIT_S", 2.0)
    monkeypatch.chdir(bad.copy(sound, tmp_path))
    case.wrong(tmp_path)
    words = case.command if case.args[:1] != ("trian",) else ["trian"]
    code, err = bad.run(words, capsys)
    bad.check(case, code, err, exit_code=2)
    assert not (tmp_path / "out").exists(), "a run was begun"


def test_a_sound_world_without_its_model_is_told_as_a_model_error(sound, tmp_path, monkeypatch, capsys):
    """Or the table above would prove nothing about what comes first."""
    monkeypatch.chdir(bad.copy(sound, tmp_path))
    code, err = bad.run(["train", "config.py"], capsys)
    assert code == 4
    assert "E-MODEL" in err


@pytest.mark.parametrize("verb", bad.VERBS)
def test_each_verb_has_help(verb, capsys):
    from finetuner.cli.main import main

    assert main([verb, "--help"]) == 0
    assert f"finetuner {verb}" in capsys.readouterr().out


def test_what_must_be_told_is_looked_for():
    """The check itself: each fault in a message is seen."""
    case = Case("x", nothing, "E-X", ("here",))
    good = "error[E-X] wrong\n  where:  here\n  remedy: mend it\n"
    assert not bad.wrong_with(case, 2, good, exit_code=2)
    for code, err in [
        (3, good),
        (2, good + good),
        (2, good + "Traceback"),
        (2, good.replace("remedy", "r")),
        (2, good.replace("where", "w")),
        (2, good.replace("here", "there")[:0]),
        (2, good + "\n" * 40),
        (2, "unexpected error: x; this is a bug"),
    ]:
        assert bad.wrong_with(case, code, err, exit_code=2), err
