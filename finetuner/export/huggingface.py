"""What lies beside the weights in a folder that others load: config, tokenizer, template, generation config.

- The base's own files where they are still true: older programs do not know the names that transformers 5 writes.
- Old and new names of one fact stand side by side: `dtype` and `torch_dtype`, `rope_parameters` and `rope_theta`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetuner.errors import ModelError
from finetuner.model.folder import read_json
from finetuner.model.tokenizer import from_folder

TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
             "added_tokens.json", "vocab.json", "merges.txt")  # fmt: skip
DROPPED = ("quantization_config", "_name_or_path", "auto_map", "transformers_version")
"""Not true of the written folder; code of the base's folder does not come along."""


def portable_config(values: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json that old and new readers understand alike, from the base's own values."""
    config = {key: value for key, value in values.items() if key not in DROPPED}
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    return config


def write_tokenizer(checkpoint: Path, base: Path, out: Path) -> None:
    """The tokenizer's files: the base's own where they make the checkpoint's tokenizer, else the checkpoint's."""
    trained = checkpoint if (checkpoint / "tokenizer_config.json").exists() else base
    source = base if same_tokenizer(trained, base) else trained
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if not (out / "tokenizer.json").exists():
        from_folder(trained, code=False).backend_tokenizer.save(str(out / "tokenizer.json"))
    template = chat_template(trained)
    settings_file = out / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.exists() else {}
    if template is not None:
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")
        settings.pop("chat_template", None)
    settings_file.write_text(json.dumps(portable_tokenizer(settings), indent=2, ensure_ascii=False) + "\n", "utf-8")


def portable_tokenizer(settings: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json without the class name that only transformers 5 knows, and without code."""
    kept = {key: value for key, value in settings.items() if key not in ("auto_map", "is_local", "local_files_only")}
    foreign = kept.get("tokenizer_class") in (None, "TokenizersBackend", "InternLM2Tokenizer", "InternLM2TokenizerFast")
    if foreign:
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
        kept.pop("backend", None)
        kept["model_input_names"] = ["input_ids", "attention_mask"]
    return kept


def same_tokenizer(one: Path, other: Path) -> bool:
    """Whether both folders' files make the same tokenizer."""
    if one == other:
        return True
    try:
        first, second = (from_folder(folder, code=False) for folder in (one, other))
    except ModelError:
        return False
    texts = [json.loads(t.backend_tokenizer.to_str()) | {"padding": None, "truncation": None} for t in (first, second)]
    return bool(texts[0] == texts[1] and first.special_tokens_map == second.special_tokens_map)


def chat_template(folder: Path) -> str | None:
    """The chat template in `folder`, or None."""
    template: str | dict[str, str] | None = from_folder(folder, code=False).chat_template
    return template.get("default") if isinstance(template, dict) else template


def write_generation(checkpoint: Path, base: Path, stops: tuple[int, ...], out: Path) -> None:
    """generation_config.json of the checkpoint, or of the base, with every id that ends an answer."""
    folders = [folder for folder in (checkpoint, base) if (folder / "generation_config.json").exists()]
    values = read_json(folders[0] / "generation_config.json") if folders else {}
    named = values.get("eos_token_id")
    listed = [] if named is None else [named] if isinstance(named, int) else list(named)
    ends = list(dict.fromkeys([*stops, *listed]))
    values["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    write_json(out / "generation_config.json", values)


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Writes `values` as the readers of such folders expect it."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
