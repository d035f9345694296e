"""What lies beside the weights of a merged folder, of the checkpoint's and the base's own files."""

from __future__ import annotations

from pathlib import Path

from finetuner.model import portable
from finetuner.model.folder import read_json
from finetuner.model.portable import all_ends, write_json
from finetuner.model.tokenizer import from_folder


def write_tokenizer(checkpoint: Path, base: Path, out: Path) -> None:
    """The tokenizer's files: the base's own where they make the checkpoint's tokenizer, else the checkpoint's."""
    trained = checkpoint if (checkpoint / "tokenizer_config.json").exists() else base
    portable.write_tokenizer(from_folder(trained, code=False), [base, trained], out)


def write_generation(checkpoint: Path, base: Path, stops: tuple[int, ...], out: Path) -> None:
    """generation_config.json of the checkpoint, or of the base, with every id that ends an answer."""
    folders = [folder for folder in (checkpoint, base) if (folder / "generation_config.json").exists()]
    values = read_json(folders[0] / "generation_config.json") if folders else {}
    values["eos_token_id"] = all_ends(stops, values.get("eos_token_id"))
    write_json(out / "generation_config.json", values)
