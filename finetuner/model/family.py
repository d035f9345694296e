"""Whether a tokenizer from elsewhere stays the same beside a model of another family.

- For some families transformers reads a tokenizer by a class of its own, whatever tokenizer.json says (Qwen2 splits
  text in its way). A model trained with one tokenizer would then be asked through another; that is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from finetuner.errors import ModelError, Problem
from finetuner.model.quiet import quiet

PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "added_tokens")
"""Of tokenizer.json: all that decides what a text becomes."""


def check_family(tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig) -> None:
    """Saves the tokenizer beside such a model, loads it as others would, and compares.

    Raises: ModelError.
    """
    with TemporaryDirectory() as name:
        tokenizer.save_pretrained(name)
        (Path(name) / "config.json").write_text(json.dumps({"model_type": config.model_type}), "utf-8")
        with quiet():
            loaded = AutoTokenizer.from_pretrained(name)
    one, two = (json.loads(each.backend_tokenizer.to_str()) for each in (tokenizer, loaded))
    changed = [part for part in PARTS if one[part] != two[part]]
    if changed:
        raise ModelError(
            Problem(
                "E-TOKENIZER-FAMILY",
                f"beside a {config.model_type} model, transformers would read this tokenizer as another one",
                str(tokenizer.name_or_path),
                f"as {type(loaded).__name__}, with another {', '.join(changed)}",
                "the family's own tokenizer",
                "take that one, or another model_type (a Llama takes any tokenizer)",
            )
        )
