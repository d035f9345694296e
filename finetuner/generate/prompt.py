"""A conversation -> the token ids after which the model speaks: the same ids that it was trained on.

- The template is the tokenizer's, as `apply_chat_template` renders it.
- Control strings in what people say stay text, as in training: they cannot end a turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from finetuner.dialogue.control import Control
from finetuner.dialogue.ends import ends_of
from finetuner.dialogue.message import Dialogue, Message, RowError
from finetuner.dialogue.template import Template
from finetuner.errors import ModelError, Problem


def prompt_ids(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of `messages` ({"role", "content"}) and of the words that make the assistant speak.

    Raises: ModelError where the template refuses the conversation.
    """
    try:
        if any(word in message["content"] for word in added_words(tokenizer) for message in messages):
            return guarded(tokenizer, messages)
        text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
    except (TemplateError, RowError) as error:
        roles = " ".join(message["role"] for message in messages)
        raise ModelError(
            Problem("E-ASK-TEMPLATE", "the chat template cannot write this conversation", str(tokenizer.name_or_path),
                    f"{error} (roles: {roles})", remedy="leave the system message out, or give another --template")
        ) from error  # fmt: skip
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def guarded(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """As `prompt_ids`, where control strings may stand in the messages."""
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    template = Template(str(tokenizer.chat_template), name="chat template", special=special)
    backend = tokenizer.backend_tokenizer
    control = Control(backend.to_str(), backend, ends_of(template, added_words(tokenizer)).frame)
    dialogue, found = control.masked(Dialogue(tuple(Message(m["role"], m["content"]) for m in messages)))
    masked = template.render(dialogue, ask=True)
    if not found:
        plain: list[int] = tokenizer.encode(masked, add_special_tokens=False)
        return plain
    encoding = control.twin.encode(control.twin_text(masked, []).text, add_special_tokens=False)
    guarded_ids: list[int] = control.own_ids(encoding).tolist()
    return guarded_ids


def added_words(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The strings that the tokenizer reads as one token whatever stands around them."""
    return [token.content for token in tokenizer.added_tokens_decoder.values()]
