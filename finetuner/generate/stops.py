"""Which tokens end an answer."""

from __future__ import annotations

from transformers import GenerationConfig, PreTrainedTokenizerFast

from finetuner.model import tokenizer as tokenizers


def stop_ids(tokenizer: PreTrainedTokenizerFast, generation_config: GenerationConfig | None) -> tuple[int, ...]:
    """The token that ends a turn in the template, the tokenizer's eos, and what the generation config names."""
    named = generation_config.eos_token_id if generation_config is not None else None
    listed = [] if named is None else [named] if isinstance(named, int) else list(named)
    return tuple(dict.fromkeys([*tokenizers.stop_ids(tokenizer), *listed]))
