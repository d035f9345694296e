"""Weights are cut into files of a bounded size, and none is written that is empty or not finite."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetuner.errors import FinetunerError
from finetuner.export import shards
from finetuner.export.shards import Shards


def test_every_tensor_is_in_one_file_and_the_index_knows_which(tmp_path: Path) -> None:
    import json

    given = {f"t{number}": torch.full((100,), float(number)) for number in range(7)}
    writer = Shards(tmp_path, 1000)
    for name, tensor in given.items():
        writer.add(name, tensor, torch.float32)
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == sorted(set(index["weight_map"].values()))
    assert len(set(index["weight_map"].values())) == 4
    assert index["metadata"]["total_size"] == 7 * 400
    assert all(torch.equal(load_file(tmp_path / index["weight_map"][name])[name], t) for name, t in given.items())


def test_integers_keep_their_dtype(tmp_path: Path) -> None:
    writer = Shards(tmp_path, 1000)
    writer.add("a", torch.ones(3, dtype=torch.int64), torch.bfloat16)
    writer.close()
    assert load_file(tmp_path / "model.safetensors")["a"].dtype == torch.int64


@pytest.mark.parametrize("tensor", [torch.empty(0), torch.tensor([torch.nan]), torch.tensor([1e6])])
def test_what_is_empty_or_not_finite_is_refused_by_name(tensor: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(FinetunerError, match="some_weight"):
        Shards(tmp_path, 1000).add("some_weight", tensor, torch.float16)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5 kB", 1500), ("7", 7)])
def test_a_size_is_read(text: str, size: int) -> None:
    assert shards.size_of(text) == size


@pytest.mark.parametrize("text", ["", "big", "-1GB", "0", "5XB"])
def test_a_wrong_size_is_refused(text: str) -> None:
    with pytest.raises(FinetunerError, match="E-SIZE"):
        shards.size_of(text)
