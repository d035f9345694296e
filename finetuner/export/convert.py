"""`convert`: the state of a checkpoint, whatever ranks wrote it, as a folder that transformers or peft loads.

    the files of the state as the manifest knows them -> masters by name -> the model's, or peft's, own names
    -> config, tokenizer, template as they lie in the checkpoint -> the folder gets its name

- Nothing is started, executed or unpickled, and nothing of the checkpoint's own weights is needed: they may be torn,
  or in another dtype.
- Only where a part of the model was frozen, that part comes from the checkpoint's weights, or from the base.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetuner.config.model import CausalLM
from finetuner.engine import checkpoint
from finetuner.engine.restore import masters
from finetuner.engine.saved import open_state
from finetuner.errors import CheckpointError, ModelError, Problem
from finetuner.model.adapter_file import CONFIG, WEIGHTS
from finetuner.model.folder import find, read_json
from finetuner.model.identity import RECORD, check_base
from finetuner.model.quiet import quiet
from finetuner.model.save import whole
from finetuner.model.soundness import not_finite, some
from finetuner.model.weights import read_hf_config
from finetuner.runtime.commit import MANIFEST, commit_dir, read_manifest, sweep, verify
from finetuner.runtime.log import say, warn
from finetuner.runtime.manifest import sha256_of

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PICKLES = ("*.pt", "*.bin", "*.pth", "*.distcp", "global_step*", "*/*.pt", "*/*.distcp")
"""What DeepSpeed, torch and FSDP write of their own accord."""


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written."""

    checkpoint: Path
    kind: str
    """"model" or "adapter"."""
    tensors: int
    """From the state."""
    dtype: str


def convert(path: Path, out: Path, *, base: str | None = None, dtype: str | None = None) -> Converted:
    """Writes to `out`, or nothing; `path` is a checkpoint or a run's folder, `base` where frozen parts may come from.

    Raises: ModelError, CheckpointError.
    """
    check_out(out)
    folder = with_state(path.expanduser())
    check_files(folder)
    values = masters(open_state(folder / "state"))
    adapted = (folder / CONFIG).exists()
    kind = "adapter" if adapted else "model"
    with commit_dir(out, meta={"kind": "converted", "checkpoint": str(folder)}) as temporary:
        beside(folder, temporary)
        if adapted:
            result = write_adapter(values, temporary, DTYPES[dtype or "float32"])
        else:
            result = write_model(folder, values, temporary, DTYPES[dtype] if dtype else None, base)
    return Converted(folder, kind, len(values), str(result).removeprefix("torch."))


def check_out(out: Path) -> None:
    """Refuses a place that holds something other than an earlier conversion.

    Raises: ModelError.
    """
    sweep(out.parent)
    held = sorted(file.name for file in out.iterdir())[:6] if out.is_dir() else ["a file"] * out.exists()
    if held and (verify(out, contents=False) or read_manifest(out)["meta"].get("kind") != "converted"):
        what, fits, remedy = "there is something at the place to write to", "a new or empty folder", "give another OUT"
        raise ModelError(Problem("E-OUT-EXISTS", what, str(out), ", ".join(held), fits, remedy))


def with_state(path: Path) -> Path:
    """The checkpoint at `path`, or the newest of the run there that is complete.

    Raises: ModelError, E-CONVERT-PICKLE or E-CONVERT-NOTHING.
    """
    if (path / "state").is_dir():
        return path
    if complete := checkpoint.complete(path):
        return complete[0]
    inside = sorted(entry.name for entry in path.iterdir())[:6] if path.is_dir() else []
    pickles = sorted({found.name for pattern in PICKLES for found in path.glob(pattern)}) if path.is_dir() else []
    if pickles:
        what, fits = "these are pickles, which can run code and are not read", "a checkpoint that finetuner wrote"
        remedy = (
            "write safetensors with the program that made them, where you trust them: DeepSpeed puts zero_to_fp32.py "
            "beside its checkpoints (FOLDER OUT --safe_serialization)"
        )
        raise ModelError(Problem("E-CONVERT-PICKLE", what, str(path), some(pickles), fits, remedy))
    what, fits = "there is no state to convert", "a checkpoint (checkpoint-N, with its state/), or a run's folder"
    found = ", ".join(inside) or ("nothing" if path.is_dir() else "no folder")
    raise ModelError(Problem("E-CONVERT-NOTHING", what, str(path), found, fits, "give a checkpoint's folder"))


def check_files(folder: Path) -> None:
    """Refuses a state, or files beside the weights, other than those that were written; torn weights are told.

    Raises: CheckpointError, E-CHECKPOINT-TORN.
    """
    if not (folder / MANIFEST).exists():
        warn(f"{folder} has no {MANIFEST}: it was not written to its end, and what is there cannot be checked")
        return
    torn = []
    for name, entry in read_manifest(folder)["files"].items():
        path = folder / name
        fits = path.is_file() and path.stat().st_size == entry["size"] and sha256_of(path) == entry["sha256"]
        if not fits and is_weights(name):
            warn(f"{name} is torn or missing; it is made anew from the state")
        elif not fits:
            torn.append(name)
    if torn:
        what, fits_ = "files of the checkpoint are not those that were written", "files as its manifest knows them"
        remedy = "convert another checkpoint of the run"
        raise CheckpointError(Problem("E-CHECKPOINT-TORN", what, str(folder), some(torn), fits_, remedy))


def beside(folder: Path, out: Path) -> None:
    """Copies config, tokenizer, template, and the record of what was trained."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.is_symlink() and file.name != MANIFEST and not is_weights(file.name):
            shutil.copyfile(file, out / file.name)


def is_weights(name: str) -> bool:
    """Whether a file beside the state holds, or lists, weights."""
    return "/" not in name and (name.endswith((".safetensors", ".safetensors.index.json")))


def write_adapter(values: Mapping[str, Tensor], out: Path, dtype: torch.dtype) -> torch.dtype:
    """The adapter's weights under peft's names.

    Raises: ModelError where one is not finite.
    """
    held = {adapter_name(name): value.to(dtype) for name, value in values.items()}
    if wrong := not_finite(held.items()):
        what, remedy = f"adapter weights are no finite numbers in {dtype}", "leave --dtype out"
        raise ModelError(Problem("E-SAVE-NAN", what, str(out), some(wrong), remedy=remedy))
    save_file(held, out / WEIGHTS, metadata={"format": "pt"})
    return dtype


def adapter_name(name: str) -> str:
    """The name in peft's file: ...lora_A.default.weight -> ...lora_A.weight."""
    plain = name.replace(".modules_to_save.default.", ".").replace(".default.", ".").removesuffix(".default")
    # peft/utils/save_and_load.py: DoRA's magnitude was no module once, and its file keeps the name of then.
    return plain.removesuffix(".weight") if plain.endswith(".lora_magnitude_vector.weight") else plain


def write_model(
    folder: Path, values: Mapping[str, Tensor], out: Path, dtype: torch.dtype | None, base: str | None
) -> torch.dtype:
    """The whole model, by transformers' own names of its files; in the checkpoint's dtype where none is given.

    Raises: ModelError.
    """
    config = read_hf_config(folder, CausalLM(str(folder)))
    named = DTYPES[str(read_json(folder / "config.json").get("dtype", "float32"))]
    with torch.device("meta"), quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    own = model.state_dict(keep_vars=True)
    if unknown := sorted(values.keys() - own.keys()):
        what, remedy = "the state holds weights that its config's model does not have", "convert another checkpoint"
        raise ModelError(Problem("E-CONVERT-NAMES", what, str(folder), some(unknown), remedy=remedy))
    trained = {id(own[name]) for name in values}
    if frozen := [name for name, tensor in own.items() if id(tensor) not in trained]:
        model = with_frozen(folder, base, named, frozen)
    whole(model, out, dtype or named, values)
    return dtype or named


def with_frozen(folder: Path, base: str | None, dtype: torch.dtype, frozen: list[str]) -> PreTrainedModel:
    """The model as it was saved, or its base, for what did not train.

    Raises: ModelError.
    """
    record = read_json(folder / RECORD) if (folder / RECORD).exists() else {}
    torn = verify(folder) if (folder / MANIFEST).exists() else "no manifest"
    source: Path = folder
    if torn or base is not None:
        if base is None and record.get("base") is None:
            what, remedy = "a part of the model did not train, and its weights are not whole", "--base FOLDER"
            raise ModelError(Problem("E-CONVERT-BASE", what, str(folder), f"{torn}; {some(frozen)}", remedy=remedy))
        source = find(base or str(record["base"]), "model")
        check_base(folder, source)
    say(f"{len(frozen)} tensors did not train; they come from {source}")
    with quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
    return model
