"""A run by DeepSpeed over two processes: the same command with one field changed, and back."""

from __future__ import annotations

import pytest
import world
from safetensors.torch import load_file

MORE = ', ask=Ask(("who is Ada?",), max_tokens=4), eval=Eval(fraction=0.2)'


def figures(folder):
    return [(step, float.fromhex(loss), float.fromhex(norm), rate) for step, loss, norm, rate in world.losses(folder)]


def near(folder, other):
    return figures(folder) == [pytest.approx(step, rel=1e-5) for step in figures(other)]


def trained(folder, *more, ranks=1):
    done = world.finetuner("train", "config.py", "--nproc", ranks, *more, "optim.lr=1e-3", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stderr


def until(steps):
    return f"until=Steps({steps})", "schedule=Constant()", "batch.per_device=1"


def test_stages_and_ranks_go_on_from_each_other_as_one_plain_process_does(tmp_path):
    world.make(tmp_path, every=2, attention_dropout=0.0, model="", more=MORE, tie_word_embeddings=True)
    trained(tmp_path, *until(6), "folder=one")
    trained(tmp_path, *until(2), "engine=ZeRO(2)", ranks=2)
    said = trained(tmp_path, *until(4), "engine=ZeRO(3)", ranks=2)
    assert "asked: who is Ada?" in said
    trained(tmp_path, *until(6), "engine=ZeRO(1)")
    assert len(figures(tmp_path / "out")) == 6
    assert near(tmp_path / "out", tmp_path / "one")
    for checkpoint in ("checkpoint-4", "checkpoint-6"):
        got, wanted = (load_file(tmp_path / name / checkpoint / "model.safetensors") for name in ("out", "one"))
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert float((got[name] - value).norm()) <= 1e-5 * float(value.norm()), name
    answers = [(tmp_path / name / "samples" / "step-4.txt").read_text() for name in ("out", "one")]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_an_adapter_beside_a_cut_base_is_saved_for_peft(tmp_path):
    lora = ", adapter=LoRA(rank=4, alpha=8)"
    world.make(tmp_path, every=2, attention_dropout=0.0, model=lora)
    for name, engine, ranks in (("one", "Torch()", 1), ("out", "ZeRO(3)", 2)):
        trained(tmp_path, *until(4), f"folder={name}", f"engine={engine}", "model.dtype=bfloat16", ranks=ranks)
    got, wanted = (load_file(tmp_path / name / "last" / "adapter_model.safetensors") for name in ("out", "one"))
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float((got[name] - value).norm()) <= 1e-3 * float(value.norm()), name


def test_an_override_of_the_run_is_refused_before_anything_is_read(tmp_path):
    world.make(tmp_path)
    for verb in ("train", "show"):
        done = world.finetuner(verb, "config.py", 'engine=ZeRO(2, overrides={"gradient_clipping": 3.0})', cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert "error[E-ZERO-OVERRIDE]" in done.stderr
        assert "3.0" in done.stderr
        assert "1.0" in done.stderr
    assert not (tmp_path / "out").exists()
