"""A merged folder says what the adapted model says, to a program that knows nothing of us."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rig
import torch
from adapters import IDS, LINEAR, adapter, edit, retensor
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuner.errors import FinetunerError
from finetuner.export import changes, plan, shards
from finetuner.export.merge import merge
from finetuner.runtime.commit import verify

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {}),
    "rslora": ({}, {"use_rslora": True}),
    "dora": ({}, {"use_dora": True}),
    "pattern": ({}, {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"v_proj": 2}}),
    "head saved": ({}, {"modules_to_save": ["lm_head"]}),
    "both saved": ({}, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "embedding": ({}, {"target_modules": ["q_proj", "embed_tokens"]}),
    "rows": ({}, {"trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [3, 9]}}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "tied rows": ({"tie_word_embeddings": True}, {"trainable_token_indices": {"embed_tokens": [3, 9]}}),
    "tied, embedding saved": ({"tie_word_embeddings": True}, {"modules_to_save": ["embed_tokens"]}),
    "tied, head saved": ({"tie_word_embeddings": True}, {"modules_to_save": ["lm_head"]}),
    "tied, head adapted": ({"tie_word_embeddings": True}, {"target_modules": ["q_proj", "lm_head"]}),
    "tied, kept so": (
        {"tie_word_embeddings": True},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "bf16": ({"dtype": "bfloat16"}, {}),
    "bf16 dora": ({"dtype": "bfloat16"}, {"use_dora": True, "modules_to_save": ["lm_head"]}),
}
PLAIN = """
import json, sys
class Blocked:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "finetuner":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder, ids in json.load(open(sys.argv[1])):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    with torch.no_grad():
        torch.save(model(input_ids=torch.tensor([ids])).logits[0].float(), folder + ".pt")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi <think>"}], add_generation_prompt=True)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    json.dump({"ids": list(said["input_ids"]), "tied": tied, "flag": model.config.tie_word_embeddings,
               "dtype": str(model.dtype)}, open(folder + ".json", "w"))
"""


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Each case merged, and loaded in one process that cannot import finetuner."""
    root = tmp_path_factory.mktemp("merged")
    made = {}
    for number, (case, (config, options)) in enumerate(CASES.items()):
        base = rig.tiny_llama(root / f"base{number}", initializer_range=0.1, **config)
        wanted = adapter(base, root / f"adapter{number}", **options)
        merge(str(root / f"adapter{number}"), root / f"out{number}", max_shard="30kB" if case == "lora" else "5GB")
        made[case] = (root / f"out{number}", wanted)
    (root / "list.json").write_text(json.dumps([(str(folder), IDS) for folder, _ in made.values()]))
    command = [sys.executable, "-I", "-c", PLAIN, str(root / "list.json")]
    done = subprocess.run(command, check=False, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return made


@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_says_what_the_adapted_model_says(
    case: str, merged: dict[str, tuple[Path, torch.Tensor]]
) -> None:
    folder, wanted = merged[case]
    found = torch.load(f"{folder}.pt")
    if "bf16" in case:
        assert float((found - wanted).norm() / wanted.norm()) < 2e-2
        assert json.loads(Path(f"{folder}.json").read_text())["dtype"] == "torch.bfloat16"
    else:
        assert float((found - wanted).abs().max()) <= 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if "tied" in case])
def test_the_tie_and_its_flag_agree(case: str, merged: dict[str, tuple[Path, torch.Tensor]]) -> None:
    folder, _ = merged[case]
    seen = json.loads(Path(f"{folder}.json").read_text())
    parted = case in ("tied, embedding saved", "tied, head saved", "tied, head adapted")
    assert (seen["tied"], seen["flag"]) == (not parted, not parted)
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) == parted


def test_the_folder_is_complete_readable_and_portable(merged: dict[str, tuple[Path, torch.Tensor]]) -> None:
    folder, _ = merged["lora"]
    assert verify(folder) is None
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert (folder / "chat_template.jinja").read_text() == rig.CHATML
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert all(path.stat().st_size < 60_000 for path in folder.glob("model-*.safetensors"))
    assert not list(folder.glob("adapter_*")) + list(folder.glob("*.bin")) + list(folder.glob("part-*"))
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 6
    report = json.loads((folder / "MERGE.json").read_text())
    assert report["difference"] < 1e-5 < report["effect"]
    assert report["changed"] == 6


def test_untouched_tensors_keep_their_bits(tmp_path: Path) -> None:
    base = rig.tiny_llama(tmp_path / "base", dtype="bfloat16")
    adapter(base, tmp_path / "adapter")
    merge(str(tmp_path / "adapter"), tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in moved} == set(LINEAR)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    base = rig.tiny_llama(tmp_path / "base", initializer_range=0.1)
    adapter(base, tmp_path / "adapter")
    return tmp_path


@pytest.mark.parametrize("mutant", ["no scale", "rslora forgotten", "dora forgotten", "one module lost"])
def test_the_check_of_a_merge_sees_a_mutant(mutant: str, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = changes.apply
    options = {"rslora forgotten": {"use_rslora": True}, "dora forgotten": {"use_dora": True}}
    adapter(made / "base", made / "adapter", **options.get(mutant, {}))
    match mutant:
        case "no scale":
            monkeypatch.setattr(changes, "scaling", lambda config, module, rank: 1.0)
        case "rslora forgotten":
            monkeypatch.setattr(changes, "scaling", lambda config, module, rank: config["lora_alpha"] / rank)
        case "dora forgotten":
            monkeypatch.setattr(
                plan,
                "apply",
                lambda change, weight, name: weight + change.up_OR @ change.down_RI * change.scale,
            )
        case _:
            monkeypatch.setattr(
                plan, "apply", lambda c, weight, name: weight if "layers.1.mlp" in name else right(c, weight, name)
            )
    with pytest.raises(FinetunerError, match="E-MERGE-CHECK"):
        merge(str(made / "adapter"), made / "out")
    assert not (made / "out").exists()
    assert not list(made.glob(".tmp_*"))


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("harm", "code", "names"),
    [
        (lambda d: retensor(d / "adapter/adapter_model.safetensors", lambda t: t.clear()), "E-ADAPTER-EMPTY", "0"),
        (lambda d: retensor(d / "adapter/adapter_model.safetensors", lambda t: t[A].fill_(torch.nan)),
         "E-ADAPTER-TENSOR", "q_proj.lora_A"),
        (lambda d: retensor(d / "adapter/adapter_model.safetensors", lambda t: t.update({A: torch.empty(0)})),
         "E-ADAPTER-TENSOR", "empty"),
        (lambda d: retensor(d / "adapter/adapter_model.safetensors", lambda t: t.pop(A)), "E-ADAPTER-FORM", "q_proj"),
        (lambda d: retensor(d / "adapter/adapter_model.safetensors", lambda t: t.update({A: torch.ones(4, 31)})),
         "E-MERGE-SHAPE", "q_proj"),
        (lambda d: retensor(d / "adapter/adapter_model.safetensors",
                            lambda t: t.update({k.replace("q_proj", "qq_proj"): t.pop(k) for k in list(t)})),
         "E-MERGE-NAMES", "qq_proj"),
        (lambda d: (d / "adapter/adapter_model.safetensors").write_bytes(b"torn"), "E-ADAPTER-FILE", "adapter_model"),
        (lambda d: edit(d / "adapter/adapter_config.json", peft_type="LOHA"), "E-ADAPTER-FORM", "LOHA"),
        (lambda d: edit(d / "adapter/adapter_config.json", lora_bias=True), "E-ADAPTER-FORM", "lora_bias"),
        (lambda d: edit(d / "adapter/adapter_config.json", base_model_name_or_path="/nowhere"),
         "E-CHAT-BASE", "--base"),
        (lambda d: edit(d / "base/config.json", quantization_config={"quant_method": "bitsandbytes"}),
         "E-MODEL-QUANTISED", "bitsandbytes"),
        (lambda d: (d / "adapter/adapter_config.json").unlink(), "E-CHAT-FOLDER", "adapter"),
        (lambda d: (d / "out").mkdir() or (d / "out/thesis.txt").write_text("x"), "E-OUT-EXISTS", "thesis"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_by_name_and_leaves_nothing(
    harm: Any, code: str, names: str, made: Path
) -> None:
    harm(made)
    before = {path.name for path in made.iterdir()}
    with pytest.raises(FinetunerError) as caught:
        merge(str(made / "adapter"), made / "out")
    assert code in str(caught.value)
    assert names in str(caught.value)
    assert {path.name for path in made.iterdir()} == before


def test_a_value_too_large_for_float16_is_named(made: Path) -> None:
    retensor(made / "base/model.safetensors", lambda t: t["model.layers.1.mlp.up_proj.weight"][0, 0].fill_(1e5))
    with pytest.raises(FinetunerError) as caught:
        merge(str(made / "adapter"), made / "out", dtype="float16")
    assert "E-EXPORT-NONFINITE" in str(caught.value)
    assert "layers.1.mlp.up_proj" in str(caught.value)
    assert not (made / "out").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_dtype_is_written_when_asked_for(dtype: str, made: Path) -> None:
    report = merge(str(made / "adapter"), made / "out", dtype=dtype)
    assert {str(t.dtype) for t in load_file(made / "out/model.safetensors").values()} == {f"torch.{dtype}"}
    assert json.loads((made / "out/config.json").read_text())["torch_dtype"] == report.dtype == dtype


def test_an_earlier_merge_is_replaced_and_the_base_may_have_moved(made: Path) -> None:
    merge(str(made / "adapter"), made / "out")
    (made / "base").rename(made / "moved")
    report = merge(str(made / "adapter"), made / "out", base=str(made / "moved"))
    assert report.base == str(made / "moved")
    assert verify(made / "out") is None


def test_what_four_bits_cost_is_measured_where_the_adapter_was_trained_on_them(made: Path) -> None:
    assert merge(str(made / "adapter"), made / "out").quantised_difference is None
    (made / "adapter" / "finetuner.json").write_text(json.dumps({"quant": "nf4"}))
    cost = merge(str(made / "adapter"), made / "out").quantised_difference
    assert cost is not None
    assert 1e-3 < cost < 1


def test_a_four_bit_base_is_merged_only_when_asked_for(made: Path) -> None:
    from transformers import BitsAndBytesConfig

    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(made / "base", quantization_config=four, device_map={"": "cpu"})
    model.save_pretrained(made / "four")
    AutoTokenizer.from_pretrained(made / "base").save_pretrained(made / "four")
    with pytest.raises(FinetunerError, match="E-MODEL-QUANTISED"):
        merge(str(made / "adapter"), made / "out", base=str(made / "four"))
    report = merge(str(made / "adapter"), made / "out", base=str(made / "four"), allow_quantised=True)
    assert report.base == str(made / "four")
    assert "quantization_config" not in json.loads((made / "out/config.json").read_text())
    assert {path.name for path in made.iterdir()} == {"base", "four", "adapter", "out"}


def test_memory_of_the_merge_stays_near_one_file(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = []
    right = shards.Shards.add

    def add(self: Any, name: str, tensor: Any, dtype: Any) -> None:
        right(self, name, tensor, dtype)
        largest.append(sum(t.numel() * t.element_size() for t in self._waiting.values()))

    monkeypatch.setattr(shards.Shards, "add", add)
    merge(str(made / "adapter"), made / "out", max_shard="60kB")
    assert max(largest) <= 60_000
    assert sum(path.stat().st_size for path in (made / "out").glob("model-*")) > 120_000


@pytest.mark.parametrize("fault", ["write:1", "fsync:2", "rename:1", "rename:2"])
def test_a_merge_that_was_killed_leaves_nothing_or_all_and_runs_again(fault: str, made: Path) -> None:
    code = "import sys; from finetuner.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "merge", str(made / "adapter"), str(made / "out")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    killed = subprocess.run(command, env=environment | {"FINETUNER_FAULT": fault}, check=False)
    assert killed.returncode == 137
    assert not (made / "out").exists() or verify(made / "out") is None
    merge(str(made / "adapter"), made / "out")
    assert verify(made / "out") is None
    assert {path.name for path in made.iterdir()} == {"base", "adapter", "out"}
