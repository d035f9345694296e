"""A model folder's print tells other weights apart, and nothing else."""

import pytest
import rig
import torch
from safetensors.torch import load_file, save_file

from finetuner.errors import ModelError
from finetuner.model.identity import RECORD, base_identity, check_base


def rewritten(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def test_shards_and_places_do_not_matter(tmp_path):
    from transformers import AutoModelForCausalLM

    one = rig.tiny_llama(tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(one).save_pretrained(tmp_path / "many", max_shard_size="30KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert base_identity(one) == base_identity(tmp_path / "many")


@pytest.mark.parametrize("seed", [1, 2])
def test_other_weights_of_one_shape_are_told_apart(tmp_path, seed):
    wanted = base_identity(rig.tiny_llama(tmp_path / "a"))
    assert wanted != base_identity(rig.tiny_llama(tmp_path / "b", seed=seed))


def test_one_tuned_matrix_is_enough(tmp_path):
    folder = rig.tiny_llama(tmp_path / "a")
    before = base_identity(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    rewritten(folder, lambda held: held | {name: held[name] + torch.full_like(held[name], 1e-3)})
    assert base_identity(folder) != before


def test_an_adapter_is_not_put_onto_another_base(tmp_path):
    base, other = rig.tiny_llama(tmp_path / "base"), rig.tiny_llama(tmp_path / "other", seed=1)
    (tmp_path / RECORD).write_text(f'{{"base_identity": "{base_identity(base)}"}}')
    check_base(tmp_path, base)
    with pytest.raises(ModelError, match="E-BASE-OTHER"):
        check_base(tmp_path, other)
