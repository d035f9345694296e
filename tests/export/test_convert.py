"""A state becomes the folder that the run itself wrote, tensor by tensor; what could run code is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import rig
import torch
import world
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetuner.config.model import CausalLM, LoRA
from finetuner.config.run import AdamW
from finetuner.engine.optim import build_optimizer, groups
from finetuner.engine.state import State, entry, state_of, write_state
from finetuner.errors import FinetunerError
from finetuner.export.convert import convert
from finetuner.model.adapter_file import read_weights
from finetuner.model.build import build
from finetuner.runtime.commit import commit_dir, verify

KINDS = {
    "full": {},
    "tied": {"llama": {"tie_word_embeddings": True}},
    "frozen in part": {"freeze": ("*layers.0*", "*embed*")},
    "lora": {"adapter": LoRA(rank=2)},
    "dora": {"adapter": LoRA(rank=2, dora=True)},
    "head": {"adapter": LoRA(rank=2, modules_to_save=("lm_head",))},
    "embedding": {"adapter": LoRA(rank=2, modules_to_save=("lm_head", "embed_tokens"))},
    "new tokens": {"adapter": LoRA(rank=2), "new_tokens": ("<|call|>",)},
}


def halves(state):
    """The state of two ranks that hold half of each parameter."""
    for number in range(2):
        parts, masters, moments = {}, {}, {}
        for name, tensor in state.masters.items():
            middle = tensor.numel() // 2
            low, high = (0, middle) if number == 0 else (middle, tensor.numel())
            if low == high:
                continue
            parts[name] = (low, high)
            masters[name] = tensor if high - low == tensor.numel() else tensor.flatten()[low:high]
        parameters = {name: entry(state.masters[name].shape, []) for name in parts}
        yield State(state.optimizer, parameters, moments, masters, parts)


def checkpoint(folder, *, llama=None, ranks=2, **fields):
    """A checkpoint with random trained weights, its state written by `ranks` ranks."""
    rig.tiny_llama(folder / "base", dtype="bfloat16", **(llama or {}))
    source = CausalLM(str(folder / "base"), dtype="float32", checkpointing=False, **fields)
    learner = build(source, torch.device("cpu"), dialogues=True).learner
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in learner.trainable():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    optim = AdamW(lr=1e-3)
    state = state_of(
        build_optimizer(groups(learner, learner.trainable(), optim), optim, learner.device), learner.masters()
    )
    with commit_dir(folder / "run" / "checkpoint-2", meta={"run": "mine", "step": 2}) as temporary:
        learner.save(temporary)
        for number, part in enumerate([state] if ranks == 1 else halves(state)):
            write_state(temporary / "state", part, number, ranks)
        (temporary / "finetuner.json").write_text(json.dumps({"base": str(folder / "base")}))
    return folder / "run" / "checkpoint-2"


def tensors(folder):
    if (folder / "adapter_config.json").exists():
        return read_weights(folder / "adapter_model.safetensors", "E")
    return {name: value for file in folder.glob("model*.safetensors") for name, value in load_file(file).items()}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) and value.dtype == other[name].dtype for name, value in one.items()
    )


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_becomes_the_weights_that_the_run_wrote(kind, ranks, tmp_path):
    made = checkpoint(tmp_path, ranks=ranks, **KINDS[kind])
    convert(made, tmp_path / "out")
    assert same(tensors(tmp_path / "out"), tensors(made))
    beside = {file.name for file in made.iterdir() if file.is_file()} - {"MANIFEST.json"}
    assert beside <= {file.name for file in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "config.json").exists() == ("adapter" not in KINDS[kind])
    assert verify(tmp_path / "out") is None


def test_the_check_sees_weights_of_another_place(tmp_path, monkeypatch):
    from finetuner.export import convert as module

    made = checkpoint(tmp_path)
    right = module.masters
    monkeypatch.setattr(module, "masters", lambda saved: {n: v.flip(0) for n, v in right(saved).items()})
    convert(made, tmp_path / "out")
    assert not same(tensors(tmp_path / "out"), tensors(made))


def test_torn_weights_are_made_anew_in_another_dtype(tmp_path, capsys):
    made = checkpoint(tmp_path)
    wanted = tensors(made)
    (made / "model.safetensors").unlink()  # the file that was read stays as it is in memory
    (made / "model.safetensors").write_bytes(b"PK")
    convert(tmp_path / "run" / "checkpoint-2", tmp_path / "out", dtype="float32")
    assert "model.safetensors is torn" in capsys.readouterr().err
    got = tensors(tmp_path / "out")
    assert all(torch.equal(got[name].to(torch.bfloat16), value) for name, value in wanted.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_frozen_parts_come_from_the_base_where_the_weights_are_torn(tmp_path):
    made = checkpoint(tmp_path, freeze=("*layers.0*",))
    wanted = tensors(made)
    (made / "model.safetensors").unlink()
    convert(made, tmp_path / "out")
    assert same(tensors(tmp_path / "out"), wanted)


def test_a_run_means_its_newest_complete_checkpoint(tmp_path):
    made = checkpoint(tmp_path)
    shutil.copytree(made, tmp_path / "run" / "checkpoint-3")
    (tmp_path / "run" / "checkpoint-3" / "state" / "state-1-of-2.json").unlink()
    assert convert(tmp_path / "run", tmp_path / "out").checkpoint == made


def pickled(folder):
    (folder / "global_step2").mkdir(parents=True)
    (folder / "latest").write_text("global_step2")
    (folder / "global_step2" / "mp_rank_00_model_states.pt").write_bytes(b"PK")


BROKEN = {
    "DeepSpeed's own": (lambda made: (shutil.rmtree(made), pickled(made)), "E-CONVERT-PICKLE", "zero_to_fp32.py"),
    "nothing": (lambda made: (shutil.rmtree(made), made.mkdir()), "E-CONVERT-NOTHING", "state"),
    "no folder": (lambda made: shutil.rmtree(made), "E-CONVERT-NOTHING", "no folder"),
    "a torn shard": (lambda made: (made / "state" / "masters-1-of-2.safetensors").write_bytes(b"PK"),
        "E-CHECKPOINT-TORN", "masters-1-of-2"),
    "a torn tokenizer": (lambda made: (made / "tokenizer.json").write_text("{}"),
        "E-CHECKPOINT-TORN", "tokenizer.json"),
    "no manifest, and a shard is missing": (
        lambda made: ((made / "MANIFEST.json").unlink(), (made / "state" / "masters-1-of-2.safetensors").unlink()),
        "E-STATE-FILE", "masters-1-of-2"),
    "something stands there": (
        lambda made: ((made.parents[1] / "out").mkdir(), (made.parents[1] / "out" / "x").touch()),
        "E-OUT-EXISTS", "x"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_what_cannot_be_converted_is_told_and_nothing_is_written(how, tmp_path):
    change, code, names = BROKEN[how]
    made = checkpoint(tmp_path)
    change(made)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(FinetunerError) as caught:
        convert(made, tmp_path / "out")
    assert code in str(caught.value)
    assert names in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_the_command_says_what_it_wrote(tmp_path):
    made = checkpoint(tmp_path)
    done = world.finetuner("convert", made, tmp_path / "out", "--to", "hf", "--dtype", "float16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "written in float16" in done.stderr
    assert {value.dtype for value in tensors(tmp_path / "out").values()} == {torch.float16}
