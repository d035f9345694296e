"""Both sides of a check: a conversation through the encoder, and through the oracle or transformers."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import oracles
from families import byte_level
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from finetuner.dialogue.encode import Encoded, Encoder, EncoderSpec
from finetuner.dialogue.message import Dialogue, RowError
from finetuner.dialogue.rows import openai
from finetuner.dialogue.template import bundled

BOS, EOS = "<s>", "</s>"


def spec(family: str, tokenizer_json: str | None = None, **changes: Any) -> EncoderSpec:
    source = tokenizer_json or byte_level()
    eos_id = Tokenizer.from_str(source).token_to_id(EOS)
    special = (("bos_token", BOS), ("eos_token", EOS))
    return EncoderSpec(source, bundled(family), family, special, eos_id, **changes)


def huggingface(family: str, tokenizer_json: str | None = None, template: str | None = None) -> Any:
    built = Tokenizer.from_str(tokenizer_json or byte_level())
    return PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token=BOS, eos_token=EOS, chat_template=template or bundled(family),
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def dialogue(messages: list[dict[str, Any]], tools: list[Any] | None = None) -> Dialogue:
    return openai({"messages": messages, "tools": tools})


def one(encoder: Encoder, given: Dialogue) -> Encoded:
    (result,) = encoder.encode([given])
    if isinstance(result, RowError):
        raise result
    assert len(result) == 1
    return result[0]


def pairs(encoded: Encoded) -> list[tuple[int, bool]]:
    return list(zip(encoded.ids.tolist(), encoded.learned.tolist(), strict=True))


def expected(
    family: str, messages: list[dict[str, Any]], tools: list[Any] | None = None, tokenizer_json: str | None = None,
    *, rstrip: Container[str] = (),
) -> list[tuple[int, bool]]:  # fmt: skip
    pieces = oracles.FAMILIES[family](messages, tools or [], BOS, EOS)
    return oracles.tokens(pieces, Tokenizer.from_str(tokenizer_json or byte_level()), rstrip=rstrip)
