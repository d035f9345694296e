"""A folder or a hub name -> a model that answers: checkpoint, run, adapter, merged or pretrained model.

    what is it? -> where is its base? -> tokenizer, template -> weights (NF4 if asked) -> adapter -> stop tokens

- Template, stop tokens and generation config are the folder's own.
- No code in a folder is executed; only safetensors are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from finetuner.config.model import NF4, CausalLM, Compute, LoRA
from finetuner.errors import CheckpointError, ModelError, Problem
from finetuner.generate.answer import Answer, answer
from finetuner.generate.stops import stop_ids
from finetuner.model.adapter_file import CONFIG, WEIGHTS, holds_matrices
from finetuner.model.folder import find, model_folder, read_json
from finetuner.model.identity import check_base
from finetuner.model.quiet import quiet
from finetuner.model.tokenizer import load_tokenizer, read_tokenizer, vocabulary_size
from finetuner.model.weights import load_weights, stored_dtype
from finetuner.runtime.commit import MANIFEST, read_manifest, verify
from finetuner.runtime.log import say, warn

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class Answerer:
    """A model that answers, in the template and with the stop tokens of its folder."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    stops: tuple[int, ...]
    name: str
    """What was loaded, in words."""

    def ask(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stream: Callable[[str], None] | None = None,
    ) -> Answer:
        """The next turn of `messages`: see `answer`."""
        return answer(self.model, self.tokenizer, messages, max_tokens=max_tokens, stops=self.stops,
                      temperature=temperature, top_p=top_p, seed=seed, stream=stream)  # fmt: skip


def load_for_chat(
    path: str,
    *,
    base: str | None = None,
    quant: Literal["nf4"] | None = None,
    template: str | None = None,
    device: str = "auto",
    dtype: Compute | None = None,
) -> Answerer:
    """The model at `path`, ready to answer. `dtype` None: as the weights are stored.

    Raises: ModelError, CheckpointError.
    """
    loaded = load_model(path, base=base, quant=quant, template=template, device=device, dtype=dtype, chats=True)
    stops = stop_ids(loaded.tokenizer, loaded.causal.generation_config)
    kind = f"adapter of {loaded.weights}" if loaded.adapted else "model"
    name = f"{loaded.folder} ({kind}{', in 4 bits' if quant else ''})"
    return Answerer(loaded.model, loaded.tokenizer, stops, name)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory, with its adapter if there is one."""

    model: nn.Module
    causal: PreTrainedModel
    """transformers' model in it."""
    tokenizer: PreTrainedTokenizerFast
    folder: Path
    weights: str
    """Folder or hub name of the weights: the base's, under an adapter."""
    adapted: bool
    new_ids: tuple[int, ...]
    """Tokens that the adapter added to the base's vocabulary."""


def load_model(
    path: str,
    *,
    base: str | None = None,
    quant: Literal["nf4"] | None = None,
    template: str | None = None,
    device: str = "auto",
    dtype: Compute | None = None,
    chats: bool,
) -> Loaded:
    """The model at `path` in evaluation mode; `chats` says whether it needs a chat template.

    Raises: ModelError, CheckpointError.
    """
    folder = model_place(path)
    adapter = read_json(folder / CONFIG) if (folder / CONFIG).exists() else None
    if adapter is None and base is not None:
        raise ModelError(Problem("E-CHAT-BASE", "a whole model has no base", str(folder), f"--base {base}",
                                 remedy="leave --base out"))  # fmt: skip
    weights = str(folder) if adapter is None else base_of(folder, adapter, base)
    if adapter is not None:
        check_base(folder, model_folder(CausalLM(weights)))
    has_tokenizer = any((folder / name).exists() for name in TOKENIZER_FILES)
    # An adapter in name only: weights beside one do not train, and are held in the dtype that is computed in.
    source = CausalLM(weights, adapter=LoRA(), quant=NF4() if quant else None, template=template,
                      tokenizer=str(folder) if adapter is not None and has_tokenizer else None,
                      dtype=dtype or stored(weights))  # fmt: skip
    tokenizer = load_tokenizer(source)
    if chats and not tokenizer.chat_template:
        raise ModelError(
            Problem("E-TEMPLATE-NONE", "the folder has no chat template", str(folder), fits="a bundled name or a file",
                    remedy="--template NAME, such as --template chatml")
        )  # fmt: skip
    new_ids = added_ids(weights, tokenizer, folder)
    causal = load_weights(source, tokenizer, vocabulary_size(tokenizer), new_ids, torch_device(device))
    if (folder / "generation_config.json").exists():
        with quiet():
            causal.generation_config = GenerationConfig.from_pretrained(folder)
    model: nn.Module = causal
    if adapter is not None:
        from finetuner.model.adapter import load_adapter  # peft costs seconds

        model = load_adapter(causal, folder)
    model.eval()
    return Loaded(model, causal, tokenizer, folder, weights, adapter is not None, new_ids)


def model_place(path: str) -> Path:
    """The folder that holds a model or an adapter: `path` itself, the last checkpoint of a run, or the hub's copy."""
    given = Path(path).expanduser()
    if not given.is_dir():
        return find(path, "model")
    holds = [name for name in (CONFIG, "config.json") if (given / name).exists()]
    if not any(given.glob("*.safetensors")) and any(given.glob("checkpoint-*")):
        return last_checkpoint(given)
    if not holds:
        raise ModelError(
            Problem("E-CHAT-FOLDER", "the folder holds no model", str(given),
                    ", ".join(sorted(file.name for file in given.iterdir())[:8]) or "nothing",
                    "a run's folder, a checkpoint, an adapter, or a model (config.json, *.safetensors)",
                    "give one of these, or a hub name")
        )  # fmt: skip
    broken = verify(given, contents=False) if (given / MANIFEST).exists() else None
    if broken:
        raise CheckpointError(Problem("E-CHECKPOINT-TORN", "the folder is not complete", str(given), broken,
                                      remedy="give another checkpoint of the run"))  # fmt: skip
    return given


def last_checkpoint(run: Path) -> Path:
    """The run's newest complete checkpoint; those passed over are told. Another run's, by its manifest, is none."""
    numbered = {int(p.name[11:]): p for p in run.glob("checkpoint-*") if p.name[11:].isdecimal() and p.is_dir()}
    own = read_json(run / "run.json").get("id") if (run / "run.json").exists() else None
    for _, checkpoint in sorted(numbered.items(), reverse=True):
        broken = verify(checkpoint, contents=False)
        if broken is None and own is not None and read_manifest(checkpoint)["meta"].get("run") != own:
            broken = "it is another run's"
        if broken is None:
            say(f"the last checkpoint of this run: {checkpoint}")
            return checkpoint
        warn(f"passing over {checkpoint.name}: {broken}")
    raise CheckpointError(Problem("E-CHECKPOINT-NONE", "the run has no complete checkpoint", str(run),
                                  remedy="train on: finetuner train CONFIG"))  # fmt: skip


def base_of(folder: Path, adapter: Mapping[str, Any], base: str | None) -> str:
    """Where the base of the adapter in `folder` is: the one given, or the one that the adapter names."""
    named = str(adapter.get("base_model_name_or_path") or "")
    if base is not None:
        if named and Path(named).name != Path(base).name:
            warn(f"the adapter was trained on {named}; it is put onto {base}")
        return base
    if not named or (named.startswith(("/", ".", "~")) and not Path(named).expanduser().is_dir()):
        raise ModelError(
            Problem("E-CHAT-BASE", "the adapter's base is not where it was", str(folder), named or "no base named",
                    "the folder or hub name of the model that it was trained on", "--base FOLDER")
        )  # fmt: skip
    return named


def added_ids(weights: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> tuple[int, ...]:
    """Ids of the tokens that the training of the adapter in `folder`, if there is one, added to the base's: those whose
    rows trained, or, where whole matrices lie in its file, those that the base's tokenizer does not have."""
    if not (folder / CONFIG).exists():
        return ()
    adapter = read_json(folder / CONFIG)
    rows = adapter.get("trainable_token_indices") or {}
    listed = [i for numbers in rows.values() for i in numbers] if isinstance(rows, dict) else list(rows)
    if not listed and holds_matrices(folder / WEIGHTS):
        known = vocabulary_size(read_tokenizer(CausalLM(weights)))
        listed = list(range(known, vocabulary_size(tokenizer)))
    return tuple(sorted({int(number) for number in listed}))


def stored(weights: str) -> Compute:
    """What to compute in: float32 for weights stored so, bfloat16 for others."""
    dtype = stored_dtype(model_folder(CausalLM(weights)))
    if dtype not in (torch.float32, torch.bfloat16):
        say(f"the weights are stored in {dtype}; computing in bfloat16")
    return "float32" if dtype == torch.float32 else "bfloat16"


def torch_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError(Problem("E-DEVICE", "there is no CUDA device", "--device", "cuda", "cpu", "--device cpu"))
    return torch.device(name)
