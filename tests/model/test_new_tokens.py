"""New tokens: the right rows, the old bits, nothing smaller, and an adapter that carries them."""

from __future__ import annotations

import json

import pytest
import rig
import torch
from model_rig import CPU, learner_of, row
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuner.config.model import CausalLM, LoRA
from finetuner.errors import ModelError
from finetuner.model import vocabulary
from finetuner.model.build import build

NEW = ("<|call|>", "<|result|>")


def matrices(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fields", [{}, {"adapter": LoRA(rank=2)}], ids=["full", "lora"])
def test_new_rows_are_the_mean_and_old_rows_keep_their_bits(tmp_path, tied, fields):
    llama = rig.tiny_llama(tmp_path, tie_word_embeddings=tied)
    learner = learner_of(llama, new_tokens=NEW, **fields)
    known = len(AutoTokenizer.from_pretrained(llama))
    ids = learner.tokenizer.convert_tokens_to_ids(list(NEW))
    assert ids == [known, known + 1]
    held = [learner.causal.get_input_embeddings(), learner.causal.get_output_embeddings()]
    held = [matrix.get_base_layer() if hasattr(matrix, "get_base_layer") else matrix for matrix in held]
    held = [matrix.token_adapter.base_layer if hasattr(matrix, "token_adapter") else matrix for matrix in held]
    for matrix, old in zip(held, matrices(llama)):
        assert torch.equal(matrix.weight[:known], old)
        for place in ids:
            assert torch.equal(matrix.weight[place], old.mean(0))
        assert len(matrix.weight) == (known + 2 if fields else -(-(known + 2) // 8) * 8)
    assert (held[0].weight is held[1].weight) == tied


def test_a_matrix_with_room_is_not_resized(tmp_path):
    llama = rig.tiny_llama(tmp_path, vocab_size=512)
    learner = learner_of(llama, new_tokens=NEW)
    assert len(learner.causal.get_input_embeddings().weight) == 512
    known = learner.tokenizer.convert_tokens_to_ids(NEW[0])
    old = matrices(llama)[0]
    assert torch.equal(learner.causal.get_input_embeddings().weight[known], old[:known].mean(0))
    assert torch.equal(learner.causal.get_input_embeddings().weight[known + 2 :], old[known + 2 :])


def test_without_new_tokens_nothing_is_resized(tmp_path):
    for rows in (400, 512):
        llama = rig.tiny_llama(tmp_path / str(rows), vocab_size=rows)
        assert len(learner_of(llama).causal.get_input_embeddings().weight) == rows


def test_a_token_that_is_known_is_not_made_anew(tmp_path):
    llama = rig.tiny_llama(tmp_path)
    learner = learner_of(llama, new_tokens=("<|im_start|>",))
    assert all(torch.equal(a, b) for a, b in zip(
        (learner.causal.get_input_embeddings().weight, learner.causal.get_output_embeddings().weight), matrices(llama)
    ))  # fmt: skip


def test_ids_without_a_row_are_found_at_the_start(tmp_path):
    llama = rig.tiny_llama(tmp_path, vocab_size=100)
    with pytest.raises(ModelError, match="E-VOCABULARY"):
        build(CausalLM(str(llama)), CPU, dialogues=False)
    with pytest.raises(ModelError, match="E-VOCABULARY"):
        build(CausalLM(str(llama), new_tokens=NEW), CPU, dialogues=False)


@pytest.mark.parametrize("tied", [True, False])
def test_trained_rows_travel_with_the_adapter(tmp_path, tied):
    """Loaded by plain peft, in the way that peft itself documents for a tokenizer that has grown."""
    from peft import AutoPeftModelForCausalLM, PeftModel

    llama = rig.tiny_llama(tmp_path / "base", tie_word_embeddings=tied)
    learner = learner_of(llama, adapter=LoRA(rank=2), new_tokens=NEW)
    with torch.no_grad():
        for _, parameter in learner.trainable():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    learner.save(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.tensor([tokenizer.convert_tokens_to_ids([*NEW, "<s>"])])
    with learner.answering() as model:
        right = model(ids).logits

    def plain():
        model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        model.resize_token_embeddings(len(tokenizer))
        return model

    for loaded in (PeftModel.from_pretrained(plain(), tmp_path / "out"),
                   AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)):  # fmt: skip
        assert torch.allclose(loaded(ids).logits, right, atol=1e-5)
    merged = PeftModel.from_pretrained(plain(), tmp_path / "out").merge_and_unload()
    assert torch.allclose(merged(ids).logits, right, atol=1e-5)


def test_new_rows_get_gradients_and_old_ones_none(tmp_path):
    from dataclasses import replace

    llama = rig.tiny_llama(tmp_path)
    learner = learner_of(llama, adapter=LoRA(rank=2), new_tokens=NEW)
    batch = row((9, 5))
    tokens = batch.tokens_1T.clone()
    tokens[0, 2] = learner.tokenizer.convert_tokens_to_ids(NEW[0])
    learner(replace(batch, tokens_1T=tokens)).backward()
    rows = {name: p.grad for name, p in learner.trainable() if "trainable_tokens" in name}
    assert sorted(grad.shape[0] for grad in rows.values()) == [2, 2]
    embedding = next(grad for name, grad in rows.items() if "embed_tokens" in name)
    assert embedding[0].any()
    assert not embedding[1].any()


def test_the_mutant_that_averages_random_rows_in_is_seen(tmp_path, monkeypatch):
    right = vocabulary.start_from_mean

    monkeypatch.setattr(vocabulary, "start_from_mean", lambda matrix, known, fresh: right(matrix, known + 1, fresh))
    with pytest.raises(AssertionError):
        test_new_rows_are_the_mean_and_old_rows_keep_their_bits(tmp_path, False, {})


def test_the_saved_tokenizer_is_the_one_that_trained(tmp_path):
    llama = rig.tiny_llama(tmp_path / "base")
    learner = learner_of(llama, new_tokens=NEW)
    learner.save(tmp_path / "out")
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "hello <|call|>the fox<|result|></s>"
    assert saved.encode(text) == learner.tokenizer.encode(text)
    turns = [{"role": "user", "content": "hello"}]
    assert saved.apply_chat_template(turns, tokenize=False) == learner.tokenizer.apply_chat_template(
        turns, tokenize=False
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] % 8 == 0
