"""The arithmetic of a step is what torch counts when it is performed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rig
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from finetuner.model.work import Work, pairs, work_of

LENGTH = 24


def counted(model: torch.nn.Module, learned: int) -> int:
    """Operations of the matrix products of one step over a document, by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        tokens_1T = torch.arange(LENGTH)[None] % 50
        logits = model(input_ids=tokens_1T, use_cache=False, logits_to_keep=torch.arange(learned)).logits
        logits.float().logsumexp(-1).sum().backward()
    return counter.get_total_flops()


def same(counted_: int, wanted: float) -> bool:
    """Equal, but for the rotary table, which some versions of transformers make by a matrix product."""
    return counted_ - wanted in (0, 2 * LENGTH * 4)


def whole_squares(work: Work) -> float:
    """Eager attention computes the upper triangle as well: 4 H L^2 a layer forward, twice that backward."""
    return sum(12 * width * LENGTH * LENGTH for width, _ in work.layers)


def test_full_training_costs_what_torch_counts(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(rig.tiny_llama(tmp_path), attn_implementation="eager")
    work = work_of(model, model)
    wanted = work.per_token * LENGTH + work.per_learned * 5 + whole_squares(work)
    assert same(counted(model, 5), wanted)


def test_adapters_cost_what_torch_counts(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(rig.tiny_llama(tmp_path), attn_implementation="eager")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    work = work_of(adapted, model)
    first = model.model.layers[0].self_attn
    # Nothing in front of the first layer trains: its q, k, v and their A matrices need no gradient of their input.
    spared = sum(2 * (part.base_layer.weight.numel() + part.lora_A["default"].weight.numel())
                 for part in (first.q_proj, first.k_proj, first.v_proj))  # fmt: skip
    wanted = work.per_token * LENGTH + work.per_learned * 5 + whole_squares(work) - spared * LENGTH
    assert same(counted(adapted, 5), wanted)


def test_tied_heads_and_embeddings_are_counted_as_a_head_alone(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        rig.tiny_llama(tmp_path, tie_word_embeddings=True), attn_implementation="eager"
    )
    work = work_of(model, model)
    assert work.per_learned == 6 * model.lm_head.weight.numel()
    assert same(counted(model, 5), work.per_token * LENGTH + work.per_learned * 5 + whole_squares(work))


@pytest.mark.parametrize(("window", "wanted"), [(None, 8 * 8 / 2 + 2 * 2 / 2), (2, 8 * 2 - 2 + 2 * 2 - 2), (64, 34.0)])
def test_a_window_bounds_what_a_token_sees(window: int | None, wanted: float) -> None:
    assert pairs(np.array([8, 2]), window) == wanted


def test_attention_grows_with_the_squares_of_documents() -> None:
    work = Work(0, 0, ((64, None),))
    assert work.of(np.array([1000]), 0) == pytest.approx(work.of(np.array([100] * 10), 0) * 10)
