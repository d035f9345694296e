"""The attention in which packed documents do not see each other, registered with transformers as "finetuner".

- The lengths of a row's documents travel through the model's forward as keyword arguments (`documents`); transformers
  makes no mask for a name without a mask function, so nothing of size T x T exists.
- CUDA half precision takes torch's varlen kernel; everything else one causal SDPA a document, which is exact on every
  device and, in 2048 tokens on a CPU, five times as fast as one SDPA under a dense mask.
- It is for training rows. Generation, with its cache and its masks, runs on "sdpa" or "eager": see
  `CausalLearner.answering`.

Shapes: H query heads, G key/value heads, T tokens of the row, L of one document, D a head's size.
"""

from __future__ import annotations

import inspect
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from finetuner.config.model import Attention
from finetuner.errors import ModelError, Problem
from finetuner.runtime.log import say

NAME = "finetuner"
UNSERVED = ("softcap", "s_aux", "position_bias", "cache")
"""Keyword arguments by which a model asks for an attention that this one is not."""


def register() -> None:
    """Makes the attention known to transformers."""
    AttentionInterface.register(NAME, documents_apart)


def documents_apart(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    documents: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of each token to itself and the earlier ones of its document: (1, T, H, D)."""
    assert documents is not None, "no lengths of documents: a model generates inside CausalLearner.answering()"
    asked = [name for name in UNSERVED if kwargs.get(name) is not None]
    assert attention_mask is None, "this attention has no mask"
    assert not asked, f"this attention has no {asked}"
    assert sum(documents) == query_1HTD.shape[2] == key_1GTD.shape[2], "documents fill the row; there is no cache"
    window = sliding_window if sliding_window is not None and sliding_window < max(documents) else None
    halves = query_1HTD.dtype in (torch.bfloat16, torch.float16)
    if query_1HTD.is_cuda and halves and dropout == 0.0 and (len(documents) > 1 or window is not None):
        return by_kernel(query_1HTD, key_1GTD, value_1GTD, documents, window, scaling), None
    return by_document(query_1HTD, key_1GTD, value_1GTD, documents, window, scaling, dropout), None


def by_document(
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    documents: tuple[int, ...],
    window: int | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """One SDPA a document."""
    grouped = query_1HTD.shape[1] != key_1GTD.shape[1]
    parts = []
    for q_1HLD, k_1GLD, v_1GLD in zip(
        *(torch.split(x, list(documents), 2) for x in (query_1HTD, key_1GTD, value_1GTD))
    ):
        length = q_1HLD.shape[2]
        mask_LL = band(length, window, q_1HLD.device) if window is not None and window < length else None
        out = F.scaled_dot_product_attention(
            q_1HLD,
            k_1GLD,
            v_1GLD,
            attn_mask=mask_LL,
            dropout_p=dropout,
            is_causal=mask_LL is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        parts.append(out)
    return torch.cat(parts, 2).transpose(1, 2).contiguous()


def band(length: int, window: int, device: torch.device) -> Tensor:
    """Which keys a token sees: itself and the `window - 1` before it."""
    place = torch.arange(length, device=device)
    back_LL = place[:, None] - place[None, :]
    return (back_LL >= 0) & (back_LL < window)


def by_kernel(
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    documents: tuple[int, ...],
    window: int | None,
    scaling: float | None,
) -> Tensor:
    """torch's varlen kernel, for all documents at once."""
    from torch.nn.attention.varlen import varlen_attn

    query_THD, key_TGD, value_TGD = (x[0].transpose(0, 1) for x in (query_1HTD, key_1GTD, value_1GTD))
    parameters = varlen_parameters()
    options: dict[str, Any] = {"scale": scaling} if "scale" in parameters else {}
    if query_THD.shape[1] != key_TGD.shape[1]:
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True
        else:  # torch 2.11 has no grouped heads here
            times = query_THD.shape[1] // key_TGD.shape[1]
            key_TGD, value_TGD = (x.repeat_interleave(times, 1) for x in (key_TGD, value_TGD))
    borders, longest = borders_of(documents, query_THD.device), max(documents)
    options["window_size"] = (-1 if window is None else window - 1, 0)
    out_THD = varlen_attn(query_THD, key_TGD, value_TGD, borders, borders, longest, longest, **options)
    assert isinstance(out_THD, Tensor)
    return out_THD.unsqueeze(0)


@cache
def varlen_parameters() -> frozenset[str]:
    """Names of the kernel's parameters in this torch."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


_borders: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def borders_of(documents: tuple[int, ...], device: torch.device) -> Tensor:
    """(3, 2) -> [0, 3, 5] as int32, kept for the layers of one row: a copy to the device at each would wait for it."""
    key = (documents, device)
    if key not in _borders:
        _borders.clear()
        ends = torch.tensor((0, *documents), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        _borders[key] = ends.to(device, non_blocking=True)
    return _borders[key]


def check_choice(choice: Attention) -> None:
    """Refuses an attention whose package is not there.

    Raises: ModelError.
    """
    if choice == "flash_attention_2" and find_spec("flash_attn") is None:
        raise ModelError(
            Problem(
                "E-ATTENTION-MISSING",
                "flash_attention_2 needs the package flash-attn",
                "model.attention",
                "flash-attn is not installed",
                '"auto", "sdpa" or "eager"',
                'pip install "finetuner[flash]", or attention="auto"',
            )
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


def arguments(name: str, documents: tuple[int, ...]) -> dict[str, Any]:
    """What the model's forward takes so that attention `name` keeps `documents` apart; others go by the positions."""
    if name == NAME:
        return {"documents": documents}
    if name == "flash_attention_2":
        borders, longest = borders_of(documents, torch.device("cuda", torch.cuda.current_device())), max(documents)
        return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}
    return {}
