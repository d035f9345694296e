"""`answer`: what a model says next in a conversation; afterwards model and random numbers are as they were before.

- Evaluation mode, a cache and an attention that takes one, for the call only.
- Random numbers come from a seed of the call; the generators of python, numpy and torch go on as if nothing was drawn.
- An answer ends at a stop token, not at text that looks like one.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from finetuner.errors import ModelError, Problem
from finetuner.generate.prompt import prompt_ids
from finetuner.generate.words import Words
from finetuner.model.answering import answering
from finetuner.model.quiet import quiet
from finetuner.model.soundness import positions


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said. `tokens` counts it, the stop token left out."""

    text: str
    tokens: int
    stopped: Literal["stop", "length"]


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Mapping[str, str]],
    *,
    max_tokens: int,
    stops: tuple[int, ...],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    compute: torch.dtype | None = None,
    stream: Callable[[str], None] | None = None,
) -> Answer:
    """The next turn of `messages` ({"role", "content"}); `stream` is given each piece of it as it comes.

    Temperature 0 takes the likeliest token each time; above, `seed` makes the draw repeatable. `compute` is what
    training computes in, where the model trains.

    Raises:
        ModelError: the conversation fills the positions that the model has (E-ASK-LENGTH).
    """
    causal = transformers_model(model)
    ids = prompt_ids(tokenizer, messages)
    room = room_after(causal, len(ids))
    words = Words(tokenizer, stops, stream or (lambda piece: None))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    chosen: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        chosen = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    config = GenerationConfig(
        max_new_tokens=min(max_tokens, room), eos_token_id=list(stops), pad_token_id=padding, use_cache=True, **chosen
    )
    with (
        answering(model, causal, compute),
        same_random_numbers(secrets.randbits(63) if seed is None else seed),
        quiet(),
    ):
        tokens_1T = torch.tensor([ids], device=causal.get_input_embeddings().weight.device)
        causal.generate(
            tokens_1T, attention_mask=torch.ones_like(tokens_1T), generation_config=config, streamer=words
        )  # fmt: skip
    return Answer(words.text, len(words.ids), "stop" if words.stopped else "length")


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """transformers' model; in peft's it lies inside, with the adapter's layers in it."""
    if isinstance(model, PreTrainedModel):
        return model
    inner: PreTrainedModel = model.get_base_model()  # type: ignore[operator]
    return inner


def room_after(causal: PreTrainedModel, prompt: int) -> int:
    """Tokens that still fit behind a prompt of that many.

    Raises: ModelError.
    """
    limit = positions(causal.config)
    if limit is None:
        return 1 << 30
    if prompt >= limit:
        raise ModelError(
            Problem("E-ASK-LENGTH", "the conversation is longer than the model's context", found=f"{prompt} tokens",
                    fits=f"fewer than {limit}", remedy="begin anew (/reset in a chat), or say less at once")
        )  # fmt: skip
    return limit - prompt


@contextmanager
def same_random_numbers(seed: int) -> Iterator[None]:
    """Draws inside follow `seed`; draws after are those that would have come without it."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
