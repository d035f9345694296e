"""The folder that a pretrained model lies in: found offline first, and examined before a tensor is read.

- A hub name is looked up in the local cache, and only if that is not complete on the hub.
- Only safetensors are read; a pickle can run code.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from finetuner.config.model import CausalLM, Fresh
from finetuner.config.node import short
from finetuner.errors import ModelError, Problem, nearest

Content = Literal["model", "tokenizer"]
TEXTS = ("*.json", "*.jinja", "*.model", "*.txt")
PATTERNS: Mapping[Content, tuple[str, ...]] = {"tokenizer": TEXTS, "model": (*TEXTS, "*.safetensors")}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def model_folder(model: CausalLM) -> Path:
    """The folder of `model`'s weights and config, examined.

    Raises: ModelError where the folder could not be loaded.
    """
    assert isinstance(model.path, str)
    folder = find(model.path, "model", revision=model.remote_code or model.revision, code=model.remote_code is not None)
    read_config(folder)
    for name in shards(folder):
        read_names(folder / name)
    return folder


def tokenizer_folder(model: CausalLM) -> Path:
    """The folder of `model`'s tokenizer."""
    match model.path:
        case Fresh():
            return find(model.path.tokenizer, "tokenizer")
        case str() if model.tokenizer is None:
            revision = model.remote_code or model.revision
            return find(model.path, "tokenizer", revision=revision, code=model.remote_code is not None)
        case _:
            assert model.tokenizer is not None
            return find(model.tokenizer, "tokenizer")


def find(name: str, content: Content, *, revision: str | None = None, code: bool = False) -> Path:
    """The local folder of `name`, a path or a hub name.

    Raises: ModelError.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            Problem(
                "E-MODEL-PATH",
                f"no such {content} folder",
                found=f"{name} is a file" if path.exists() else name,
                fits="a folder, or a hub name such as org/name",
                remedy=beside(path) or "mend the path",
            )
        )
    patterns = [*PATTERNS[content], *(("*.py",) if code else ())]
    try:
        cached = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
        if HF_HUB_OFFLINE or is_complete(cached, content):
            return cached
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    return download(name, content, revision, patterns)


def download(name: str, content: Content, revision: str | None, patterns: list[str]) -> Path:
    """As `find`, from the hub."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, etag_timeout=10))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else str(error).strip().splitlines()[0]
        found = f"{name}: not in the local cache, and not to be had from the hub ({reason})"
        remedy = beside(Path(name)) or f"hf download {name}, where there is a network; or give the folder's path"
        raise ModelError(Problem("E-MODEL-HUB", f"the {content} was not found", found=found, remedy=remedy)) from error


def beside(path: Path) -> str:
    """The folder that was most likely meant by a path that is not there, as a question; or nothing."""
    parent = path.parent
    folders = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    best = nearest(path.name, folders)
    return f"did you mean the folder {parent / best}?" if best else ""


def is_complete(folder: Path, content: Content) -> bool:
    """Whether a cached snapshot holds all that is needed."""
    if content == "tokenizer":
        return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))
    if not (folder / "config.json").exists():
        return False
    try:
        return all((folder / name).exists() for name in shards(folder))
    except ModelError:
        return False


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`.

    Raises: ModelError.
    """
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            Problem(
                "E-MODEL-JSON", f"{file.name} cannot be read", str(file), str(error), remedy="fetch the model again"
            )
        ) from error
    if not isinstance(value, dict):
        what, remedy = f"{file.name} is not an object", "fetch it again"
        raise ModelError(Problem("E-MODEL-JSON", what, str(file), type(value).__name__, "{...}", remedy))
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says.

    Raises: ModelError where there is none, or the weights are quantised already.
    """
    if not (folder / "config.json").exists():
        remedy = "give the folder of a model"
        if (folder / "adapter_config.json").exists():
            remedy = "this is an adapter: give its base as path, and LoRA(start=...) the folder"
        raise ModelError(
            Problem(
                "E-MODEL-CONFIG",
                "the folder holds no config.json",
                str(folder),
                ", ".join(sorted(f.name for f in folder.iterdir())[:8]),
                remedy=remedy,
            )
        )
    config = read_json(folder / "config.json")
    if "model_type" not in config:
        what, remedy = "config.json does not say its model_type", "fetch the model's config.json again"
        raise ModelError(Problem("E-MODEL-CONFIG", what, str(folder), ", ".join(config)[:120], remedy=remedy))
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else "?"
        raise ModelError(
            Problem(
                "E-MODEL-QUANTISED",
                "the model's weights are quantised already",
                str(folder / "config.json"),
                f"quant_method {method}",
                "weights in bfloat16, float16 or float32",
                "give the original model as path, with quant=NF4() for QLoRA",
            )
        )
    return config


def shards(folder: Path) -> tuple[str, ...]:
    """Names of the files that hold the weights.

    Raises: ModelError where there are none, or the index names one that is missing.
    """
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
            what, remedy = f"{INDEX} holds no weight_map", "fetch it again"
            raise ModelError(Problem("E-MODEL-JSON", what, str(folder), short(index), "{name: file}", remedy))
        names = tuple(sorted(set(index.values())))
        missing = [name for name in names if "/" in name or not (folder / name).exists()]
        if missing:
            raise ModelError(
                Problem(
                    "E-MODEL-SHARD",
                    "the index names files that are not there",
                    str(folder / INDEX),
                    f"{len(missing)} of {len(names)} missing: {', '.join(missing[:4])}",
                    remedy="fetch the model again, whole",
                )
            )
        return names
    if (folder / SINGLE).exists():
        return (SINGLE,)
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth"))
    remedy = "fetch the model again"
    if pickles:
        remedy = "a pickle can run code and is not read: convert it to safetensors"
    found = ", ".join(pickles) or "no weights at all"
    raise ModelError(
        Problem(
            "E-MODEL-WEIGHTS",
            "the folder holds no safetensors",
            str(folder),
            found,
            f"{SINGLE}, or {INDEX} and its shards",
            remedy,
        )
    )


def read_names(file: Path) -> tuple[str, ...]:
    """Names of the tensors in `file`, whose header must fit its size.

    Raises: ModelError where it is truncated or no safetensors.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return tuple(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(
            Problem(
                "E-MODEL-TORN",
                "a weight file is truncated or damaged",
                str(file),
                f"{error} ({file.stat().st_size:,} bytes)",
                remedy="fetch the model again",
            )
        ) from error


def tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Each weight with its name, read from a memory map: it costs memory where it is copied, not before."""
    for shard in shards(folder):
        with safe_open(folder / shard, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (a handle, not a mapping)
                yield name, opened.get_tensor(name)


def sizes(folder: Path) -> dict[str, int]:
    """Numbers of weights by safetensors' name of their dtype, from the files' headers: {"BF16": 7_721_324_544}."""
    counts: Counter[str] = Counter()
    for shard in shards(folder):
        with safe_open(folder / shard, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (a handle, not a mapping)
                part = opened.get_slice(name)
                counts[part.get_dtype()] += prod(part.get_shape())
    return counts
