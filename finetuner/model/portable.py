"""What lies beside the weights in a folder that others load: config, tokenizer, template, the ids that end an answer.

- The original's own files where they are still true: older programs do not know the names that transformers 5 writes.
- Old and new names of one fact stand side by side: `dtype` and `torch_dtype`, `rope_parameters` and `rope_theta`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from finetuner.errors import ModelError
from finetuner.model.folder import read_json
from finetuner.model.tokenizer import from_folder

ORIGINALS = ("tokenizer.model", "vocab.json", "merges.txt")
"""Files that other programs convert a tokenizer from; transformers itself no longer writes them."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", *ORIGINALS)
DROPPED = ("quantization_config", "_name_or_path", "transformers_version")
"""Not true of the written folder."""
CODE = ("auto_map", "is_local", "local_files_only")
"""Of tokenizer_config.json: where its code lies, and how it was read."""
NEW_CLASSES = (None, "TokenizersBackend", "InternLM2Tokenizer", "InternLM2TokenizerFast")
"""Tokenizer classes that only transformers 5, or only code of the original's folder, knows."""


def portable_config(values: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json that old and new readers understand alike, from the model's own values.

    The code of a folder does not come along; where it is needed, the config still says in which repository it lies.
    """
    needs_code = "model_type" in values and values["model_type"] not in CONFIG_MAPPING
    dropped = DROPPED if needs_code else (*DROPPED, "auto_map")
    config = {key: value for key, value in values.items() if key not in dropped}
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    return config


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, originals: Sequence[Path], out: Path) -> None:
    """The tokenizer's files and its template: those of the first of `originals` that makes the same tokenizer, or new
    ones, beside which lie the first one's files for other programs."""
    source = next((folder for folder in originals if makes(folder, tokenizer)), None)
    if source is None:
        tokenizer.save_pretrained(out)
    for name in ORIGINALS if source is None else TOKENIZER:
        original = (source or originals[0]) / name
        if original.is_file() and (source is not None or not (out / name).exists()):
            shutil.copyfile(original, out / name)
    if not (out / "tokenizer.json").exists():
        tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    settings_file = out / "tokenizer_config.json"
    settings = portable_tokenizer(read_json(settings_file) if settings_file.exists() else {})
    template: str | dict[str, str] | None = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if template is not None:
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")
        settings.pop("chat_template", None)
    write_json(settings_file, settings)


def makes(folder: Path, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the files in `folder` make `tokenizer`, its template aside."""
    try:
        other = from_folder(folder, code=False)
    except ModelError:
        return False
    one, two = (json.loads(each.backend_tokenizer.to_str()) for each in (tokenizer, other))
    same_parts = one | {"padding": None, "truncation": None} == two | {"padding": None, "truncation": None}
    return same_parts and bool(tokenizer.special_tokens_map == other.special_tokens_map)


def portable_tokenizer(settings: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json without names that only transformers 5 knows, and without code."""
    kept = {key: value for key, value in settings.items() if key not in CODE}
    if kept.get("tokenizer_class") in NEW_CLASSES:
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
        kept.pop("backend", None)
        kept["model_input_names"] = ["input_ids", "attention_mask"]
    if isinstance(kept.get("extra_special_tokens"), list):  # transformers 4 asks a list of that name for its keys
        kept["additional_special_tokens"] = kept.pop("extra_special_tokens")
    return kept


def all_ends(stops: Sequence[int], named: int | Sequence[int] | None) -> int | list[int]:
    """eos_token_id of generation_config.json: `stops` and those that the file `named` before."""
    before = [] if named is None else [named] if isinstance(named, int) else list(named)
    ends = list(dict.fromkeys([*stops, *before]))
    return ends[0] if len(ends) == 1 else ends


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Writes `values` as the readers of such folders expect it."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
