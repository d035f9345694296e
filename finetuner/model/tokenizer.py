"""The tokenizer of a model: its own or the one named, with its chat template and the new tokens.

- Where it came from stays in its `name_or_path`, so that its original files can be carried along.
- No code of a tokenizer's folder runs unless the config names the commit. InternLM2's tokenizer, whose code does not
  run on transformers 5, is read from its files: see `internlm2_tokenizer.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetuner.config.model import CausalLM
from finetuner.dialogue.encode import EncoderSpec
from finetuner.dialogue.ends import ends_of
from finetuner.dialogue.template import Template, bundled
from finetuner.errors import ModelError, Problem
from finetuner.model import internlm2_tokenizer
from finetuner.model.folder import read_json, tokenizer_folder
from finetuner.model.quiet import quiet
from finetuner.runtime.log import say


def load_tokenizer(model: CausalLM) -> PreTrainedTokenizerFast:
    """The tokenizer, template set, new tokens added.

    Raises: ModelError.
    """
    tokenizer = read_tokenizer(model)
    add_tokens(tokenizer, model.new_tokens)
    return tokenizer


def read_tokenizer(model: CausalLM) -> PreTrainedTokenizerFast:
    """As `load_tokenizer`, before new tokens.

    Raises: ModelError.
    """
    folder = tokenizer_folder(model)
    consent = model.remote_code is not None and model.tokenizer is None and not Path(str(model.path)).is_dir()
    tokenizer = from_folder(folder, code=consent)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            Problem(
                "E-TOKENIZER-EOS",
                "the tokenizer has no token that ends a text",
                str(folder),
                remedy='name it in tokenizer_config.json: "eos_token": "</s>"',
            )
        )
    tokenizer.chat_template = chosen_template(tokenizer, model)
    return tokenizer


def from_folder(folder: Path, *, code: bool) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder`."""
    settings = folder / "tokenizer_config.json"
    if settings.exists() and internlm2_tokenizer.is_tokenizer(read_json(settings)):
        return internlm2_tokenizer.read_tokenizer(folder)
    needed = settings.exists() and needs_code(read_json(settings), folder)
    if needed and not code:
        raise ModelError(
            Problem(
                "E-TOKENIZER-CODE",
                "the tokenizer is Python code of its folder",
                str(settings),
                "auto_map, and no tokenizer.json",
                "a tokenizer.json",
                'name the commit whose code may run: remote_code="<40 hex digits>", or tokenizer="..."',
            )
        )
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=needed)
    except Exception as error:  # transformers passes on whatever its many readers raise
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        remedy = "a folder with tokenizer.json; name another by tokenizer=..."
        problem = Problem("E-TOKENIZER", "the tokenizer cannot be loaded", str(folder), first[0], remedy=remedy)
        raise ModelError(problem) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            Problem(
                "E-TOKENIZER-SLOW",
                "the tokenizer has no fast form",
                str(folder),
                type(tokenizer).__name__,
                "a tokenizer.json",
                "convert it, or name another by tokenizer=...",
            )
        )
    return tokenizer


def needs_code(settings: dict[str, Any], folder: Path) -> bool:
    """Whether only code of the folder can read it."""
    return "AutoTokenizer" in settings.get("auto_map", {}) and not (folder / "tokenizer.json").exists()


def chosen_template(tokenizer: PreTrainedTokenizerFast, model: CausalLM) -> str | None:
    """The chat template: the config's, else the tokenizer's own."""
    if model.template is not None:
        return bundled(model.template)
    own: str | dict[str, str] | None = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" not in own:
            raise ModelError(
                Problem(
                    "E-TEMPLATE-NAMED",
                    "the tokenizer has several chat templates and none is the default",
                    str(tokenizer.name_or_path),
                    ", ".join(own),
                    remedy="write one to a file: template=FILE",
                )
            )
        return own["default"]
    return own


def need_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """The chat template.

    Raises: ModelError where there is none.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            Problem(
                "E-TEMPLATE-NONE",
                "the tokenizer has no chat template",
                str(tokenizer.name_or_path),
                fits="a bundled name or a file",
                remedy='model.template="chatml"',
            )
        )
    assert isinstance(tokenizer.chat_template, str)
    return tokenizer.chat_template


def add_tokens(tokenizer: PreTrainedTokenizerFast, tokens: tuple[str, ...]) -> tuple[int, ...]:
    """Adds `tokens` as special ones; ids of those that were not there."""
    known = tokenizer.get_vocab()
    fresh = [token for token in dict.fromkeys(tokens) if token not in known]
    old = [token for token in dict.fromkeys(tokens) if token in known]
    if old:
        say(f"new_tokens: {', '.join(old)} in the vocabulary already; their rows stay as they are")
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in tokens], special_tokens=True)
    ids: list[int] = tokenizer.convert_tokens_to_ids(fresh)
    return tuple(ids)


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id."""
    ids: list[int] = list(tokenizer.get_vocab().values())
    return max(ids) + 1


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """The special tokens by name, as a template sees them: {"bos_token": "<s>", ...}."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def encoder_spec(
    tokenizer: PreTrainedTokenizerFast, *, turns: Literal["all", "last", "split"] = "all", system: str | None = None
) -> EncoderSpec:
    """How dialogues and documents become tokens of this tokenizer, as plain data."""
    return EncoderSpec(
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        template=tokenizer.chat_template,
        template_name="of the tokenizer",
        special=tuple(sorted(special_tokens(tokenizer).items())),
        eos_id=tokenizer.eos_token_id,
        turns=turns,
        system=system,
    )


def stop_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Ids that end an answer: the token that ends the assistant's turn in the template, and eos."""
    ids = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        template = Template(tokenizer.chat_template, name="chat template", special=special_tokens(tokenizer))
        try:
            end = ends_of(template, [token.content for token in tokenizer.added_tokens_decoder.values()]).usual
        except ModelError:
            return tuple(ids)  # no dialogue is trained with such a template; it is refused where one is encoded
        ids = [tokenizer.convert_tokens_to_ids(end), *ids]
    return tuple(dict.fromkeys(ids))
