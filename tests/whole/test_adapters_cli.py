"""`finetuner chat` answers from whatever holds a model: a run, its checkpoints, a merged folder, a pretrained model."""

from __future__ import annotations

import json
import shutil

import pytest
import rig
import world
from safetensors.torch import load_file, save_file

ASKED, SAID = "who is Ada?", "a friend of Bo, and of Flo"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that learned one answer by heart in two checkpoints, and its merged folder."""
    folder = tmp_path_factory.mktemp("trained")
    rig.tokenizer(folder / "model", eos="</s>")
    world.make(folder, model=", adapter=LoRA(rank=8, alpha=16)", until="Steps(40)", every=20, initializer_range=0.1,
               attention_dropout=0.0, hidden_size=64, more=", schedule=Constant()")  # fmt: skip
    turns = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
    (folder / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8)
    for words in (("train", "config.py"), ("merge", "out", "merged")):
        done = world.finetuner(*words, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def asks(folder, place, *more):
    return world.finetuner("chat", place, "--ask", ASKED, "--max-tokens", 30, "--device", "cpu", *more, cwd=folder)


@pytest.mark.parametrize("place", ["out", "out/last", "out/checkpoint-40", "merged"])
def test_what_was_learned_is_said_from_each_folder(place, trained):
    done = asks(trained, place)
    assert done.returncode == 0, done.stderr
    assert done.stdout == SAID + "\n"


def test_the_base_says_something_else(trained):
    done = asks(trained, "model")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert done.stdout != SAID + "\n"


def test_a_run_answers_with_its_last_complete_checkpoint(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out", symlinks=True)
    (tmp_path / "out" / "checkpoint-40" / "adapter_model.safetensors").write_bytes(b"torn")
    done = asks(tmp_path, "out")
    assert done.returncode == 0, done.stderr
    assert "passing over checkpoint-40" in done.stderr
    assert "checkpoint-20" in done.stderr


def test_an_adapter_on_another_base_is_an_error_and_no_answer(trained, tmp_path):
    other = rig.tiny_llama(tmp_path / "other")
    done = asks(trained, "out", "--base", other)
    assert done.returncode not in (0, None)
    assert "E-BASE-OTHER" in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_an_adapter_that_lost_a_tensor_is_an_error_and_no_answer(trained, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(trained / "out" / "checkpoint-40", adapter, ignore=shutil.ignore_patterns("MANIFEST.json"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors[sorted(tensors)[0]]
    save_file(tensors, adapter / "adapter_model.safetensors")
    done = asks(tmp_path, adapter)
    assert done.returncode not in (0, None)
    assert "is missing" in done.stderr
    assert done.stdout == ""
