"""What is written of a run is that run: the source loads to it, the data gives it back, and secrets stay out."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from write_files import GOOD, write

import finetuner
from finetuner import (
    NF4,
    WSD,
    AdamW,
    Ask,
    BatchSize,
    CausalLM,
    Constant,
    Cosine,
    Csv,
    Dialogues,
    Documents,
    Epochs,
    Eval,
    Fresh,
    Hub,
    Json,
    Linear,
    Logs,
    LoRA,
    Mix,
    Parquet,
    Run,
    Saves,
    Skip,
    Steps,
    Text,
    Torch,
)  # fmt: skip
from finetuner.config import write as write_module
from finetuner.config.load import load, resolve
from finetuner.config.node import Node
from finetuner.config.words import hints
from finetuner.config.write import differences, from_json, to_json, to_source
from finetuner.dialogue import rows
from finetuner.errors import ConfigError

RUN = Run(CausalLM("base"), Dialogues(Json("a.json"), rows=rows.alpaca), AdamW(lr=1e-4), BatchSize(8), Steps(5))
NOUNS = {name: getattr(finetuner, name) for name in finetuner.__all__}
TEXT = st.text(min_size=1, max_size=12)
PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)


def strategy(annotation: Any) -> st.SearchStrategy[Any]:
    """Values that a field of this type takes, read off the annotation: an oracle beside finetuner's own reading."""
    origin, args = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Node):
        return nouns(annotation)
    if origin in (Union, UnionType):
        return st.one_of(*map(strategy, args))
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple:
        inner = strategy(args[0])
        return (
            st.lists(inner, min_size=2, max_size=3).map(tuple) if args[-1] is ... else st.tuples(*map(strategy, args))
        )
    if annotation is type(None):
        return st.none()
    if annotation is bool:
        return st.booleans()
    if annotation is str:
        return TEXT
    if "Callable" in str(annotation):
        return st.sampled_from([rows.alpaca, rows.openai, rows.text, resolve("os.path:join")])
    if hasattr(annotation, "__metadata__"):
        base, extra = annotation.__origin__, str(annotation.__metadata__)
        if base is int:
            return st.integers(8, 10**6)
        if base is float:
            return st.floats(1e-6, 0.99)
        if "pattern" in extra:
            return st.from_regex("[0-9a-f]{40}", fullmatch=True)
        return st.characters() if "max_length" in extra.replace("MaxLen", "max_length") else TEXT
    if annotation is int:
        return st.integers(0, 10**9)
    if "Mapping[str, typing.Any]" in str(annotation):
        return st.dictionaries(TEXT, PLAIN, max_size=3).map(lambda more: {"model_type": "llama", **more})
    if "Mapping" in str(annotation):
        return st.dictionaries(TEXT, strategy(args[1]), max_size=2)
    raise AssertionError(annotation)


def nouns(noun: type[Node]) -> st.SearchStrategy[Any]:
    """Nodes of one kind; pairs of fields that do not fit together are left out."""

    @st.composite
    def made(draw: st.DrawFn) -> Any:
        values = {}
        for field in fields(noun):  # type: ignore[arg-type]
            if field.name in REQUIRED[noun.__name__] or draw(st.booleans()):
                values[field.name] = draw(strategy(hints(noun)[field.name]))
        try:
            return noun(**values)
        except ConfigError as error:
            # What a node refuses is another test's law; here it must only be a pair of fields, never a single one.
            if any(problem.code.startswith("E-CONFIG") for problem in error.problems):
                raise
            return noun(
                **{name: values[name] for name in SAFE.get(noun.__name__, REQUIRED[noun.__name__])}
                | SAFE_VALUES.get(noun.__name__, {})
            )

    return made()


REQUIRED = {name: [] for name in NOUNS} | {
    "AdamW": ["lr"], "Ask": ["prompts"], "BatchSize": ["total"], "CausalLM": ["path"], "Csv": ["files"],
    "Dialogues": ["source"], "Documents": ["source"], "Epochs": ["count"], "Fresh": ["config", "tokenizer"],
    "Hub": ["name"], "Json": ["files"], "Mix": ["parts"], "Parquet": ["files"], "Skip": ["limit"], "Steps": ["count"],
    "Text": ["files"], "Run": ["model", "data", "optim", "batch", "until"],
}  # fmt: skip
SAFE: dict[str, list[str]] = {"CausalLM": [], "Mix": [], "Eval": [], "Run": ["model", "batch", "until"]}
DATA = Dialogues(Json("x"))
SAFE_VALUES: dict[str, dict[str, Any]] = {
    "CausalLM": {"path": "x"}, "Eval": {"fraction": 0.5}, "Run": {"data": DATA, "optim": AdamW(1e-4)},
    "Mix": {"parts": ((DATA, 1.0), (Documents(Json("y")), 2.0))},
}  # fmt: skip


SIZES = {"optim": AdamW(1e-4), "batch": BatchSize(8)}
EVERY = (
    Run(
        CausalLM("x", adapter=LoRA(rank=4), quant=NF4()), DATA, **SIZES, until=Epochs(2.0), schedule=WSD(decay=0.5),
        engine=Torch(device="cpu"), eval=Eval(Documents(Text("t"), on_bad_row=Skip(3))), save=Saves(keep=3),
    ),
    Run(
        CausalLM(Fresh({"model_type": "llama"}, "tok")), Documents(Csv("c")), **SIZES, until=Steps(3),
        schedule=Linear(warmup=Steps(1)), ask=Ask(("hi",)), log=Logs(project="p"),
    ),
    Run(
        CausalLM("x"), Mix(((Dialogues(Parquet("p")), 1.0), (Dialogues(Hub("h")), 2.0))), **SIZES, until=Steps(1),
        schedule=Constant(),
    ),
    Run(CausalLM("x"), DATA, **SIZES, until=Steps(1), schedule=Cosine(floor=0.1)),
)  # fmt: skip
"""Runs in which every noun stands."""


def loads_to(source: str, folder: Path) -> Run:
    return load(write(folder, {f"run_{abs(hash(source))}.py": source})).run


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_every_noun_is_met_by_the_law(name: str) -> None:
    assert name in NOUNS
    assert set(NOUNS) == set(REQUIRED), "a new noun joins the table"


def test_source_loads_to_an_equal_run_and_data_gives_it_back(tmp_path: Path) -> None:
    seen: set[str] = set()

    @settings(max_examples=120, deadline=None, derandomize=True)
    @given(run=nouns(Run))
    @example(run=EVERY[0])
    @example(run=EVERY[1])
    @example(run=EVERY[2])
    @example(run=EVERY[3])
    def check(run: Run) -> None:
        source = to_source(run)
        seen.update(word for word in NOUNS if f"{word}(" in source)
        assert loads_to(source, tmp_path) == run
        data = json.loads(json.dumps(to_json(run)))
        assert from_json(data, functions=resolve) == run
        assert differences(data, to_json(run)) == []
        assert all(len(line) <= 120 or "'" in line or '"' in line for line in source.splitlines())

    check()
    assert seen == set(NOUNS), "the law met every noun"


def test_a_writer_that_drops_a_field_breaks_the_law(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(RUN, model=CausalLM("base", adapter=LoRA(rank=8, alpha=4.0)))
    real = write_module.arguments
    assert loads_to(to_source(run), tmp_path) == run
    monkeypatch.setattr(write_module, "arguments", lambda value: [i for i in real(value) if i[0] != "alpha="])
    assert loads_to(to_source(run), tmp_path) != run


def test_only_what_differs_from_the_defaults_is_written() -> None:
    assert (
        to_source(RUN, about="About.")
        == '''"""About."""

from finetuner import AdamW, BatchSize, CausalLM, Dialogues, Json, Run, Steps
from finetuner.dialogue.rows import alpaca

config = Run(
    model=CausalLM("base"),
    data=Dialogues(Json("a.json"), rows=alpaca),
    optim=AdamW(lr=0.0001),
    batch=BatchSize(total=8),
    until=Steps(5),
)
'''
    )


def test_functions_of_two_files_with_one_name_stay_apart(tmp_path: Path) -> None:
    rows_text = "def alpaca(row): ...\ndef LoRA(row): ...\n"
    one, two = (
        resolve(f"{write(tmp_path, {file: rows_text})}:{name}") for file, name in (("a.py", "alpaca"), ("b.py", "LoRA"))
    )
    parts = tuple((Dialogues(Json("a"), rows=function), 1.0) for function in (rows.alpaca, one, two))
    run = replace(RUN, data=Mix(parts))
    assert loads_to(to_source(run), tmp_path) == run


def test_what_is_no_plain_value_is_refused() -> None:
    run = replace(RUN, model=CausalLM(Fresh({"model_type": "x", "odd": {1, 2}}, "t")))
    for write_run in (to_source, to_json):
        with pytest.raises(ConfigError, match="E-CONFIG-WRITE"):
            write_run(run)


def test_reading_data_executes_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    file = write(tmp_path, {"evil.py": f"open({str(canary)!r}, 'w')\ndef rows(row): ..."})
    data = to_json(RUN)
    data["data"]["rows"] = f"{file}:rows"
    with pytest.raises(ConfigError, match="E-CONFIG-FUNCTION"):
        from_json(data)
    assert not canary.exists()
    assert from_json(data, functions=resolve).data.rows.__name__ == "rows"  # type: ignore[union-attr]
    assert canary.exists()


@pytest.mark.parametrize(
    ("change", "code", "where"),
    [
        ({"type": "Rum"}, "E-CONFIG-UNKNOWN", "config.type"),
        ({"type": "LoRA"}, "E-CONFIG-UNKNOWN", "config.model"),
        ({"until": {"type": "Steps", "count": 0}}, "E-CONFIG-VALUE", "config.until.count"),
        ({"until": {"type": "os.system"}}, "E-CONFIG-UNKNOWN", "config.until.type"),
        ({"until": {}}, "E-CONFIG-UNKNOWN", "config.until.type"),
        ({"seeds": 3}, "E-CONFIG-UNKNOWN", "config.seeds"),
    ],
)
def test_wrong_data_tells_code_and_path(change: dict[str, Any], code: str, where: str) -> None:
    with pytest.raises(ConfigError) as raised:
        from_json(to_json(RUN) | change)
    assert (raised.value.problems[0].code, raised.value.problems[0].where) == (code, where)


def test_differences_are_told_key_by_key() -> None:
    then = to_json(replace(RUN, model=CausalLM("base", adapter=LoRA(rank=8))))
    now = to_json(
        replace(
            RUN,
            optim=AdamW(lr=2e-4, betas=(0.9, 0.95)),
            until=Epochs(2),
            model=CausalLM("base", adapter=LoRA(rank=16), dtype="float32"),
        )
    )
    assert differences(then, now) == [
        "model.adapter.rank: 8 -> 16",
        'model.dtype: "bfloat16" -> "float32"',
        "optim.lr: 0.0001 -> 0.0002",
        "optim.betas.1: 0.999 -> 0.95",
        "until: Steps(count=5) -> Epochs(count=2.0)",
    ]
    assert differences({"a": 1}, {"b": 1}) == ["a: 1 -> (absent)", "b: (absent) -> 1"]


def test_secrets_stay_out_of_source_and_data(tmp_path: Path) -> None:
    secret = "hf_" + "a1B2" * 8
    config = {
        "model_type": "x",
        "hub_token": "plain-but-named",
        "pad_token": "<pad>",
        "url": f"https://me:{secret}@host/x",
    }
    run = replace(RUN, model=CausalLM(Fresh(config, secret)))
    for text in (to_source(run), json.dumps(to_json(run))):
        assert secret not in text
        assert "plain-but-named" not in text
        assert "<pad>" in text
    assert GOOD
