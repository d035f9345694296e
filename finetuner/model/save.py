"""A learner -> a folder that plain transformers, or plain peft, loads.

- Float32 masters are cast to the dtype of the model that training began with; ties stay ties.
- Config and tokenizer are written for older readers too: see `portable.py`.
- A folder can be written by another thread while training goes on: of what trains it takes the values that it is
  given, of what answering changes the state at which `still` was called.
- The token that ends an answer travels in generation_config.json, so that others stop where training stopped.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from finetuner.errors import ModelError, Problem
from finetuner.model.folder import read_json
from finetuner.model.portable import all_ends, portable_config, write_json, write_tokenizer
from finetuner.model.quiet import quiet
from finetuner.model.soundness import not_finite, some
from finetuner.model.tokenizer import stop_ids


def changing(model: nn.Module, *, adapted: bool) -> dict[str, Tensor]:
    """What training may change of what is saved, by name: trained parameters and the buffers saved along with them."""
    buffers = dict(model.named_buffers())
    if adapted:
        saved = {name: buffer for name, buffer in buffers.items() if ".modules_to_save." in name}
    else:
        saved = {name: tensor for name, tensor in model.state_dict().items() if name in buffers}
    return saved | {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def still(model: Any, *, adapted: bool) -> Any:
    """The model with configs of its own, for `whole` or `adapter`: what answering changes meanwhile is not seen there.

    Everything else it shares with `model`, which is not touched.
    """
    twin = copy.copy(model)
    if adapted:
        twin._modules = {**model._modules, "base_model": copy.copy(model.base_model)}
        # No deep copies: they would shuffle the sets that adapter_config.json lists.
        twin.base_model.peft_config = {name: copy.copy(own) for name, own in model.base_model.peft_config.items()}
    else:
        twin.config, twin.generation_config = copy.deepcopy(model.config), GenerationConfig()
    return twin


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the model's folder, by name: the parameters themselves, a tied one under each of its names."""
    own: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return own


def whole(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    values: Mapping[str, Tensor],
    own: Mapping[str, Tensor] | None = None,
) -> None:
    """The weights in `dtype`, and the config, of a model that `still` gave; of what trains the `values`, by name.

    `own` are its `own_tensors`. In another thread than training's they must be given: to ask a model that FSDP shards
    for them lets go what the training has gathered.

    Raises: ModelError where a weight is no finite number, or too large for `dtype`.
    """
    # By identity ties are told: shards of a model, and one without memory, have no addresses.
    own = own_tensors(model) if own is None else own
    given = {id(own[name]): value for name, value in values.items()}
    cast: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in own.items():
        if id(tensor) not in cast:
            value = given.get(id(tensor), tensor.detach())
            if value.numel() == 0 or value.is_meta:
                what, remedy = f"the weights are not here as a whole: {name}", "gather what ranks hold in shards"
                raise ModelError(
                    Problem("E-SAVE-EMPTY", what, str(folder), f"shape {list(value.shape)}", remedy=remedy)
                )
            cast[id(tensor)] = value.to("cpu", dtype if value.is_floating_point() else None)
        state[name] = cast[id(tensor)]
    wrong = not_finite(state.items())
    if wrong:
        what = "weights are no finite numbers, or none that fit the model's dtype; nothing is saved"
        remedy = "start from a bfloat16 or float32 copy of the model" if dtype == torch.float16 else "lower optim.lr"
        raise ModelError(Problem("E-SAVE-NAN", what, str(folder), f"{dtype}: {some(wrong)}", remedy=remedy))
    with quiet():
        model.save_pretrained(folder, state_dict=state)
    # transformers notes the masters' float32
    write_json(folder / "config.json", portable_config(read_json(folder / "config.json"), dtype))


def adapter(model: Any, folder: Path, values: Mapping[str, Tensor]) -> None:
    """The adapter's float32 weights, which are `values`, and its config, by peft; `model` is one that `still` gave.

    Raises: ModelError where a weight is no finite number.
    """
    wrong = not_finite(values.items())
    if wrong:
        what = "adapter weights are no finite numbers; nothing is saved"
        raise ModelError(Problem("E-SAVE-NAN", what, str(folder), some(wrong), remedy="lower optim.lr"))
    with quiet():
        model.save_pretrained(folder, state_dict=dict(values), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a form that peft leaves to be filled in


def beside(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, bytes]:
    """The files beside the weights, by name: tokenizer, template, generation config."""
    with tempfile.TemporaryDirectory(prefix="finetuner-") as folder:
        generation(model, tokenizer, Path(folder))
        write_tokenizer(tokenizer, [Path(tokenizer.name_or_path)], Path(folder))
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """generation_config.json as the base has it, with every id that ends an answer."""
    values = GenerationConfig(**(model.generation_config.to_dict() if model.generation_config else {}))
    values.eos_token_id = all_ends(stop_ids(tokenizer), values.eos_token_id)
    # Not save_pretrained: it refuses the contradictions that many models' own files hold. Nor may the file say that it
    # came of config.json: transformers would then make it again from there, and lose the ends.
    written = {name: value for name, value in values.to_diff_dict().items() if name != "_from_model_config"}
    write_json(folder / "generation_config.json", written)


def readable(folder: Path) -> None:
    """Lets others read the files: safetensors writes them for their owner alone."""
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(0o644)
