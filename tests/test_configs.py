"""Every ready config is a run: it loads without torch, and a tiny model of its architecture takes two steps of it.

- The tiny models are made on the spot from transformers' configs, shrunk; InternLM2's is written in InternLM2's own
  layout, packed here, not by the code under test.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rig

from finetuner import BatchSize, Documents, Json, Logs, Run, Steps, Text, Torch
from finetuner.config.load import Loaded, load
from finetuner.config.ready import ready
from finetuner.dialogue.rows import alpaca
from finetuner.errors import ConfigError

ROOT = Path(__file__).parents[1]
READY = sorted(ready())
KINDS = {
    "internlm/internlm2": "internlm2",
    "internlm/internlm3": "internlm3",
    "meta-llama/": "llama",
    "Qwen/Qwen2.5": "qwen2",
    "Qwen/Qwen3": "qwen3",
    "mistralai/": "mistral",
    "google/gemma-2": "gemma2",
    "google/gemma-3": "gemma3_text",
    "microsoft/": "phi3",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen": "qwen2",
    "deepseek-ai/DeepSeek-R1-Distill-Llama": "llama",
}
"""How a hub name begins -> transformers' `model_type`."""
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def test_there_are_a_few_ready_configs_for_every_family() -> None:
    assert 20 <= len(READY) <= 30
    paths = [str(load(name).run.model.path) for name in READY]
    assert all(any(path.startswith(start) for path in paths) for start in KINDS), "no family is left out"
    assert {method(load(name).run) for name in READY} == {"full", "lora", "qlora"}


def test_all_ready_configs_load_without_torch() -> None:
    code = (
        "import sys; from finetuner.config.load import load; from finetuner.config.ready import ready; "
        "[load(name) for name in ready()]; print(*{'torch', 'transformers'} & set(sys.modules), len(ready()))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == [str(len(READY))]


def method(run: Run) -> str:
    """full, lora or qlora."""
    return "full" if run.model.adapter is None else "lora" if run.model.quant is None else "qlora"


@pytest.mark.parametrize("name", READY)
def test_a_ready_config_says_in_one_line_what_it_is_and_is_short(name: str) -> None:
    source = load(name).source
    said = ast.get_docstring(ast.parse(source)) or ""
    run = load(name).run
    assert re.search(r": (one GPU|\w+ GPUs) of \d+ GB\.", said.splitlines()[0])
    how = {"full": "all its weights", "lora": "through LoRA", "qlora": "through QLoRA"}[method(run)]
    assert how in said
    assert f"_{method(run)}_" in name
    size = re.search(r"\d+(\.\d+)?B|mini|Phi-4", said)
    assert size, "the model's size"
    assert size[0].lower().replace(".", "_").replace("phi-4", "phi_4") in name.replace("mini_instruct", "mini")
    assert source.count("\n") <= 20


def test_a_ready_config_with_a_typo_is_refused(tmp_path: Path) -> None:
    name = "llama3_3_70b_instruct_qlora_alpaca"
    source = ready()[name].read_text(encoding="utf-8")
    for file in ready()[name].parent.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    assert load(tmp_path / f"{name}.py").run == load(name).run
    (tmp_path / f"{name}.py").write_text(source.replace("path=", "pathh="), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"pathh"):
        load(tmp_path / f"{name}.py")


def tiny_model(folder: Path, kind: str) -> Path:
    """A model of the architecture, of two layers of width 32 with random weights, with the rig's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(rig.tokenizer(folder))
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model("llama" if kind == "internlm2" else kind, **TINY, **ids, vocab_size=512)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    if kind == "internlm2":
        as_internlm2(folder, model)
    return folder


def as_internlm2(folder: Path, model: Any) -> None:
    """Rewrites a saved Llama in InternLM2's layout: other names; q, k, v packed by key/value head."""
    import torch
    from safetensors.torch import save_file

    names = {
        "model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
        "post_attention_layernorm": "ffn_norm", "input_layernorm": "attention_norm",
    }  # fmt: skip
    packed, heads, groups, size = {}, TINY["num_attention_heads"], TINY["num_key_value_heads"], TINY["head_dim"]
    state = dict(model.state_dict())
    for layer in range(TINY["num_hidden_layers"]):
        q, k, v = (state.pop(f"model.layers.{layer}.self_attn.{part}_proj.weight") for part in "qkv")
        rows = []
        for group in range(groups):
            each = heads // groups * size
            rows += [q[group * each : (group + 1) * each], k[group * size : (group + 1) * size]]
            rows += [v[group * size : (group + 1) * size]]
        packed[f"model.layers.{layer}.attention.wqkv.weight"] = torch.cat(rows)
    for name, tensor in state.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        packed[name] = tensor.clone()
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False, "rope_theta": 10000}
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """hub name -> folder of a tiny model of its architecture, made once."""
    made: dict[str, Path] = {}

    def model(path: str) -> Path:
        kind = KINDS[max((start for start in KINDS if path.startswith(start)), key=len)]
        if kind not in made:
            made[kind] = tiny_model(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return model


def small(run: Run, model: Path, folder: Path) -> Run:
    """The run with a tiny model and a few rows of our own; what makes it this run stays."""
    if isinstance(run.data, Documents):
        (folder / "rows.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40, encoding="utf-8")
        source: Text | Json = Text(str(folder / "rows.txt"))
    else:
        asked = {"instruction": "what is your name?", "input": "", "output": "my name is Ada"}
        if run.data.rows is not alpaca:
            asked = {"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "I am Ada"}]}
        (folder / "rows.jsonl").write_text((json.dumps(asked) + "\n") * 24, encoding="utf-8")
        source = Json(str(folder / "rows.jsonl"))
    return replace(
        run,
        model=replace(run.model, path=str(model)),
        data=replace(run.data, source=source, length=64),
        eval=None,
        batch=BatchSize(total=2),
        until=Steps(2),
        ask=run.ask and replace(run.ask, max_tokens=2),
        engine=Torch(device="cpu"),
        log=Logs(every=Steps(1)),
        folder=str(folder / "run"),
    )


@pytest.mark.parametrize("name", READY)
def test_a_tiny_model_of_the_architecture_takes_two_steps(
    name: str, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from finetuner.train.runner import train

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    loaded = load(name)
    run = small(loaded.run, tiny(str(loaded.run.model.path)), tmp_path)
    assert train(Loaded(run, loaded.path, loaded.source, loaded.name)) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)
    written = set(os.listdir(tmp_path / "run" / "last"))
    assert ("adapter_model.safetensors" if run.model.adapter else "model.safetensors") in written
    if run.model.adapter:
        adapter = json.loads((tmp_path / "run" / "last" / "adapter_config.json").read_text(encoding="utf-8"))
        assert (adapter["r"], adapter["lora_alpha"]) == (run.model.adapter.rank, run.model.adapter.alpha)


def test_two_steps_of_a_config_whose_adapters_fit_no_layer_are_refused(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetuner.errors import FinetunerError
    from finetuner.train.runner import train

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loaded = load("qwen3_4b_lora_chats", ["model.adapter.targets=('c_attn',)"])
    run = small(loaded.run, tiny("Qwen/Qwen3-4B"), tmp_path)
    with pytest.raises(FinetunerError, match="c_attn"):
        train(Loaded(run, loaded.path, loaded.source, loaded.name))
