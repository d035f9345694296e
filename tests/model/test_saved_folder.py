"""Law 5: what is saved, loaded by plain transformers and peft, is what was in memory."""

from __future__ import annotations

import json

import pytest
import rig
import torch
from model_rig import learner_of
from safetensors.torch import load_file

from finetuner.config.model import NF4, LoRA
from finetuner.errors import ModelError
from finetuner.model import save


def moved(learner):
    """The learner with all that it trains changed."""
    torch.manual_seed(5)
    with torch.no_grad():
        for _, parameter in learner.trainable():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return learner


def logits(learner, ids):
    with learner.answering() as model:
        return model(ids).logits


IDS = torch.tensor([[0, 40, 99, 120, 7, 60]])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_whole_model_reloads_equal_in_the_bases_dtype(tmp_path, tied, stored):
    from transformers import AutoModelForCausalLM

    llama = rig.tiny_llama(tmp_path / "base", dtype=stored, tie_word_embeddings=tied)
    learner = moved(learner_of(llama))
    learner.save(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == getattr(torch, stored)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, stored)}
    assert ("lm_head.weight" in tensors) != tied
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    assert loaded.config.tie_word_embeddings == tied
    for name, parameter in learner.causal.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter.to(getattr(torch, stored))), name
    if stored == "float32":
        assert (loaded(IDS).logits - logits(learner, IDS)).abs().max() <= 1e-5
    assert all(p.dtype == torch.float32 for _, p in learner.trainable()), "the masters stay"


@pytest.mark.parametrize("quant", [None, NF4()])
@pytest.mark.parametrize("fields", [{}, {"dora": True}, {"modules_to_save": ("lm_head",)}, {"rslora": True}])
def test_an_adapter_reloads_equal_through_plain_peft(tmp_path, fields, quant):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    llama = rig.tiny_llama(tmp_path / "base", hidden_size=64)
    learner = moved(learner_of(llama, adapter=LoRA(rank=4, **fields), quant=quant))
    learner.save(tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    assert not (tmp_path / "out" / "config.json").exists()
    options = {}
    if quant is not None:
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                                            bnb_4bit_use_double_quant=True)  # fmt: skip
        options["device_map"] = {"": "cpu"}
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, **options)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    if quant is None:
        assert (loaded(IDS).logits - logits(learner, IDS)).abs().max() <= 1e-5
    else:  # in training mode bitsandbytes keeps the scales exact
        loaded.train()
        assert (loaded(IDS).logits - logits(learner, IDS)).abs().max() <= 1e-5


LIBRARIES_OWN = {
    "tied": ({"tie_word_embeddings": True}, {}),
    "frozen in part": ({}, {"freeze": ("*layers.0*",)}),
    "lora": ({}, {"adapter": LoRA(rank=2)}),
    "dora": ({}, {"adapter": LoRA(rank=2, dora=True)}),
    "head": ({}, {"adapter": LoRA(rank=2, modules_to_save=("lm_head",))}),
    "tokens": ({"tie_word_embeddings": True}, {"adapter": LoRA(rank=2), "new_tokens": ("<|call|>",)}),
}


@pytest.mark.parametrize("kind", LIBRARIES_OWN)
def test_copies_are_written_as_the_libraries_write_the_live_model(kind, tmp_path):
    llama, fields = LIBRARIES_OWN[kind]
    learner = moved(learner_of(rig.tiny_llama(tmp_path / "base", **llama), **fields))
    if learner.adapted:
        learner.model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
        files = ["adapter_model.safetensors", "adapter_config.json"]
    else:
        learner.model.save_pretrained(tmp_path / "theirs")
        files = ["model.safetensors"]
    write = learner.saver({name: value.clone() for name, value in learner.changing().items()})
    moved(learner)
    write(tmp_path / "ours")
    for name in files:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    learner.save(tmp_path / "later")
    assert (tmp_path / "later" / files[0]).read_bytes() != (tmp_path / "ours" / files[0]).read_bytes()


def test_the_tokenizer_the_template_and_the_ends_travel(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    folder = rig.tokenizer(tmp_path / "base", eos="</s>")
    (folder / "tokenizer.model").write_bytes(b"original")
    llama = rig.tiny_llama(folder)
    for fields, name in (({}, "whole"), ({"adapter": LoRA(rank=2)}, "adapter")):
        learner = learner_of(llama, **fields)
        learner.save(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.chat_template == rig.CHATML
        assert (tmp_path / name / "tokenizer.model").read_bytes() == b"original"
        config = GenerationConfig.from_pretrained(tmp_path / name)
        assert config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
        assert "_from_model_config" not in json.loads((tmp_path / name / "generation_config.json").read_text())
        assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / name).iterdir()} == {"0o644"}


def test_a_template_of_the_config_travels(tmp_path):
    from transformers import AutoTokenizer

    template = "{% for m in messages %}<|u|>{{ m['content'] }}<|im_end|>{% endfor %}"
    (tmp_path / "own.jinja").write_text(template)
    llama = rig.tiny_llama(tmp_path / "base")
    learner_of(llama, template=str(tmp_path / "own.jinja")).save(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


def test_a_contradictory_generation_config_does_not_stop_a_save(tmp_path):
    llama = rig.tiny_llama(tmp_path / "base")
    held = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}
    (llama / "generation_config.json").write_text(json.dumps(held))
    for fields, name in (({}, "whole"), ({"adapter": LoRA(rank=2)}, "adapter")):
        learner_of(llama, **fields).save(tmp_path / name)
        written = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert written["temperature"] == 0.6
        assert written["eos_token_id"] == [6, 1]


def test_the_mutant_that_casts_each_of_two_tied_matrices_is_seen(tmp_path, monkeypatch):
    llama = rig.tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    learner = moved(learner_of(llama, dtype="bfloat16"))
    learner.stored = torch.bfloat16
    learner.save(tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").stat().st_size

    def untied(model, folder, dtype, values, own):
        state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
        model.save_pretrained(folder, state_dict=state)

    monkeypatch.setattr(save, "whole", untied)
    learner.save(tmp_path / "wrong")
    assert (tmp_path / "wrong" / "model.safetensors").stat().st_size > before * 1.2


def test_what_does_not_fit_the_dtype_is_not_saved(tmp_path):
    llama = rig.tiny_llama(tmp_path / "base", dtype="float16")
    learner = learner_of(llama)
    assert learner.stored == torch.float16
    learner.save(tmp_path / "out")
    with torch.no_grad():
        learner.causal.model.norm.weight[3] = 1e5
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        learner.save(tmp_path / "wrong")
    learner = learner_of(llama, adapter=LoRA(rank=2))
    with torch.no_grad():
        learner.trainable()[0][1][0, 0] = float("nan")
    with pytest.raises(ModelError, match="E-SAVE-NAN"):
        learner.save(tmp_path / "wrong")
