"""What a learner promises to the loop: sums, gradients, modes, masters, freezing, noise."""

from __future__ import annotations

import pytest
import rig
import torch
from model_rig import CPU, gradients, learner_of, oracle, row, worst

from finetuner.config.model import NF4, CausalLM, LoRA
from finetuner.errors import ModelError
from finetuner.model import causal_lm, weights
from finetuner.model.build import build

METHODS = {
    "full": {},
    "lora": {"adapter": LoRA(rank=4)},
    "qlora": {"adapter": LoRA(rank=4), "quant": NF4()},
    "dora": {"adapter": LoRA(rank=4, dora=True)},
    "new rows": {"adapter": LoRA(rank=4), "new_tokens": ("<|new|>",)},
    "head whole": {"adapter": LoRA(rank=4, targets=("q_proj",), modules_to_save=("lm_head",))},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return rig.tiny_llama(tmp_path_factory.mktemp("llama"), hidden_size=64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_row_without_a_learned_place_gives_zero_and_zero_gradients(llama, method, dtype):
    learner = learner_of(llama, dtype=dtype, **METHODS[method])
    loss = learner(row((5, 4), learned=False))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == 0.0
    assert all(parameter.grad is not None and not parameter.grad.any() for _, parameter in learner.trainable())


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_every_trained_parameter_learns_and_no_frozen_one_moves(llama, method, dtype, checkpointing):
    learner = learner_of(llama, dtype=dtype, checkpointing=checkpointing, **METHODS[method])
    frozen = {name: p.detach().clone() for name, p in learner.named_parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, p in learner.trainable()}
    optimizer = torch.optim.SGD([p for _, p in learner.trainable()], lr=0.1)
    batch = row((9, 12, 6))
    for step in range(2):
        optimizer.zero_grad()
        learner(batch).backward()
        assert all(p.grad is not None for _, p in learner.trainable())
        assert step or all(p.grad.norm() > 0 for name, p in learner.trainable() if "lora_B" in name)
        optimizer.step()
    learned_rows = "trainable_tokens" if method == "new rows" else "nothing"
    for name, parameter in learner.trainable():
        assert parameter.dtype == torch.float32, name
        if learned_rows not in name or "embed" not in name:  # the new token does not occur in the row
            assert not torch.equal(parameter, before[name]), name
    assert all(torch.equal(p, frozen[name]) for name, p in learner.named_parameters() if not p.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_changes_no_bit(llama, method):
    found = []
    for checkpointing in (True, False):
        torch.manual_seed(1)
        found.append(gradients(learner_of(llama, checkpointing=checkpointing, **METHODS[method]), row((9, 5))))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


def test_half_precision_is_near_the_float32_truth(llama):
    batch = row((9, 12, 6))
    loss, grads = gradients(learner_of(llama, dtype="bfloat16"), batch)
    true_loss, true_grads = oracle(llama, batch)
    assert loss == pytest.approx(true_loss, rel=2e-3)
    assert worst(grads, true_grads) < 0.1
    assert worst(grads, true_grads) > 1e-4, "it did compute in bfloat16"


def test_an_evaluation_changes_nothing_of_a_four_bit_base(llama, monkeypatch):
    """bitsandbytes repacks the weights at the first evaluation on a CPU, and rounds their scales for good."""
    learner = learner_of(llama, dtype="bfloat16", **METHODS["qlora"])
    batch = row((9, 5))
    before = learner(batch)
    with torch.no_grad(), learner.evaluating():
        learner(batch)
    assert torch.equal(before, learner(batch))
    monkeypatch.setattr(weights, "keep_exact", lambda model: None)
    learner = learner_of(llama, dtype="bfloat16", **METHODS["qlora"])
    if any(getattr(module, "support_avx512bf16_for_cpu", False) for module in learner.modules()):
        assert any(hasattr(p, "quant_state") and p.quant_state.packing_format_for_cpu for p in learner.parameters())


def test_evaluating_and_answering_leave_every_mode_as_it_was(llama):
    learner = learner_of(llama, **METHODS["lora"])
    learner.causal.base_model.layers[0].eval()
    modes = {name: module.training for name, module in learner.named_modules()}
    with learner.answering() as model:
        assert not any(module.training for module in learner.modules())
        tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert tokens.shape == (1, 7)
    assert modes == {name: module.training for name, module in learner.named_modules()}
    assert learner.causal.config._attn_implementation == "finetuner"
    assert learner(row((4, 5))).item() > 0


def test_answers_come_from_the_trained_model(llama):
    learner = learner_of(llama)
    with torch.no_grad():
        learner.causal.lm_head.weight.mul_(-1)
    with learner.answering() as model:
        tokens_1T = torch.tensor([[5, 6, 7, 8]])
        answered = model.generate(tokens_1T, max_new_tokens=3, do_sample=False, eos_token_id=None)
        for _ in range(3):  # without a cache
            tokens_1T = torch.cat([tokens_1T, model(tokens_1T, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(answered, tokens_1T)


def test_masters_are_taken_by_name_or_refused(llama):
    learner = learner_of(llama)
    saved = {name: value.clone() for name, value in learner.masters().items()}
    with torch.no_grad():
        for _, parameter in learner.trainable():
            parameter.add_(1)
    learner.load_masters(dict(reversed(saved.items())))
    assert all(torch.equal(value, saved[name]) for name, value in learner.masters().items())
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        learner.load_masters({name: value for name, value in saved.items() if name != "model.norm.weight"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        learner.load_masters(saved | {"model.norm.weight": torch.ones(3)})


def test_frozen_parts_stay_frozen_and_a_pattern_without_a_match_is_an_error(llama):
    learner = learner_of(llama, freeze=("model.embed_tokens.*", "lm_head.*"))
    names = [name for name, _ in learner.trainable()]
    assert "model.norm.weight" in names
    assert not any("embed" in name or "lm_head" in name for name in names)
    with pytest.raises(ModelError) as caught:
        learner_of(llama, freeze=("model.embed_token.weight", "*nothing*"))
    assert [problem.code for problem in caught.value.problems] == ["E-FREEZE-PATTERN"] * 2
    assert "did you mean 'model.embed_tokens.weight'?" in str(caught.value)
    with pytest.raises(ModelError, match="E-MODEL-FROZEN"):
        learner_of(llama, freeze=("*",))


def test_noise_is_neftunes_and_of_training_only(llama):
    alpha = 5.0
    learner, quiet = learner_of(llama, neftune=alpha), learner_of(llama)
    batch = row((16, 4))
    torch.manual_seed(3)
    given = learner.inputs(batch.tokens_1T, batch)["inputs_embeds"]
    added = (given - learner.causal.get_input_embeddings()(batch.tokens_1T))[0]
    for part, length in ((added[:16], 16), (added[16:], 4)):
        bound = alpha / (length * 64) ** 0.5
        assert bound * 0.95 < part.abs().max() <= bound * 1.00001
        assert part.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert learner(batch).item() != quiet(batch).item()
    with learner.evaluating(), quiet.evaluating():
        assert learner(batch).item() == quiet(batch).item()


def test_the_tables_tell_what_is_held(llama):
    qlora = learner_of(llama, dtype="bfloat16", **METHODS["qlora"])
    table = dict(qlora.dtype_table())
    assert table["trained"] == "float32"
    assert table["compute"] == table["norms"] == table["head"] == table["embedding"] == "bfloat16"
    assert set(table["frozen base"].split(", ")) == {"nf4", "bfloat16"}
    trains, plain = qlora.what_trains(), learner_of(llama).what_trains()
    assert plain.trained == plain.all == trains.all - trains.trained
    assert dict(learner_of(llama, dtype="bfloat16").dtype_table())["trained"] == "float32"


def test_a_head_that_does_more_is_not_bypassed(tmp_path):
    """Soft-capped logits: the head alone would be another loss."""
    from model_rig import folder_of

    learner = learner_of(folder_of("gemma2", tmp_path))
    assert not learner.has_plain_head


def test_dialogues_need_a_template(tmp_path):
    rig.tokenizer(tmp_path, template=None)
    rig.tiny_llama(tmp_path)
    assert build(CausalLM(str(tmp_path)), CPU, dialogues=False)
    with pytest.raises(ModelError, match="E-TEMPLATE-NONE"):
        build(CausalLM(str(tmp_path)), CPU, dialogues=True)


def test_a_cast_head_piece_is_what_the_learner_uses(llama, monkeypatch):
    """The mutant: targets that are one place off are seen in the loss."""
    batch = row((9, 12))
    right = learner_of(llama)(batch).item()
    loss_sum = causal_lm.loss_sum
    monkeypatch.setattr(causal_lm, "loss_sum", lambda head, h, y, dtype: loss_sum(head, h, y.roll(1), dtype))
    assert learner_of(llama)(batch).item() != pytest.approx(right, rel=1e-3)
