"""A run whose model is cut over two processes: the same command with one field changed."""

from __future__ import annotations

import pytest
import world
from safetensors.torch import load_file

MORE = ', ask=Ask(("who is Ada?",), max_tokens=4), eval=Eval(fraction=0.2)'
FOUR = ("until=Steps(4)", "schedule=Constant()", "batch.per_device=1")


def near(got, wanted):
    got, wanted = (
        [(step, float.fromhex(loss), float.fromhex(norm), rate) for step, loss, norm, rate in told]
        for told in (got, wanted)
    )
    return got == [pytest.approx(record, rel=1e-5) for record in wanted]


def trained(folder, *more, ranks=1):
    done = world.finetuner("train", "config.py", "--nproc", ranks, *more, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_two_ranks_train_and_save_what_one_does_and_each_goes_on_from_the_other(tmp_path):
    world.make(tmp_path, until="Steps(8)", every=2, attention_dropout=0.0, model="", more=MORE)
    trained(tmp_path, *FOUR, "folder=one")
    said = trained(tmp_path, *FOUR, "engine=FSDP()", ranks=2)
    assert "asked: who is Ada?" in said
    assert near(world.losses(tmp_path / "out"), world.losses(tmp_path / "one"))
    got, wanted = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("out", "one"))
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float((got[name] - value).norm()) <= 1e-5 * float(value.norm()), name
    answers = [(tmp_path / name / "samples" / "step-4.txt").read_text() for name in ("out", "one")]
    assert answers[0] == answers[1]
    eight = ("until=Steps(8)", *FOUR[1:])
    trained(tmp_path, *eight)
    trained(tmp_path, *eight, "folder=one", "engine=FSDP()", ranks=2)
    assert len(world.losses(tmp_path / "out")) == 8
    assert near(world.losses(tmp_path / "out"), world.losses(tmp_path / "one"))


@pytest.mark.slow
def test_a_cut_model_with_frozen_layers_is_saved_whole(tmp_path):
    model = ', freeze=("model.layers.0.*",)'
    world.make(tmp_path, until="Steps(2)", attention_dropout=0.0, model=model, tie_word_embeddings=True)
    trained(tmp_path, "batch.per_device=1", "engine=FSDP()", ranks=2)
    got, base = (load_file(tmp_path / name / "model.safetensors") for name in ("out/last", "model"))
    assert got.keys() == base.keys()
    assert all(bool((got[name] == base[name]).all()) == ("layers.0." in name) for name in base if "proj" in name)


def test_four_bit_weights_under_fsdp_are_refused_before_anything_is_read(tmp_path):
    world.make(tmp_path, model=world.QLORA)
    done = world.finetuner("train", "config.py", "engine=FSDP()", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "error[E-FSDP]" in done.stderr


def test_offloading_where_there_is_no_other_memory_is_refused(tmp_path):
    world.make(tmp_path)
    done = world.finetuner("train", "config.py", 'engine=FSDP(device="cpu", offload="cpu")', cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "error[E-OFFLOAD]" in done.stderr
