"""FSDP on two processes trains what plain torch does in one, and what it writes, one process goes on from."""

from __future__ import annotations

import json

import pytest
import shards
import torch
from safetensors.torch import load_file

from finetuner import AdamW, BatchSize, Dialogues, Json, LoRA, Run
from finetuner.config.model import NF4, CausalLM
from finetuner.config.run import FSDP, Steps
from finetuner.engine.pieces import bounds
from finetuner.errors import ConfigError

SOON = ("full", "tied", "packed", "lora")
LATER = ("kept", "bf16", "frozen")
ENDS = ("full:0-7::at7", "full:7-20:at7:", "full:7-13:at7:at13:torch", "full:13-20:at13:")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two ranks came to: all of `SOON`, a NaN, answers, and a run that stopped after 7 steps and went on."""
    folder = shards.make(tmp_path_factory.mktemp("fsdp"))
    shards.ranks(folder, 2, *SOON, "spoiled", "answers", "mean", "thread", *ENDS[:2])
    return folder


@pytest.fixture(scope="module")
def more(two):
    shards.ranks(two, 2, *LATER)
    return two


def check(folder, case):
    result, engine = shards.trained(folder, shards.plain(), case)
    got = json.loads((folder / f"{case}-of-2.json").read_text())
    weights = load_file(folder / f"{case}-of-2.safetensors")
    assert len(got["told"]) == shards.STEPS
    assert got["told"] == [pytest.approx(list(step), rel=1e-5) for step in result["told"]]
    assert got["groups"] == json.loads(json.dumps(result["groups"]))
    wanted = dict(engine.learner.model.named_parameters())
    wanted = engine.weights() if engine.learner.adapted else wanted
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        value = value.detach()
        assert float((weights[name] - value).norm()) <= 1e-5 * float(value.norm()), name


@pytest.mark.parametrize("case", SOON)
def test_two_ranks_train_what_one_does(two, case):
    check(two, case)


def test_the_cases_have_ranks_that_learn_nothing_and_ranks_that_learn_more(two, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for case, wanted in (("tied", {0}), ("full", set())):
        seen = []
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            seen.append([sum(batch.learned for batch in shards.feed_of(two, case).batches(step)) for step in range(5)])
        assert {min(pair) for pair in zip(*seen, strict=True)} >= wanted
        assert any(one != other for one, other in zip(*seen, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", LATER)
def test_two_ranks_train_what_one_does_in_every_mode(more, case):
    check(more, case)


def test_the_law_notices_a_mean_over_the_ranks(two):
    told = json.loads((two / "mean-of-2-0.json").read_text())["norm"]
    right = json.loads((two / "full-of-2.json").read_text())["told"][0][2]
    assert told == pytest.approx(right / 2, rel=1e-5)


def test_a_nan_on_one_rank_changes_no_weight_on_any_and_is_named(two):
    for rank in range(2):
        result = json.loads((two / f"spoiled-of-2-{rank}.json").read_text())
        assert result["same"]
        assert "E-TRAIN-NONFINITE" in result["said"]
        assert result["name"] in result["said"]


def test_all_ranks_answer_and_evaluate_as_one_process_does(two):
    one = shards.answers(two)["told"]
    for rank in range(2):
        got = json.loads((two / f"answers-of-2-{rank}.json").read_text())["told"]
        assert [got[0], got[2]] == [one[0], one[2]]
        assert [got[1], got[3]] == pytest.approx([one[1], one[3]], rel=1e-5)


def test_going_on_from_the_ranks_own_pieces_changes_no_bit(two):
    before, after = (json.loads((two / f"{name}-of-2.json").read_text())["told"] for name in named(*ENDS[:2]))
    assert before + after == json.loads((two / "full-of-2.json").read_text())["told"]
    got, wanted = (load_file(two / f"{name}-of-2.safetensors") for name in (*named(ENDS[1]), "full"))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_one_plain_process_goes_on_from_two_ranks_and_two_from_it(two):
    shards.job(two, ENDS[2])
    shards.ranks(two, 2, ENDS[3])
    (first,), (last,) = named(ENDS[2]), named(ENDS[3])
    told = json.loads((two / f"{first}-of-1.json").read_text())["told"]
    told += json.loads((two / f"{last}-of-2.json").read_text())["told"]
    wanted = json.loads((two / "full-of-2.json").read_text())["told"][7:]
    assert told == [pytest.approx(step, rel=1e-5) for step in wanted]


def test_writing_in_another_thread_touches_nothing_that_is_gathered(two):
    asked = json.loads((two / "thread-of-2-0.json").read_text())["asked"]
    assert asked
    assert all(asked), "the model was asked for its tensors behind training's back"


def named(*jobs):
    return [job.replace(":", "_") for job in jobs]


def test_pieces_are_the_whole_once():
    for shape in ((1,), (5, 4), (7, 3, 2), (2,)):
        for world in (1, 2, 3, 4):
            ranges = [bounds(torch.Size(shape), rank, world) for rank in range(world)]
            assert [k for start, stop in ranges for k in range(start, stop)] == list(range(torch.Size(shape).numel()))
            oracle = [chunk.numel() for chunk in torch.chunk(torch.zeros(shape), world)]
            assert [stop - start for start, stop in ranges if stop > start] == oracle


@pytest.mark.parametrize(
    ("model", "optim", "word"),
    [
        ({"quant": NF4(), "adapter": LoRA()}, {}, "4-bit"),
        ({}, {"bits": 8}, "8-bit moments"),
        ({}, {"paged": True}, "paged"),
        ({"compile": True}, {}, "compiled"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_the_config(model, optim, word):
    with pytest.raises(ConfigError, match=word) as raised:
        Run(
            model=CausalLM("m", **model), data=Dialogues(Json("x.jsonl"), length=8), optim=AdamW(lr=1e-3, **optim),
            batch=BatchSize(total=1), until=Steps(1), engine=FSDP(),
        )  # fmt: skip
    assert "E-FSDP" in str(raised.value)
