"""A checkpoint's side files are read by older programs too; what was the original's stays the original's."""

from __future__ import annotations

import json

import pytest
import rig
import torch
from model_rig import learner_of
from transformers import AutoTokenizer

from finetuner.config.model import LoRA
from finetuner.model import portable

KINDS = {
    "full": {},
    "full, new tokens": {"new_tokens": ("<|call|>",)},
    "adapter": {"adapter": LoRA(rank=2)},
    "adapter, new tokens": {"adapter": LoRA(rank=2), "new_tokens": ("<|call|>",)},
}
KNOWN = {"PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer"}
"""Some tokenizer classes that transformers 4 has."""


def complaints(folder):
    """What a reader of transformers 4's names misses in `folder`."""
    found = []
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if settings["tokenizer_class"] not in KNOWN:
        found.append(f"tokenizer_class {settings['tokenizer_class']}")
    found += [name for name in ("backend", "is_local", "local_files_only", "auto_map") if name in settings]
    if isinstance(settings.get("extra_special_tokens"), list):
        found.append("extra_special_tokens")
    if (folder / "config.json").exists():
        config = json.loads((folder / "config.json").read_text())
        found += [name for name in ("torch_dtype", "dtype", "rope_theta", "rope_parameters") if name not in config]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_speaks_to_older_readers(kind, tmp_path):
    llama = rig.tiny_llama(
        tmp_path / "base", dtype="bfloat16", rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    learner_of(llama, **KINDS[kind]).save(tmp_path / "out")
    assert complaints(tmp_path / "out") == []
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "out").iterdir()} == {"0o644"}
    if "full" in kind:
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == "bfloat16"
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5


def test_the_law_notices_transformers_own_names(tmp_path, monkeypatch):
    llama = rig.tiny_llama(tmp_path / "base")
    monkeypatch.setattr(portable, "portable_tokenizer", dict)
    learner_of(llama, new_tokens=("<|call|>",)).save(tmp_path / "out")
    assert "tokenizer_class TokenizersBackend" in complaints(tmp_path / "out")


def test_the_originals_files_stay_while_they_are_true(tmp_path):
    llama = rig.tiny_llama(tmp_path / "base")
    text = json.dumps(json.loads((llama / "tokenizer.json").read_text()), indent=7)
    (llama / "tokenizer.json").write_text(text)
    learner_of(llama).save(tmp_path / "same")
    assert (tmp_path / "same" / "tokenizer.json").read_text() == text
    learner_of(llama, new_tokens=("<|call|>",)).save(tmp_path / "other")
    assert AutoTokenizer.from_pretrained(tmp_path / "other").convert_tokens_to_ids("<|call|>") == 382
    assert (tmp_path / "other" / "tokenizer.json").read_text() != text


@pytest.mark.parametrize("new", [(), ("<|call|>",)])
def test_special_tokens_of_the_original_stay_special(new, tmp_path):
    llama = rig.tiny_llama(tmp_path / "base")
    settings = json.loads((llama / "tokenizer_config.json").read_text())
    for name in ("extra_special_tokens", "additional_special_tokens"):
        (llama / "tokenizer_config.json").write_text(json.dumps(settings | {name: ["<image>", "<|u|>"]}))
        learner_of(llama, new_tokens=new).save(tmp_path / name)
        assert complaints(tmp_path / name) == []
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        ids = loaded.convert_tokens_to_ids(["<image>", "<|u|>"])
        assert set(ids) <= set(loaded.all_special_ids)
        assert loaded("a<image>b<|u|>").input_ids == AutoTokenizer.from_pretrained(llama)("a<image>b<|u|>").input_ids


def test_code_is_named_only_where_nothing_else_can_read_the_model():
    place = {"AutoConfig": "org/name--configuration_x.Config"}
    assert "auto_map" not in portable.portable_config({"model_type": "llama", "auto_map": place}, torch.float32)
    assert portable.portable_config({"model_type": "x", "auto_map": place}, torch.float32)["auto_map"] == place


@pytest.mark.parametrize(
    ("stops", "named", "wanted"),
    [((6,), None, 6), ((6,), 6, 6), ((6, 1), None, [6, 1]), ((6,), [1, 6], [6, 1]), ((6, 1), 2, [6, 1, 2])],
)
def test_every_end_is_named_once_the_turns_own_first(stops, named, wanted):
    assert portable.all_ends(stops, named) == wanted
