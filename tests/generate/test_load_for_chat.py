"""Whatever holds a model is found and talks: run, checkpoint, adapter, pretrained model; nothing in it is executed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import rig
import torch
from peft import LoraConfig, get_peft_model
from taught_words import SAID
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuner.errors import FinetunerError
from finetuner.generate.load import load_for_chat
from finetuner.runtime.commit import commit_dir

WHO = [{"role": "user", "content": "who?"}]


def says(path: Path, **options: Any) -> str:
    return load_for_chat(str(path), device="cpu", **options).ask(WHO, max_tokens=60).text


def adapter(base: Path, folder: Path) -> Path:
    """An adapter that changes what its base says."""
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def checkpoint(run: Path, step: int, source: Path, owner: str = "mine") -> Path:
    with commit_dir(run / f"checkpoint-{step}", meta={"run": owner, "step": step}) as folder:
        for file in source.iterdir():
            shutil.copyfile(file, folder / file.name)
    return run / f"checkpoint-{step}"


def test_a_model_answers_in_its_own_template_and_stops(taught: Path) -> None:
    assert says(taught) == SAID


def test_an_adapter_answers_as_the_adapted_model(taught: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = adapter(taught, tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(taught), folder)
    tokenizer = AutoTokenizer.from_pretrained(taught)
    ids = tokenizer.apply_chat_template(WHO, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    wanted = model.generate(**ids, max_new_tokens=60, do_sample=False, eos_token_id=6)[0, ids["input_ids"].shape[1] :]
    assert says(folder) == tokenizer.decode(wanted, skip_special_tokens=True) != SAID


def test_a_run_answers_with_its_newest_complete_checkpoint(taught: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    other = rig.tiny_llama(tmp_path / "other")
    checkpoint(run, 9, other)
    checkpoint(run, 10, taught)
    torn = checkpoint(run, 11, other)
    (torn / "model.safetensors").write_bytes(b"")
    checkpoint(run, 9999, other, owner="another")
    (run / "run.json").write_text(json.dumps({"id": "mine"}))
    (run / "config.json").write_text("{}")
    assert says(run) == SAID
    (run / "last").symlink_to("checkpoint-10")
    assert says(run / "last") == SAID
    with pytest.raises(FinetunerError, match="E-CHECKPOINT-TORN"):
        says(torn)


def test_four_bits_are_held_when_asked_for(taught: Path) -> None:
    answerer = load_for_chat(str(taught), quant="nf4", device="cpu")
    assert {type(m).__name__ for m in answerer.model.modules()} & {"Linear4bit"}
    assert answerer.ask(WHO, max_tokens=3).tokens > 0


def test_a_base_that_moved_is_named(taught: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(taught, base)
    folder = adapter(base, tmp_path / "adapter")
    before = says(folder)
    base.rename(tmp_path / "moved")
    with pytest.raises(FinetunerError, match="E-CHAT-BASE") as caught:
        says(folder)
    assert "--base" in str(caught.value)
    assert says(folder, base=str(tmp_path / "moved")) == before


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


@pytest.mark.parametrize(
    ("harm", "code", "names"),
    [
        (without_template, "E-TEMPLATE-NONE", "--template"),
        (lambda f: [file.unlink() for file in f.iterdir()], "E-CHAT-FOLDER", "nothing"),
        (lambda f: (f / "model.safetensors").write_bytes(b"torn"), "E-MODEL-TORN", "model.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "E-MODEL-WEIGHTS", "pickle"),
        (lambda f: edit(f / "config.json", hidden_size=64), "E-MODEL-SHAPE", "embed_tokens"),
    ],
)
def test_a_folder_that_cannot_talk_says_why(harm: Any, code: str, names: str, taught: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(taught, folder)
    harm(folder)
    with pytest.raises(FinetunerError) as caught:
        says(folder)
    assert code in str(caught.value)
    assert names in str(caught.value)


def test_a_template_can_be_named_where_there_is_none(taught: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(taught, folder)
    without_template(folder)
    assert says(folder, template="chatml") == SAID


def test_no_such_path_is_told() -> None:
    with pytest.raises(FinetunerError, match="E-MODEL"):
        load_for_chat("./nowhere", device="cpu")


def test_no_code_of_a_folder_is_executed(taught: Path, tmp_path: Path) -> None:
    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(taught, folder)
    code = f"open({str(canary)!r}, 'w').write('x')\n"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "config", "custom_generate/generate"):
        (folder / f"{name}.py").parent.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(code)
    map_ = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    edit(folder / "config.json", auto_map=map_)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.T", "tokenization_evil.T"]})
    assert says(folder) == SAID
    edit(folder / "config.json", model_type="evil")
    with pytest.raises(FinetunerError, match="E-MODEL-CODE"):
        says(folder)
    assert not canary.exists()
