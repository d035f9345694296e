"""A `CausalLM` of a config -> a learner in memory and its tokenizer.

tokenizer -> weights, with rows for the new tokens -> adapter, or frozen parts -> attention -> learner -> tiles
-> checkpointing -> compiled layers
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from finetuner.config.model import CausalLM, Fresh
from finetuner.model import attention, compiled, fp8, kernels
from finetuner.model.causal_lm import CausalLearner
from finetuner.model.checkpointing import check_layers, check_offload, set_checkpointing
from finetuner.model.family import check_family
from finetuner.model.folder import model_folder, read_config
from finetuner.model.freeze import freeze
from finetuner.model.fresh import fresh_config
from finetuner.model.quiet import quiet
from finetuner.model.shards import WHOLE, Shards
from finetuner.model.sketch import check_parts
from finetuner.model.soundness import check_length
from finetuner.model.tiled import tile, tileable
from finetuner.model.tokenizer import add_tokens, need_template, read_tokenizer, vocabulary_size
from finetuner.model.vocabulary import check_rows
from finetuner.model.weights import compute, load_weights, needs_code, read_hf_config, stored_dtype
from finetuner.runtime.log import say


class Built(NamedTuple):
    learner: CausalLearner
    tokenizer: PreTrainedTokenizerFast


def build(
    model: CausalLM, device: torch.device, *, dialogues: bool, tokens: int | None = None, shards: Shards = WHOLE
) -> Built:
    """The learner on `device`; `dialogues` says whether a chat template is needed, `tokens` how long a row may be.

    `shards` says how weights lie on the ranks.

    Raises: ModelError for all that would make the training another one than the config says.
    """
    check_device(model, device, tokens)
    attention.register()
    tokenizer = checked_tokenizer(model, 1, dialogues=dialogues)
    new_ids = add_tokens(tokenizer, model.new_tokens)
    causal = load_weights(model, tokenizer, vocabulary_size(tokenizer), new_ids, device, shards)
    if isinstance(model.path, Fresh) or model.tokenizer is not None:
        check_family(tokenizer, causal.config)
    stored = torch.float32 if isinstance(model.path, Fresh) else stored_dtype(model_folder(model))
    check_layers(causal, model)
    if model.tiled_mlp is not None:
        tileable(causal)
    attends = attention.attention_for(causal, model.attention)
    if model.kernels == "liger":
        kernels.use_kernels(causal)
    if model.fp8:
        fp8.use_fp8(causal)
    network: torch.nn.Module = causal
    if model.adapter is not None:
        with quiet():
            from finetuner.model.adapter import add_adapter  # peft costs seconds that full training need not wait for
        network = add_adapter(causal, model, new_ids)
    else:
        causal.requires_grad_(True)
        freeze(causal, model.freeze)
    with shards.in_turn(network):
        learner = CausalLearner(
            network,
            tokenizer,
            adapted=model.adapter is not None,
            attends=attends,
            compute=compute(model),
            stored=stored,
            neftune=model.neftune,
        )
    learner.train()
    if model.tiled_mlp is not None:
        tile(learner, model.tiled_mlp)
    if shards.cuts and model.checkpointing == "auto":
        say("checkpointing all layers: what a layer keeps is not measured where weights are cut")
        tokens = None
    set_checkpointing(learner, model, tokens)
    if model.compile:
        assert tokens is not None, "compiled layers are for rows of one length"
        learner.compile_for(tokens)
    return Built(learner, tokenizer)


def check_device(model: CausalLM, device: torch.device, tokens: int | None) -> None:
    """Refuses what `device` cannot do, before anything is read; rows are up to `tokens` long.

    Raises: ConfigError, ModelError.
    """
    check_offload(model, device)
    compiled.check_compile(model, device)
    fp8.check_fp8(model, device, tokens)
    kernels.check_kernels(model, device)


def checked_tokenizer(model: CausalLM, length: int, *, dialogues: bool) -> PreTrainedTokenizerFast:
    """The tokenizer before new tokens, once the model is known to be sound as far as that shows without a weight.

    Raises: ModelError for what would stop `build`, and for rows of `length` tokens that are too long for the model.
    """
    attention.check_choice(model.attention)
    if isinstance(model.path, Fresh):
        check_length(fresh_config(model.path, {}), length)
    else:
        folder = model_folder(model)
        config = read_hf_config(folder, model)
        check_length(config, length)
        if not needs_code(read_config(folder)):
            check_parts(model, config)
    tokenizer = read_tokenizer(model)
    if dialogues and "strftime_now" in need_template(tokenizer):
        say("the chat template writes the date: samples that are encoded on another day differ in it")
    if not isinstance(model.path, Fresh):
        check_rows(vocabulary_size(tokenizer), config.get_text_config().vocab_size)
    return tokenizer
