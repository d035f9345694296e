"""What a merge writes: each tensor of the base, changed by the adapter or as it is, and whether the result is tied.

Every name and shape is known to fit before a tensor is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from finetuner.config.model import CausalLM
from finetuner.errors import ModelError, Problem, nearest
from finetuner.export.changes import Change, Rows, apply, read_changes, whole_of
from finetuner.generate.load import added_ids
from finetuner.model import internlm2
from finetuner.model.folder import model_folder, read_json, tensors
from finetuner.model.quiet import quiet
from finetuner.model.tokenizer import from_folder, vocabulary_size
from finetuner.model.vocabulary import MULTIPLE, start_from_mean
from finetuner.model.weights import read_hf_config


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be written: from which base, with which changes."""

    checkpoint: Path
    base: str
    folder: Path
    """Of the base's weights."""
    changes: dict[str, Change]
    config: PreTrainedConfig
    embedding: str
    head: str
    tied: bool
    """Whether the result is tied."""
    parted: bool
    """Whether the base is tied and the result is not."""
    vocabulary: int
    new_ids: tuple[int, ...]
    dtype: torch.dtype | None
    """None: each tensor in the base's."""

    @property
    def rows(self) -> int:
        """Rows of the embedding: as many as in training."""
        own = whole_of(self.changes.get(self.embedding))
        if own is not None:
            return own.shape[0]
        rows: int = self.config.get_text_config().vocab_size
        return -(-self.vocabulary // MULTIPLE) * MULTIPLE if self.new_ids and self.vocabulary > rows else rows


def planned(checkpoint: Path, base: str, dtype: torch.dtype | None) -> Plan:
    """The plan of merging the adapter in `checkpoint` into `base`.

    Raises: ModelError.
    """
    adapter = read_json(checkpoint / "adapter_config.json")
    source = CausalLM(base)
    folder = model_folder(source)
    config = read_hf_config(folder, source)
    changes = read_changes(checkpoint, adapter)
    with torch.device("meta"), quiet():
        empty = AutoModelForCausalLM.from_config(config)
    embedding = name_of(empty, empty.get_input_embeddings())
    head = name_of(empty, empty.get_output_embeddings())
    tied = bool(config.tie_word_embeddings)
    tokenizer = from_folder(checkpoint if (checkpoint / "tokenizer_config.json").exists() else folder, code=False)
    unmatched = sorted(changes.keys() - empty.state_dict().keys())
    if unmatched:
        best = nearest(unmatched[0], empty.state_dict())
        raise ModelError(
            Problem("E-MERGE-NAMES", "the adapter changes tensors that its base does not have", str(checkpoint),
                    ", ".join(unmatched[:4]), f"such as {best}" if best else "names of the base's tensors",
                    "give the base that it was trained on: --base FOLDER")
        )  # fmt: skip
    parts = tied and not adapter.get("ensure_weight_tying") and parts_ties(changes, embedding, head)
    if tied and not parts and head in changes:
        # Of a tied matrix peft trains one copy, whichever name it goes by.
        changes = {(embedding if name == head else name): change for name, change in changes.items()}
    return Plan(checkpoint, base, folder, changes, config, embedding, head, tied and not parts, parts,
                vocabulary_size(tokenizer), added_ids(base, tokenizer, checkpoint), dtype)  # fmt: skip


def parts_ties(changes: dict[str, Change], embedding: str, head: str) -> bool:
    """Whether the changes part a tied matrix: peft ties trained rows, and nothing else."""
    touched = [changes[name] for name in (embedding, head) if name in changes]
    rows = [change for change in touched if isinstance(change, Rows)]
    if rows and len(rows) < len(touched):
        raise ModelError(Problem("E-MERGE-TIED", "one tied matrix is changed in two ways", f"{embedding}, {head}",
                                 "trained rows beside another change", "one of them",
                                 "train lm_head or new tokens, not both"))  # fmt: skip
    return bool(touched) and not rows


def name_of(model: nn.Module, part: nn.Module) -> str:
    """The name of the weight of `part` in `model`."""
    return next(f"{name}.weight" for name, module in model.named_modules() if module is part)


def merged_tensors(plan: Plan) -> Iterator[tuple[str, Tensor, torch.dtype, bool]]:
    """Each tensor to write, its dtype, and whether the adapter changed it."""
    for name, tensor in base_tensors(plan):
        names = [name]
        if name == plan.embedding and plan.parted:
            names.append(plan.head)
        elif name == plan.head and (plan.tied or plan.parted):
            continue
        if name in (plan.embedding, plan.head):
            tensor = grown(tensor, plan)
        for target in names:
            change = plan.changes.get(target)
            own = plan.dtype or tensor.dtype
            yield target, tensor if change is None else apply(change, tensor, target), own, change is not None


def base_tensors(plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """The base's tensors under transformers' names."""
    is_internlm2 = internlm2.is_model(read_json(plan.folder / "config.json"))
    for name, tensor in tensors(plan.folder):
        if is_internlm2:
            yield from internlm2.renamed(name, tensor, plan.config)
        else:
            yield name, tensor


def grown(weight_VD: Tensor, plan: Plan) -> Tensor:
    """The matrix with rows for new tokens, as they were before they were trained."""
    rows, known = weight_VD.shape[0], min(plan.new_ids, default=plan.vocabulary)
    if plan.vocabulary <= rows or not plan.new_ids:
        return weight_VD
    matrix = nn.Embedding(plan.rows, weight_VD.shape[1], dtype=weight_VD.dtype)
    matrix.weight.data[:rows] = weight_VD
    start_from_mean(matrix, known, sorted({*plan.new_ids, *range(max(rows, known), plan.rows)}))
    return matrix.weight.detach()
