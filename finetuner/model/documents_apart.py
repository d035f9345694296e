"""`documents_apart`: the attention in which packed documents do not see each other.

- The documents of a row reach it through the model's forward as one keyword argument, a value: see `Documents`.
- CUDA half precision takes torch's varlen kernel; everything else one causal SDPA for each run of documents of one
  length, which is exact on every device and, in 2048 tokens on a CPU, five times as fast as one under a dense mask.
- It is for training rows. Generation, with its cache and its masks, runs on "sdpa" or "eager": see
  `CausalLearner.answering`.
- A model that asks for another attention than this one is told so by `Unserved`, at the latest when it is tried out.

Shapes: H query heads, G key/value heads, T tokens of the row, N documents of L tokens, D a head's size, E a value's.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetuner.model.sizes import missing

UNSERVED = ("softcap", "s_aux", "position_bias", "cache")
"""Keyword arguments by which a model asks for an attention that this one is not."""
LARGEST_HEAD = 256
"""Of the varlen kernel (FlashAttention-2), whose head sizes are multiples of 8."""
PIECE = 256
"""Queries that look back through a window at once, at the least: smaller pieces are many small products."""


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """The documents of a row, made once a batch for all layers: (3, 2) -> lengths (3, 2), longest 3, borders [0, 3, 5].

    One value, and not its parts, since torch.compile makes a layer anew for other numbers that it sees.
    """

    lengths: tuple[int, ...]
    longest: int
    borders: Tensor | None = None
    """int32, on the device of the row; None where there is no kernel that takes them."""


class Unserved(Exception):
    """The model asks for an attention that this one is not; the message says which."""


def documents_apart(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTE: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of each token to itself and the earlier ones of its document: (1, T, H, E)."""
    if documents is None:
        raise Unserved("no documents reach its attention (to generate, use CausalLearner.answering)")
    refuse_others(module, attention_mask, kwargs)
    assert sum(documents.lengths) == query_1HTD.shape[2] == key_1GTD.shape[2], (
        "documents fill the row; there is no cache"
    )
    kind = query_1HTD.device.type
    if torch.is_autocast_enabled(kind):
        # As SDPA does by itself, and the kernel does not: beside float32 norms or rotations, a query is float32 still.
        dtype = torch.get_autocast_dtype(kind)
        query_1HTD, key_1GTD, value_1GTE = (x.to(dtype) for x in (query_1HTD, key_1GTD, value_1GTE))
    row = (query_1HTD, key_1GTD, value_1GTE)
    window = sliding_window if sliding_window is not None and sliding_window < documents.longest else None
    halves = query_1HTD.dtype in (torch.bfloat16, torch.float16)
    many = len(documents.lengths) > 1 or window is not None
    if documents.borders is None or not (halves and many) or dropout > 0.0 or kernel_head(*row) > LARGEST_HEAD:
        return by_document(*row, documents.lengths, window, scaling, dropout), None
    return by_kernel(*row, documents.borders, documents.longest, window, scaling), None


def refuse_others(module: nn.Module, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Raises: Unserved where the model wants more than causal attention in documents."""
    if attention_mask is not None:
        raise Unserved("a mask of its own")
    for name in UNSERVED:
        if kwargs.get(name) is not None:
            raise Unserved(f"the model's {name}")
    own = getattr(module, "is_causal", None) if kwargs.get("is_causal") is None else kwargs["is_causal"]
    if own is False:
        raise Unserved("attention to later tokens")


def by_document(
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTE: Tensor,
    documents: tuple[int, ...],
    window: int | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """One SDPA for each run of documents of one length: (1, T, H, E).

    Equal lengths lie beside each other in a pack (`data.pack` lays the longest first).
    """
    if needs_all_heads(query_1HTD, key_1GTD, window):
        times = query_1HTD.shape[1] // key_1GTD.shape[1]
        key_1GTD, value_1GTE = key_1GTD.repeat_interleave(times, 1), value_1GTE.repeat_interleave(times, 1)
    row = (query_1HTD, key_1GTD, value_1GTE)
    filled = tuple(length + gap(length, query_1HTD, window, dropout) for length in documents)
    parts, first = [], 0
    for size, same in groupby(filled):
        lengths = documents[first : first + len(list(same))]
        start = sum(documents[:first])
        q_NHLD, k_NGLD, v_NGLE = (run_of(x[0, :, start : start + sum(lengths)], lengths, size) for x in row)
        if window is None or window >= size:
            out_NHLE = sdpa(q_NHLD, k_NGLD, v_NGLE, None, scaling, dropout)
        else:
            out_NHLE = by_window(q_NHLD, k_NGLD, v_NGLE, window, scaling, dropout)
        parts += laid_out(out_NHLE.transpose(1, 2), lengths)
        first += len(lengths)
    return torch.cat(parts).unsqueeze(0)


def gap(length: int, query: Tensor, window: int | None, dropout: float) -> int:
    """Places that a document is filled up by, behind its last token, which no earlier one sees (`sizes.py`)."""
    return 0 if dropout > 0.0 or window is not None else missing(length, query.device, query.dtype)


def run_of(x_HTD: Tensor, lengths: tuple[int, ...], size: int) -> Tensor:
    """Documents that lie one after another, each filled up to `size`: (N, H, L, D). A view, where none is filled."""
    if sum(lengths) == size * len(lengths):
        return x_HTD.reshape(x_HTD.shape[0], len(lengths), size, -1).transpose(0, 1)
    return torch.stack([F.pad(part, (0, 0, 0, size - part.shape[1])) for part in torch.split(x_HTD, list(lengths), 1)])


def laid_out(out_NLHE: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """The documents one after another again, each of its own length."""
    if sum(lengths) == out_NLHE.shape[0] * out_NLHE.shape[1]:
        return [out_NLHE.flatten(0, 1)]
    return [out_LHE[:length] for out_LHE, length in zip(out_NLHE, lengths, strict=True)]


def needs_all_heads(query_1HTD: Tensor, key_1GTD: Tensor, window: int | None) -> bool:
    """Whether SDPA would make whole L x L scores for grouped heads: on CUDA only its half-precision kernel without a
    mask knows them (torch's `sdp_utils.cpp`)."""
    grouped = query_1HTD.shape[1] != key_1GTD.shape[1]
    return grouped and query_1HTD.is_cuda and (query_1HTD.dtype == torch.float32 or window is not None)


def by_window(
    query_NHLD: Tensor, key_NGLD: Tensor, value_NGLE: Tensor, window: int, scaling: float | None, dropout: float
) -> Tensor:
    """Documents longer than `window`, some queries after others: the mask is of two windows at most, not L x L."""
    length, size = query_NHLD.shape[2], max(window, PIECE)
    parts = []
    for start in range(0, length, size):
        stop, first = min(start + size, length), max(0, start - window + 1)
        mask = band(start, stop, first, window, query_NHLD.device)
        keys_NGKD, values_NGKE = key_NGLD[:, :, first:stop], value_NGLE[:, :, first:stop]
        parts.append(sdpa(query_NHLD[:, :, start:stop], keys_NGKD, values_NGKE, mask, scaling, dropout))
    return torch.cat(parts, 2)


def sdpa(
    query_NHLD: Tensor, key_NGKD: Tensor, value_NGKE: Tensor, mask_LK: Tensor | None, scaling: float | None,
    dropout: float,
) -> Tensor:  # fmt: skip
    """torch's attention, causal where no mask says more."""
    options: dict[str, Any] = {"scale": scaling, "enable_gqa": query_NHLD.shape[1] != key_NGKD.shape[1]}
    return F.scaled_dot_product_attention(
        query_NHLD, key_NGKD, value_NGKE, mask_LK, dropout, is_causal=mask_LK is None, **options
    )


def band(start: int, stop: int, first: int, window: int, device: torch.device) -> Tensor:
    """Which keys `first:stop` the queries `start:stop` see: each itself and the `window - 1` before it."""
    back_LK = torch.arange(start, stop, device=device)[:, None] - torch.arange(first, stop, device=device)[None, :]
    return (back_LK >= 0) & (back_LK < window)


def kernel_head(query_1HTD: Tensor, key_1GTD: Tensor, value_1GTE: Tensor) -> int:
    """The size of a head that the kernel is given: one for query, key and value, a multiple of 8."""
    return -(-max(query_1HTD.shape[-1], value_1GTE.shape[-1]) // 8) * 8


def by_kernel(
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTE: Tensor,
    borders: Tensor,
    longest: int,
    window: int | None,
    scaling: float | None,
) -> Tensor:
    """torch's varlen kernel, for all documents at once: (1, T, H, E). Heads of other sizes are filled up with zeros."""
    from torch.nn.attention.varlen import varlen_attn

    size = kernel_head(query_1HTD, key_1GTD, value_1GTE)
    query_THD, key_TGD, value_TGD = (widened(x[0].transpose(0, 1), size) for x in (query_1HTD, key_1GTD, value_1GTE))
    options: dict[str, Any] = {"scale": query_1HTD.shape[-1] ** -0.5 if scaling is None else scaling}
    if query_THD.shape[1] != key_TGD.shape[1]:
        if "enable_gqa" in varlen_parameters():
            options["enable_gqa"] = True
        else:  # torch 2.11 has no grouped heads here
            times = query_THD.shape[1] // key_TGD.shape[1]
            key_TGD, value_TGD = (x.repeat_interleave(times, 1) for x in (key_TGD, value_TGD))
    options["window_size"] = (-1 if window is None else window - 1, 0)
    out_THD = varlen_attn(query_THD, key_TGD, value_TGD, borders, borders, longest, longest, **options)
    assert isinstance(out_THD, Tensor)
    return out_THD[..., : value_1GTE.shape[-1]].unsqueeze(0)


def widened(x_THD: Tensor, size: int) -> Tensor:
    """With zeros up to `size`."""
    return x_THD if x_THD.shape[-1] == size else F.pad(x_THD, (0, size - x_THD.shape[-1]))


@cache
def varlen_parameters() -> frozenset[str]:
    """Names of the kernel's parameters in this torch."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)
