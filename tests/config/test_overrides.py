"""Overrides give the run that one would have written by hand, in any order, and tell all that is wrong at once."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from finetuner import (
    NF4,
    AdamW,
    BatchSize,
    CausalLM,
    Cosine,
    Dialogues,
    Epochs,
    Fresh,
    Hub,
    Json,
    Linear,
    LoRA,
    Mix,
    Run,
    Saves,
    Steps,
)
from finetuner.config.overrides import apply
from finetuner.dialogue.rows import alpaca, openai
from finetuner.errors import ConfigError

MODEL = CausalLM("base", adapter=LoRA(rank=64), quant=NF4())
DATA = Dialogues(Json("a.json"), rows=openai)
RUN = Run(model=MODEL, data=DATA, optim=AdamW(lr=2e-4), batch=BatchSize(16), until=Epochs(3))
MIXED = replace(RUN, data=Mix(((DATA, 1.0), (replace(DATA, source=Hub("x")), 2.0))))
FRESH = replace(RUN, model=CausalLM(Fresh({"model_type": "llama", "rope": {"theta": 1.0}}, "tok")))

RIGHT: list[tuple[Run, list[str], Run]] = [
    (RUN, [], RUN),
    (RUN, ["optim.lr=1e-5"], replace(RUN, optim=AdamW(lr=1e-5))),
    (RUN, ["seed=3"], replace(RUN, seed=3)),
    (RUN, ["until=Steps(500)"], replace(RUN, until=Steps(500))),
    (RUN, ["until=Steps(count=500)"], replace(RUN, until=Steps(500))),
    (RUN, ["until.count=5"], replace(RUN, until=Epochs(5))),
    (RUN, ["model.adapter.rank=16"], replace(RUN, model=replace(MODEL, adapter=LoRA(16)))),
    (RUN, ["model.adapter=LoRA(rank=8)"], replace(RUN, model=replace(MODEL, adapter=LoRA(8)))),
    (RUN, ["model.adapter=LoRA()", "model.adapter.rank=3"], replace(RUN, model=replace(MODEL, adapter=LoRA(3)))),
    (RUN, ["model.quant=None"], replace(RUN, model=replace(MODEL, quant=None))),
    (
        RUN,
        ["model.adapter.targets=[q_proj,v_proj]"],
        replace(RUN, model=replace(MODEL, adapter=LoRA(64, targets=("q_proj", "v_proj")))),
    ),
    (
        RUN,
        ["model.adapter.targets=q_proj,v_proj"],
        replace(RUN, model=replace(MODEL, adapter=LoRA(64, targets=("q_proj", "v_proj")))),
    ),
    (RUN, ["data.source.files=b.json"], replace(RUN, data=replace(DATA, source=Json("b.json")))),
    (RUN, ["data.source.files=a/b-c.json"], replace(RUN, data=replace(DATA, source=Json("a/b-c.json")))),
    (RUN, ["data.source.files='b.json'"], replace(RUN, data=replace(DATA, source=Json("b.json")))),
    (RUN, ["data.source.files=('a', 'b')"], replace(RUN, data=replace(DATA, source=Json(("a", "b"))))),
    (RUN, ["data.source.files=2024"], replace(RUN, data=replace(DATA, source=Json("2024")))),
    (RUN, ["data.source=Json(b.json)"], replace(RUN, data=replace(DATA, source=Json("b.json")))),
    (
        RUN,
        ["data.source=Hub(tatsu-lab/alpaca, split='test')"],
        replace(RUN, data=replace(DATA, source=Hub("tatsu-lab/alpaca", split="test"))),
    ),
    (RUN, ["data.system=You are Ada, a student."], replace(RUN, data=replace(DATA, system="You are Ada, a student."))),
    (RUN, ["data.system=a = b"], replace(RUN, data=replace(DATA, system="a = b"))),
    (RUN, ["data.pack=False"], replace(RUN, data=replace(DATA, pack=False))),
    (RUN, ["data.rows=alpaca"], replace(RUN, data=replace(DATA, rows=alpaca))),
    (RUN, ["data.rows=finetuner.dialogue.rows:alpaca"], replace(RUN, data=replace(DATA, rows=alpaca))),
    (RUN, ["data.rows=finetuner.dialogue.rows.alpaca"], replace(RUN, data=replace(DATA, rows=alpaca))),
    (RUN, ["data=Dialogues(Json(b), rows=alpaca)"], replace(RUN, data=Dialogues(Json("b"), rows=alpaca))),
    (RUN, ["optim.betas.1=0.95"], replace(RUN, optim=AdamW(lr=2e-4, betas=(0.9, 0.95)))),
    (RUN, ["optim.clip=None"], replace(RUN, optim=AdamW(lr=2e-4, clip=None))),
    (RUN, ["optim.rates={'a': 1e-5}"], replace(RUN, optim=AdamW(lr=2e-4, rates={"a": 1e-5}))),
    (RUN, ["optim.rates.model.embed*=1e-5"], replace(RUN, optim=AdamW(lr=2e-4, rates={"model.embed*": 1e-5}))),
    (RUN, ["schedule=Linear(warmup=Steps(5))"], replace(RUN, schedule=Linear(warmup=Steps(5)))),
    (RUN, ["schedule.warmup=Steps(5)", "schedule.floor=0.1"], replace(RUN, schedule=Cosine(Steps(5), 0.1))),
    (RUN, ["save.every=None"], replace(RUN, save=Saves(None))),
    (RUN, ["folder=out"], replace(RUN, folder="out")),
    (RUN, ["folder=Steps"], replace(RUN, folder="Steps")),
    (RUN, ["model.revision=1234567"], replace(RUN, model=replace(MODEL, revision="1234567"))),
    (
        MIXED,
        ["data.parts.0.0.length=64", "data.parts.1.0.length=64", "data.parts.1.1=3"],
        replace(RUN, data=Mix(((replace(DATA, length=64), 1.0), (replace(DATA, source=Hub("x"), length=64), 3.0)))),
    ),
    (
        FRESH,
        ["model.path.config.hidden_size=64", "model.path.config.rope.theta=2.0"],
        replace(RUN, model=CausalLM(Fresh({"model_type": "llama", "rope": {"theta": 2.0}, "hidden_size": 64}, "tok"))),
    ),
]


@pytest.mark.parametrize(("run", "items", "wanted"), RIGHT, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_an_overridden_run_equals_one_written_by_hand(run: Run, items: list[str], wanted: Run) -> None:
    before = repr(run)
    assert apply(run, items) == wanted
    assert repr(run) == before


@pytest.mark.parametrize("items", list(permutations(["model.quant=None", "model.adapter=None", "optim.lr=1e-5"])))
def test_overrides_that_fit_only_together_may_come_in_any_order(items: tuple[str, ...]) -> None:
    assert apply(RUN, items) == replace(RUN, model=CausalLM("base"), optim=AdamW(lr=1e-5))


def test_a_check_after_each_override_would_refuse_that() -> None:
    """The mutant of the law above: one at a time."""
    with pytest.raises(ConfigError, match="E-QUANT-FULL"):
        apply(apply(RUN, ["model.adapter=None"]), ["model.quant=None"])


WRONG = [
    ("lr=1e-5", "E-OVERRIDE-PATH", "did you mean optim.lr?"),
    ("optm.lr=1", "E-OVERRIDE-PATH", "did you mean optim.lr?"),
    ("model.adapter.rnak=4", "E-OVERRIDE-PATH", "did you mean model.adapter.rank?"),
    ("learning_rate=1", "E-OVERRIDE-PATH", "learning_rate is AdamW.lr"),
    ("optim.lr.x=1", "E-OVERRIDE-PATH", "give optim.lr=..."),
    ("eval.patience=3", "E-OVERRIDE-PATH", "give 'eval=Eval(patience=...)'"),
    ("optim.betas.2=0.5", "E-OVERRIDE-PATH", "give the number of one that is there"),
    ("optim.lr=x", "E-CONFIG-VALUE", "change lr"),
    ("optim.lr=-1", "E-CONFIG-VALUE", "change lr"),
    ("optim.lr=", "E-CONFIG-VALUE", "change lr"),
    ("model.path=None", "E-CONFIG-VALUE", "change path"),
    ("model.quant=none", "E-CONFIG-VALUE", "write None"),
    ("data.pack=true", "E-CONFIG-VALUE", "write True"),
    ("model.dtype=bf16", "E-CONFIG-VALUE", "did you mean 'bfloat16'?"),
    ("until=Steps(0)", "E-CONFIG-VALUE", "change count"),
    ("until=Steps(1, 2)", "E-CONFIG-VALUE", "by name"),
    ("until=Steps(1, count=2)", "E-CONFIG-TWICE", "once"),
    ("until=Steps(conut=5)", "E-CONFIG-UNKNOWN", "did you mean 'count'?"),
    ("until=Stepz(3)", "E-CONFIG-VALUE", "change until"),
    ("until=__import__('os').getpid()", "E-CONFIG-VALUE", "change until"),
    ("model.adapter=None", "E-QUANT-FULL", "add adapter=LoRA()"),
    ("data.rows=alpace", "E-CONFIG-FUNCTION", "did you mean 'alpaca'?"),
    ("data.rows=no_such_package:rows", "E-CONFIG-FUNCTION", "importable"),
    ("data.rows=finetuner.dialogue.rows:alpace", "E-CONFIG-FUNCTION", "did you mean alpaca?"),
    ("optim.lr", "E-OVERRIDE-FORM", "write optim.lr=..."),
    ("=3", "E-OVERRIDE-FORM", "path before the ="),
    ("optim..lr=3", "E-OVERRIDE-FORM", "path before the ="),
]


@pytest.mark.parametrize(("item", "code", "remedy"), WRONG)
def test_a_wrong_override_tells_itself_code_and_remedy(item: str, code: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as raised:
        apply(RUN, [item])
    codes = {problem.code: problem for problem in raised.value.problems}
    assert code in codes
    assert codes[code].where == f"override {item!r}"
    assert remedy in codes[code].remedy


def test_all_wrong_overrides_are_told_at_once() -> None:
    items = ["lr=1", "optim.lr=x", "data.rows=alpace", "model.dtype=bf16", "nonsense"]
    with pytest.raises(ConfigError) as raised:
        apply(RUN, items)
    assert {problem.where for problem in raised.value.problems} == {f"override {item!r}" for item in items}


def test_nothing_is_evaluated(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    call = f"open({str(canary)!r}, 'w')"
    values: list[str] = [call, f"LoRA({call})", f"[{call}]", f"{{1: {call}}}", f"(lambda: {call})()", f"f'{{{call}}}'"]
    for value in values:
        for field in ("model.adapter", "data.system", "optim.rates", "data.replace"):
            with suppress(ConfigError):
                apply(RUN, [f"{field}={value}"])
    assert not canary.exists()


def test_any_text_is_taken_or_told(tmp_path: Path) -> None:
    """Fuzz: no exception but ConfigError."""
    from hypothesis import given, settings
    from hypothesis import strategies as st

    paths = st.sampled_from(
        ["optim.lr", "model", "data.source.files", "until", "optim.betas.0", "optim.rates", "ask", ""]
    )
    texts = st.one_of(st.text(max_size=20), st.text("()[]{},=:'\"0123456789eE.-_ LoRASteps", max_size=20))

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(path=paths, text=texts)
    def check(path: str, text: str) -> None:
        with suppress(ConfigError):
            assert isinstance(apply(RUN, [f"{path}={text}"]), Run)

    check()
