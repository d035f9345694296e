"""A node tells everything that is wrong with it: code, line, what was found, what fits, a remedy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from finetuner import NF4, AdamW, BatchSize, CausalLM, Cosine, Csv, Dialogues, Epochs, Json, LoRA, Mix, Run, Skip, Steps
from finetuner.config import node as node_module
from finetuner.config.node import Invalid, collecting
from finetuner.errors import ConfigError, Problem


def problems_of(make: Callable[[], object]) -> list[Problem]:
    with pytest.raises(ConfigError) as raised:
        make()
    return list(raised.value.problems)


WRONG = [
    (lambda: CausalLM("x", dtype="bf16"), "E-CONFIG-VALUE", "CausalLM.dtype", "'bf16'", "did you mean 'bfloat16'?"),
    (lambda: CausalLM("x", dtype="fp32"), "E-CONFIG-VALUE", "CausalLM.dtype", "'fp32'", "did you mean 'float32'?"),
    (lambda: CausalLM("x", adapter=LoRA), "E-CONFIG-VALUE", "CausalLM.adapter", "LoRA", "write LoRA()"),
    (lambda: CausalLM("x", adapter={"rank": 3}), "E-CONFIG-VALUE", "CausalLM.adapter", "rank", "write LoRA(...)"),
    (lambda: CausalLM(3), "E-CONFIG-VALUE", "CausalLM.path", "3", "change path"),
    (lambda: CausalLM(""), "E-CONFIG-VALUE", "CausalLM.path", "''", "change path"),
    (lambda: CausalLM("x", remote_code="main"), "E-CONFIG-VALUE", "remote_code", "'main'", "change remote_code"),
    (lambda: CausalLM("x", quant=NF4()), "E-QUANT-FULL", "4-bit", "quant=NF4()", "add adapter=LoRA()"),
    (lambda: CausalLM("x", dtyp="float32"), "E-CONFIG-UNKNOWN", "'dtyp'", "dtyp='float32'", "did you mean 'dtype'?"),
    (lambda: CausalLM("x", lr=1.0), "E-CONFIG-UNKNOWN", "'lr'", "lr=1.0", "lr belongs to AdamW"),
    (lambda: LoRA(lora_rank=8), "E-CONFIG-UNKNOWN", "'lora_rank'", "lora_rank=8", "did you mean 'rank'?"),
    (lambda: LoRA(0), "E-CONFIG-VALUE", "LoRA.rank", "0", "change rank"),
    (lambda: LoRA(alpha=0), "E-CONFIG-VALUE", "LoRA.alpha", "0", "change alpha"),
    (lambda: LoRA(16.0), "E-CONFIG-VALUE", "LoRA.rank", "16.0", "write 16"),
    (lambda: LoRA(True), "E-CONFIG-VALUE", "LoRA.rank", "True", "change rank"),
    (lambda: LoRA(8, rank=9), "E-CONFIG-TWICE", "LoRA.rank", "9", "keep one"),
    (lambda: LoRA(1, 1.0, 0.1, ("a",), True, True, (), "s", 9), "E-CONFIG-VALUE", "8 values", "9 values", "by name"),
    (lambda: LoRA(targets=["q_proj", ""]), "E-CONFIG-VALUE", "LoRA.targets[1]", "''", "change targets"),
    (lambda: LoRA(targets=[]), "E-LORA-TARGETS", "empty", "()", 'targets="all-linear"'),
    (lambda: AdamW(lr="2e-4"), "E-CONFIG-VALUE", "AdamW.lr", "'2e-4'", "write 2e-4 without quotes"),
    (lambda: AdamW(lr=-1), "E-CONFIG-VALUE", "AdamW.lr", "-1", "change lr"),
    (lambda: AdamW(lr=1e3), "E-CONFIG-VALUE", "AdamW.lr", "1000.0", "change lr"),
    (lambda: AdamW(lr=float("nan")), "E-CONFIG-VALUE", "AdamW.lr", "nan", "change lr"),
    (lambda: AdamW(), "E-CONFIG-MISSING", "AdamW needs 'lr'", "", "give lr=..."),
    (lambda: AdamW(lr=1, betas=(0.9, 1.5)), "E-CONFIG-VALUE", "AdamW.betas[1]", "1.5", "change betas"),
    (lambda: AdamW(lr=1, rates={"x": "u"}), "E-CONFIG-VALUE", "AdamW.rates['x']", "'u'", "change rates"),
    (lambda: BatchSize(True), "E-CONFIG-VALUE", "BatchSize.total", "True", "change total"),
    (lambda: BatchSize(-1), "E-CONFIG-VALUE", "BatchSize.total", "-1", "change total"),
    (lambda: BatchSize(1.5), "E-CONFIG-VALUE", "BatchSize.total", "1.5", "change total"),
    (lambda: BatchSize(8, accumulation=2), "E-CONFIG-UNKNOWN", "'accumulation'", "accumulation=2", "write total"),
    (lambda: Epochs(0), "E-CONFIG-VALUE", "Epochs.count", "0", "change count"),
    (lambda: Steps("3"), "E-CONFIG-VALUE", "Steps.count", "'3'", "write 3 without quotes"),
    (lambda: Cosine(warmup=2), "E-CONFIG-VALUE", "Cosine.warmup", "2", "write Steps(2)"),
    (lambda: Dialogues(3), "E-CONFIG-VALUE", "Dialogues.source", "3", "change source"),
    (lambda: Dialogues(Json("a"), rows="alpaca"), "E-CONFIG-VALUE", "Dialogues.rows", "'alpaca'", "import alpaca"),
    (lambda: Dialogues(Json("a"), length=1), "E-CONFIG-VALUE", "Dialogues.length", "1", "change length"),
    (lambda: Dialogues(Json("a"), pack="true"), "E-CONFIG-VALUE", "Dialogues.pack", "'true'", "write True"),
    (lambda: Mix(((Json("a"), 1.0),)), "E-CONFIG-VALUE", "Mix.parts[0][0]", "Json", "change parts"),
    (lambda: Csv("a", delimiter=";;"), "E-CONFIG-VALUE", "Csv.delimiter", "';;'", "change delimiter"),
    (lambda: Skip(0), "E-CONFIG-VALUE", "Skip.limit", "0", "change limit"),
]


@pytest.mark.parametrize(("make", "code", "what", "found", "remedy"), WRONG)
def test_a_wrong_node_tells_code_line_finding_and_remedy(
    make: Callable[[], object], code: str, what: str, found: str, remedy: str
) -> None:
    (problem,) = problems_of(make)
    line = make.__code__.co_firstlineno
    assert problem.code == code
    assert what in problem.what
    assert problem.where.endswith(f"test_node.py:{line}")
    assert found in problem.found
    assert remedy in problem.remedy


def test_all_fields_are_told_at_once() -> None:
    found = problems_of(lambda: LoRA(rank=0, alpha=-1.0, dropout=1.0, targets=3, ranc=4))
    assert [p.what.split(" ")[0] for p in found] == ["LoRA", "LoRA.rank", "LoRA.alpha", "LoRA.dropout", "LoRA.targets"]


def test_a_union_is_told_once_and_with_all_that_it_takes() -> None:
    (problem,) = problems_of(lambda: Cosine(warmup="soon"))
    assert problem.fits == "a number of 0 or more and below 1 or Steps(...)"
    (problem,) = problems_of(lambda: Dialogues(Steps(3)))
    assert problem.fits == "Json(...), Csv(...), Parquet(...), Text(...), or Hub(...)"


def test_under_collecting_neighbours_of_a_wrong_node_are_still_checked() -> None:
    with collecting() as told:
        model = CausalLM("x", dtype="bf16", adapter=LoRA(rank=0), quant=NF4())
        Run(modelx=model, data=3, optim=AdamW(lr=-1), batch=BatchSize(1), until=Steps(1))
    assert [(p.code, p.what) for p in told] == [
        ("E-CONFIG-VALUE", "LoRA.rank does not fit"),
        ("E-CONFIG-VALUE", "CausalLM.dtype does not fit"),
        ("E-CONFIG-VALUE", "AdamW.lr does not fit"),
        ("E-CONFIG-UNKNOWN", "Run has no field 'modelx'"),
        ("E-CONFIG-MISSING", "Run needs 'model'"),
        ("E-CONFIG-VALUE", "Run.data does not fit"),
    ]


def test_what_follows_from_a_wrong_node_is_not_told_again() -> None:
    with collecting() as told:
        model = CausalLM("x", adapter=LoRA(rank=0))
        changed = replace(model, path="y", quant=NF4())
        assert isinstance(changed, Invalid)
        assert isinstance(changed.adapter.rank, Invalid)
        Run(model=changed, data=Dialogues(Json("a")), optim=AdamW(lr=1), batch=BatchSize(1), until=Steps(1))
    assert [p.what for p in told] == ["LoRA.rank does not fit"]


def test_an_unchecked_pair_of_fields_is_not_told_from_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: with the wrong adapter taken for None, quant=NF4() would look like full training of 4-bit weights."""

    def told() -> set[str]:
        with collecting() as problems:
            CausalLM("x", adapter=LoRA(rank=0), quant=NF4())
        return {problem.code for problem in problems}

    assert told() == {"E-CONFIG-VALUE"}
    real = node_module.bind

    def drops(cls: type, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        given, problems = real(cls, args, kwargs)
        return {k: v for k, v in given.items() if not isinstance(v, Invalid)}, problems

    monkeypatch.setattr(node_module, "bind", drops)
    assert told() == {"E-CONFIG-VALUE", "E-QUANT-FULL"}


def test_the_outermost_frame_is_a_place_too() -> None:
    code = "from finetuner import LoRA\n\nLoRA(rank=0)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "where:  <string>:3" in done.stderr


def test_lists_become_tuples() -> None:
    assert LoRA(targets=["q", "v"]).targets == ("q", "v")
    assert Json(["a", "b"]) == Json(("a", "b"))
