"""An adapter made elsewhere, whose vocabulary had grown by plain resizing, is talked with and merged whole."""

from pathlib import Path

import pytest
import rig
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuner.errors import ModelError
from finetuner.export.merge import merge
from finetuner.generate.load import load_model

IDS = torch.tensor([[5, 20, 382, 7, 99, 384, 41, 300]])
CASES = {
    "copied by peft": (False, LoraConfig(r=2, target_modules=["q_proj"])),
    "copied by peft, tied": (True, LoraConfig(r=2, target_modules=["q_proj"])),
    "saved": (False, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "adapted": (False, LoraConfig(r=2, target_modules=["q_proj", "embed_tokens", "lm_head"])),
}


def grown(base: Path, folder: Path, config: LoraConfig) -> torch.Tensor:
    """Writes an adapter as peft's guides do it, three tokens richer than its base; gives its logits."""
    config.task_type = "CAUSAL_LM"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|yes|>", "<|no|>", "<|so|>"], special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(2)
    model.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(model, config)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=IDS).logits[0]
    return logits


@pytest.mark.parametrize("case", CASES)
def test_a_grown_vocabulary_comes_along(case: str, tmp_path: Path) -> None:
    tied, config = CASES[case]
    base = rig.tiny_llama(tmp_path / "base", tie_word_embeddings=tied, initializer_range=0.1)
    wanted = grown(base, tmp_path / "adapter", config)
    with torch.no_grad():
        loaded = load_model(str(tmp_path / "adapter"), device="cpu", chats=True)
        assert torch.equal(loaded.model(input_ids=IDS).logits[0], wanted)
        merge(str(tmp_path / "adapter"), tmp_path / "out")
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=IDS).logits[0]
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= 1e-5
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 385


def test_a_head_whose_new_rows_are_in_no_file_is_told(tmp_path: Path) -> None:
    base = rig.tiny_llama(tmp_path / "base")
    grown(base, tmp_path / "adapter", LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(ModelError, match="E-ADAPTER-FIT"):
        load_model(str(tmp_path / "adapter"), device="cpu", chats=True)
    with pytest.raises(ModelError, match=r"E-ADAPTER-FIT|E-MERGE-SHAPE"):
        merge(str(tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_that_no_file_holds_are_never_made_up(tmp_path: Path) -> None:
    """With its embedding left out of the file, an adapter for a grown vocabulary is not whole."""
    base = rig.tiny_llama(tmp_path / "base")
    grown(base, tmp_path / "adapter", LoraConfig(r=2, target_modules=["q_proj"]))
    from safetensors.torch import load_file, save_file

    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "lora_" in name}, file)
    with pytest.raises(ModelError, match="E-VOCABULARY"):
        load_model(str(tmp_path / "adapter"), device="cpu", chats=True)
    with pytest.raises(ModelError):
        merge(str(tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
