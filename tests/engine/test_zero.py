"""ZeRO on two processes trains what plain torch does in one, at every stage; its config has one owner a field."""

from __future__ import annotations

import dataclasses
import json

import pytest
import shards
import torch
import zero_ranks
from safetensors.torch import load_file

from finetuner import NF4, AdamW, BatchSize, CausalLM, Dialogues, Json, LoRA, Run, Steps, ZeRO
from finetuner.engine import build
from finetuner.engine.zero import deepspeed_config
from finetuner.errors import ConfigError

SOON = ("full/0", "full/1", "packed/2", "tied/2", "lora/3", "tied/3", "full/3/free", "full/2/offload")
LATER = ("full/2", "full/2/free", "full/1/free", "lora/0", "lora/1", "lora/2", "packed/0", "packed/1", "packed/3",
         "bf16/2", "bf16/3", "frozen/2", "frozen/3", "full/3/offload")  # fmt: skip
ENDS = ("full/2/0-7::at7", "full/3/7-13:at7:at13", "full/1/13-20:at13:")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = shards.make(tmp_path_factory.mktemp("zero"))
    zero_ranks.ranks(folder, 2, *SOON, *ENDS, "answers/3", "spoiled/2", "spoiled/3", "spoiled/0")
    return folder


@pytest.fixture(scope="module")
def more(two):
    zero_ranks.ranks(two, 2, *LATER)
    return two


def came_to(folder, job):
    return json.loads((folder / f"zero-{job.replace('/', '-').replace(':', '_')}-of-2.json").read_text())


def check(folder, job, monkeypatch):
    case, _, *how = job.split("/")
    near = 1e-3 if case == "bf16" else 1e-5
    if "free" in how:
        real = shards.run_of
        monkeypatch.setattr(shards, "run_of", lambda *args: unclipped(real(*args)))
    result, engine = shards.trained(folder, shards.plain(), case)
    got = came_to(folder, job)
    weights = load_file(folder / f"zero-{job.replace('/', '-')}-of-2.safetensors")
    assert len(got["told"]) == shards.STEPS
    assert got["told"] == [pytest.approx(list(step), rel=near) for step in result["told"]]
    assert got["groups"] == json.loads(json.dumps(result["groups"]))
    for name, value in engine.weights().items():
        assert float((weights[name] - value).norm()) <= near * float(value.norm()), name


def unclipped(run):
    return dataclasses.replace(run, optim=dataclasses.replace(run.optim, clip=None))


@pytest.mark.parametrize("job", SOON)
def test_two_ranks_train_what_one_does(two, job, monkeypatch):
    check(two, job, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("job", LATER)
def test_two_ranks_train_what_one_does_in_every_mode(more, job, monkeypatch):
    check(more, job, monkeypatch)


def test_the_law_sees_that_gradients_are_not_clipped(two):
    result, _ = shards.trained(two, shards.plain(), "full")
    got = came_to(two, "full/3/free")["told"]
    assert got != [pytest.approx(list(step), rel=1e-5) for step in result["told"]]


def test_another_stage_goes_on_by_name(two):
    told = [step for job in ENDS for step in came_to(two, job)["told"]]
    result, _ = shards.trained(two, shards.plain(), "full")
    assert told == [pytest.approx(list(step), rel=1e-5) for step in result["told"]]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_gradient_that_is_not_finite_changes_no_weight_on_any_rank_and_is_named(two, stage):
    for rank in range(2):
        result = json.loads((two / f"zero-spoiled-{stage}-of-2-{rank}.json").read_text())
        assert result["same"]
        assert "E-TRAIN-NONFINITE" in result["said"]
        assert "step 2" in result["said"]


def test_all_ranks_answer_and_evaluate_as_one_process_does(two):
    one = shards.answers(two)["told"]
    for rank in range(2):
        got = json.loads((two / f"zero-answers-3-of-2-{rank}.json").read_text())["told"]
        assert [got[0], got[2]] == [one[0], one[2]]
        assert [got[1], got[3]] == pytest.approx([one[1], one[3]], rel=1e-5)


def run_of(zero, model=None, **optim):
    return Run(
        model=CausalLM("m", **(model or {})), data=Dialogues(Json("x.jsonl"), length=8),
        optim=AdamW(lr=1e-3, **optim), batch=BatchSize(total=4, per_device=2), until=Steps(1), engine=zero,
    )  # fmt: skip


def test_the_config_says_what_the_run_says():
    made = deepspeed_config(run_of(ZeRO(3, offload="cpu", overrides={"zero_optimization": {"overlap_comm": False}})))
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_clipping"] == 1.0
    assert made["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}, "overlap_comm": False}
    assert deepspeed_config(run_of(ZeRO(2), clip=None))["gradient_clipping"] == 0.0
    json.dumps(made)


@pytest.mark.parametrize(
    ("override", "owner"),
    [
        ({"gradient_clipping": 2.0}, "optim.clip"),
        ({"bf16": {"enabled": True}}, "model.dtype"),
        ({"zero_optimization": {"stage": 1}}, "engine.stage"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "engine.offload"),
        ({"optimizer": {"type": "Adam"}}, "optim"),
        ({"train_batch_size": 8}, "batch.total"),
    ],
)
def test_an_override_of_what_the_run_says_is_refused_with_both_values(override, owner):
    with pytest.raises(ConfigError) as raised:
        deepspeed_config(run_of(ZeRO(2, overrides=override)))
    said = str(raised.value)
    assert "E-ZERO-OVERRIDE" in said
    assert owner in said


@pytest.mark.parametrize(
    ("stage", "model", "optim", "word"),
    [
        (3, {"quant": NF4(), "adapter": LoRA()}, {}, "4-bit"),
        (2, {}, {"bits": 8}, "8-bit moments"),
        (1, {}, {"paged": True}, "paged"),
        (3, {"compile": True}, {}, "compiled"),
        (3, {"new_tokens": ("<a>",)}, {}, "embedding"),
    ],
)
def test_a_stage_that_contradicts_the_run_is_refused_in_the_config(stage, model, optim, word):
    with pytest.raises(ConfigError, match=word) as raised:
        run_of(ZeRO(stage), model, **optim)
    assert "E-ZERO" in str(raised.value)


def test_without_deepspeed_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="finetuner\\[deepspeed\\]"):
        build.shards_for(run_of(ZeRO(3)), torch.device("cpu"))
