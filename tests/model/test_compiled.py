"""Compiled layers give the losses and gradients that they give uncompiled, and no row makes them be compiled anew."""

from __future__ import annotations

import pytest
import rig
import torch
import torch._dynamo
from model_rig import CPU, gradients, learner_of, oracle, row, worst
from torch._dynamo.utils import counters

from finetuner.config.model import NF4, CausalLM, LoRA
from finetuner.data.batch import IGNORED
from finetuner.errors import ConfigError, ModelError
from finetuner.model import attention, compiled
from finetuner.model.compiled import check_compile, compile_layers, fill_row

KINDS = {
    "full": {"dtype": "float32"},
    "lora": {"adapter": LoRA(rank=4)},
    "qlora": {"adapter": LoRA(rank=4), "quant": NF4()},
}
ROWS = ((10, 20, 34), (30, 31), (1, 2, 1, 50), (64,), (5, 5, 5, 5))
"""Of 20 to 64 tokens."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return rig.tiny_llama(tmp_path_factory.mktemp("llama"), hidden_size=64, num_hidden_layers=3)


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled before or after, and our attention as it is."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    attention.register()


@pytest.mark.parametrize("lengths", [(3, 2), (1,), (7, 7), (16,)])
def test_a_filled_row_has_its_size_and_its_documents_untouched(lengths):
    batch = row(lengths)
    filled, size = fill_row(batch, 16), sum(lengths)
    assert filled.tokens_1T.shape == filled.targets_1T.shape == filled.positions_1T.shape == (1, 16)
    assert sum(filled.lengths) == 16
    assert filled.lengths[: len(lengths)] == lengths
    assert max(filled.lengths) == max(lengths), "no position is new"
    for before, after in ((batch.tokens_1T, filled.tokens_1T), (batch.targets_1T, filled.targets_1T)):
        assert torch.equal(after[:, :size], before)
        assert after.dtype == before.dtype
    assert (filled.targets_1T[:, size:] == IGNORED).all()
    assert filled.learned == batch.learned
    positions = [place for length in filled.lengths for place in range(length)]
    assert filled.positions_1T[0].tolist() == positions


def test_a_full_row_stays_the_same_and_a_longer_one_is_a_bug():
    batch = row((9, 7))
    assert fill_row(batch, 16) is batch
    with pytest.raises(AssertionError):
        fill_row(batch, 15)


@pytest.mark.parametrize("attends", ["auto", "sdpa", "eager"])
def test_a_filled_row_gives_the_loss_and_gradients_of_the_row(llama, attends):
    learner, batch = learner_of(llama, attention=attends), row((11, 5, 4))
    loss, grads = gradients(learner, batch)
    learner.zero_grad()
    filled, filled_grads = gradients(learner, fill_row(batch, 64))
    truth, true_grads = oracle(llama, batch)
    assert filled == pytest.approx(loss, rel=1e-6) == pytest.approx(truth, rel=1e-5)
    assert worst(filled_grads, grads) < 1e-5
    assert worst(filled_grads, true_grads) < 1e-5


def test_the_check_sees_filling_that_runs_on_from_the_last_document(llama, monkeypatch):
    """In front of the row instead of behind it, as a part of the first document, it would be seen."""
    learner, batch = learner_of(llama), row((11, 5, 4))
    _, grads = gradients(learner, batch)
    learner.zero_grad()
    filled = fill_row(batch, 64)
    mixed = compiled.replace(
        filled,
        tokens_1T=filled.tokens_1T.roll(44, 1),
        targets_1T=filled.targets_1T.roll(44, 1),
        positions_1T=filled.positions_1T.roll(44, 1),
        lengths=(44 + 11, 5, 4),
    )
    assert worst(gradients(learner, mixed)[1], grads) > 1e-2


def learners(llama, checkpointing, **kind):
    """Two learners of the same weights; the layers of one are compiled, by a backend that needs no compiler."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(learner_of(llama, checkpointing=checkpointing, **{"dtype": "bfloat16"} | kind))
    made[0].compile_for(64, backend="aot_eager")
    return made


@pytest.mark.parametrize(("kind", "checkpointing"), [("full", 0), ("full", 1), ("full", 3), ("lora", 3), ("qlora", 0)])
def test_rows_of_any_documents_run_compiled_once_and_exactly(llama, kind, checkpointing):
    one, other = learners(llama, checkpointing, **KINDS[kind])
    gradients(one, row(ROWS[0]))
    made = counters["stats"]["unique_graphs"]
    assert made >= 3, "something is compiled"
    for lengths in ROWS:
        one.zero_grad()
        other.zero_grad()
        batch = row(lengths)
        loss, grads = gradients(one, batch)
        plain, plain_grads = gradients(other, batch)
        assert loss == pytest.approx(plain, rel=1e-6 if one.compute == torch.float32 else 1e-3)
        assert worst(grads, plain_grads) < (1e-5 if one.compute == torch.float32 else 2e-2)
    assert counters["stats"]["unique_graphs"] == made, "no row was compiled for"


def test_the_check_sees_an_attention_into_which_torch_looks(llama, monkeypatch):
    monkeypatch.setattr(compiled.torch.compiler, "disable", lambda function: function)
    one, _ = learners(llama, 0, dtype="float32")
    gradients(one, row(ROWS[0]))
    made = counters["stats"]["unique_graphs"]
    gradients(one, row(ROWS[1]))
    assert counters["stats"]["unique_graphs"] > made


def test_the_check_sees_whole_layers_compiled_around_a_checkpoint(llama, monkeypatch):
    """torch leaves such a layer uncompiled and says nothing."""
    torch.manual_seed(0)
    learner = learner_of(llama, checkpointing=True)
    for layer in learner.causal.base_model.layers:
        layer.compile(dynamic=False, backend="aot_eager")
    compiled.AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.documents_apart))
    learner.row = 64
    gradients(learner, row(ROWS[0]))
    assert counters["stats"]["unique_graphs"] < 3


def test_validation_and_answers_run_uncompiled_at_any_length(llama):
    one, other = learners(llama, 0, dtype="float32")
    gradients(one, row(ROWS[0]))
    made = counters["stats"]["unique_graphs"]
    one.eval(), other.eval()
    with torch.no_grad():
        for lengths in ((3, 4), (5,), (17, 2)):
            assert one(row(lengths)).item() == other(row(lengths)).item()
    tokens = torch.arange(10, 16)[None]
    with one.answering() as model, other.answering() as plain:
        said = [m.generate(tokens, max_new_tokens=4, do_sample=False).tolist() for m in (model, plain)]
    assert said[0] == said[1]
    one.train()
    one.zero_grad()
    gradients(one, row(ROWS[1]))
    assert counters["stats"]["unique_graphs"] == made


def test_layers_are_not_compiled_for_a_cpu(llama):
    with pytest.raises(ConfigError, match="E-COMPILE-DEVICE"):
        check_compile(CausalLM(str(llama), compile=True), CPU)
    check_compile(CausalLM(str(llama)), CPU)


def test_compilation_without_triton_is_refused(llama, monkeypatch):
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="E-COMPILE-MISSING"):
        check_compile(CausalLM(str(llama), compile=True), torch.device("cuda"))


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"kernels": "liger"}, "E-COMPILE-KERNELS"),
        ({"attention": "flash_attention_2"}, "E-COMPILE-ATTENTION"),
        ({"tiled_mlp": 1024}, "E-COMPILE-TILED"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_the_config(fields, code):
    with pytest.raises(ConfigError, match=code):
        CausalLM("x", compile=True, **fields)


def test_a_model_without_layers_of_the_common_kind_is_refused(llama, monkeypatch):
    monkeypatch.setattr(compiled, "decoder_layers", lambda model: [])
    with pytest.raises(ModelError, match="E-COMPILE-UNFIT"):
        compile_layers(learner_of(llama).causal, attention.NAME, 64)
