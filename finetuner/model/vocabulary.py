"""Rows for new tokens in the embedding and the head.

- A new row is the mean of the old tokens' rows, exactly; old rows keep their bits; ties stay ties; nothing shrinks.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from finetuner.errors import ModelError, Problem
from finetuner.model.shards import shape_of

MULTIPLE = 8
"""To which a matrix that grows is padded, for the tensor cores' sake."""


def fit_vocabulary(model: PreTrainedModel, vocabulary: int, new_ids: tuple[int, ...]) -> None:
    """Gives `model` a row for each of the tokenizer's `vocabulary` ids, of which `new_ids` were added by the config.

    Raises: ModelError where ids that were not added have no row: the tokenizer is another model's.
    """
    embedding = model.get_input_embeddings()
    rows = shape_of(embedding.weight)[0]
    known = min(new_ids, default=vocabulary)
    check_rows(known, rows)
    if not new_ids:
        return
    matrices = [embedding]
    head = model.get_output_embeddings()
    if vocabulary > rows:
        padded = -(-vocabulary // MULTIPLE) * MULTIPLE
        model.resize_token_embeddings(padded, mean_resizing=False)
        matrices = [model.get_input_embeddings()]
        head = model.get_output_embeddings()
    if head is not None and head.weight is not matrices[0].weight:
        matrices.append(head)
    fresh = sorted({*new_ids, *range(max(rows, known), matrices[0].weight.shape[0])})
    for matrix in matrices:
        start_from_mean(matrix, known, fresh)


def check_rows(known: int, rows: int) -> None:
    """Refuses a tokenizer with `known` ids, beside those that were added, for an embedding of `rows` rows."""
    if known > rows:
        raise ModelError(
            Problem(
                "E-VOCABULARY",
                "the tokenizer has tokens for which the model has no row",
                "model.tokenizer",
                f"{known} ids; the embedding has {rows} rows",
                f"ids below {rows}",
                "give the model's own tokenizer; declare tokens that were added in new_tokens",
            )
        )


@torch.no_grad()
def start_from_mean(matrix: nn.Module, known: int, fresh: list[int]) -> None:
    """Writes the mean of the first `known` rows into the rows `fresh`."""
    weight_VD = matrix.weight
    assert isinstance(weight_VD, torch.Tensor)
    weight_VD[fresh] = weight_VD[:known].float().mean(0).to(weight_VD.dtype)
    bias_V = getattr(matrix, "bias", None)
    if bias_V is not None:
        bias_V[fresh] = bias_V[:known].float().mean().to(bias_V.dtype)
