"""Which attention a model learns through, and what it is told of a row's documents.

- Ours, `documents_apart`, is registered with transformers as "finetuner"; transformers makes no mask for a name without
  a mask function, so nothing of size T x T exists.
- What it takes beside query, key and value is made once a batch on the host, and copied once, for all layers.
- A model that it cannot serve is told, and goes transformers' own exact way.
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from finetuner.config.model import Attention
from finetuner.errors import ModelError, Problem
from finetuner.model.documents_apart import Documents
from finetuner.model.documents_apart import Unserved as Unserved
from finetuner.model.documents_apart import documents_apart as documents_apart
from finetuner.runtime.log import say

NAME = "finetuner"
PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
"""Module and name of the package that each attention of somebody else's needs."""


def register() -> None:
    """Makes our attention known to transformers."""
    AttentionInterface.register(NAME, documents_apart)


def check_choice(choice: Attention) -> None:
    """Refuses an attention whose package, or device, is not there.

    Raises: ModelError.
    """
    if choice not in PACKAGES:
        return
    module, package = PACKAGES[choice]
    install = (
        'pip install "finetuner[flash]"' if choice == "flash_attention_2" else "build it from flash-attention/hopper"
    )
    if find_spec(module) is None:
        found, remedy = f"{package} is not installed", f'{install}, or attention="auto"'
    elif not torch.cuda.is_available():
        found, remedy = "no CUDA device", 'attention="auto"'
    else:
        return
    what = f"{choice} needs the package {package}, and a GPU"
    raise ModelError(
        Problem("E-ATTENTION-MISSING", what, "model.attention", found, '"auto", "sdpa" or "eager"', remedy)
    )


def attention_for(model: PreTrainedModel, choice: Attention) -> str:
    """The name under which `model` attends: what was chosen, or ours where it can serve the model; says which."""
    if choice == "sdpa" and transformers_own(model) != "sdpa":
        what, found = (
            f"{type(model).__name__} cannot attend through sdpa",
            "soft-capping, or an attention of its own kind",
        )
        remedy = 'attention="eager", or "auto"'
        raise ModelError(Problem("E-ATTENTION-UNFIT", what, "model.attention", found, '"auto", "eager"', remedy))
    if choice != "auto":
        return choice
    reason = unserved(model)
    if reason is None:
        return NAME
    return instead(model, reason)


def instead(model: PreTrainedModel, reason: str) -> str:
    """The attention of transformers that `model` goes through since ours cannot serve it; says so."""
    name = transformers_own(model)
    say(f"attention: transformers' {name}, for {reason}; packed samples are kept apart by their positions")
    return name


def transformers_own(model: PreTrainedModel) -> str:
    """transformers' attention that is right for `model` without flash: "sdpa", or "eager" where that is not served."""
    served = model._supports_sdpa and asked_for(model.config, ("attn_logit_softcapping",)) is None
    return "sdpa" if served else "eager"


def unserved(model: PreTrainedModel) -> str | None:
    """Why our attention cannot serve `model`, or None."""
    if not model._supports_attention_backend:
        return f"{type(model).__name__} does not take another attention"
    if not model._supports_sdpa:
        return f"{type(model).__name__} has an attention of its own kind"
    name = asked_for(model.config, ("attn_logit_softcapping", "attention_chunk_size"))
    if name is not None:
        return f"the model's {name}"
    kinds = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    return f"the model's layers of kind {', '.join(sorted(kinds))}" if kinds else None


def asked_for(config: PreTrainedConfig, names: tuple[str, ...]) -> str | None:
    """The first of `names` that the model's config sets."""
    return next((name for name in names if getattr(config, name, None) is not None), None)


def arguments(name: str, documents: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """What the model's forward takes so that attention `name` keeps `documents` apart; others go by the positions."""
    longest = max(documents)
    if name == NAME:
        borders = borders_of(documents, device) if device.type == "cuda" else None
        return {"documents": Documents(documents, longest, borders)}
    if name in PACKAGES:
        borders = borders_of(documents, device)
        return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}
    return {}


def borders_of(documents: tuple[int, ...], device: torch.device) -> Tensor:
    """(3, 2) -> [0, 3, 5] as int32; from pinned memory, so that the host does not wait for a GPU."""
    pinned = device.type == "cuda"
    ends = torch.tensor(tuple(accumulate(documents, initial=0)), dtype=torch.int32, pin_memory=pinned)
    return ends.to(device, non_blocking=True)
