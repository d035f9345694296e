"""True is not 1: the dial of checkpointing takes a switch, a number of layers or "auto", and keeps which it was."""

from __future__ import annotations

import pytest
from write_files import write

from finetuner import AdamW, BatchSize, CausalLM, Dialogues, Json, Run, Steps
from finetuner.config.load import load
from finetuner.config.overrides import apply
from finetuner.config.write import from_json, to_json, to_source
from finetuner.errors import ConfigError

CHOICES = [True, False, 0, 1, 12, "auto"]


def run(choice):
    model = CausalLM("m", checkpointing=choice)
    return Run(model, Dialogues(Json("a.json")), AdamW(lr=1e-4), BatchSize(8), Steps(5))


def same(value, other):
    return type(value) is type(other) and value == other


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_stays_what_it_was(choice, tmp_path):
    given = run(choice)
    assert same(given.model.checkpointing, choice)
    assert same(from_json(to_json(given)).model.checkpointing, choice)
    write(tmp_path, {"x.py": to_source(given)})
    assert same(load(str(tmp_path / "x.py")).run.model.checkpointing, choice)
    for before in CHOICES:
        assert same(apply(run(before), [f"model.checkpointing={choice}"]).model.checkpointing, choice)


@pytest.mark.parametrize("choice", [-1, 2.0, "all", "True", None])
def test_anything_else_is_refused(choice):
    with pytest.raises(ConfigError, match="checkpointing does not fit") as caught:
        run(choice)
    assert "'auto'" in str(caught.value)


def test_tiles_are_of_a_token_at_least():
    assert CausalLM("m", tiled_mlp=4096).tiled_mlp == 4096
    for wrong in (0, -1, True, 2.0):
        with pytest.raises(ConfigError, match="tiled_mlp"):
            CausalLM("m", tiled_mlp=wrong)
