"""Every model that cannot be used gets its one-screen error; before the data, where no weight must be read."""

from __future__ import annotations

import json
import shutil

import bad
import pytest
import rig
import torch
from bad import Case, both, edit, nothing
from safetensors.torch import load_file, save_file

ADAPTED = both(edit('"model",', '"model", adapter=LoRA(rank=4, alpha=8),'))


def lora(fields: str):
    return edit('"model",', f'"model", adapter=LoRA({fields}),')


def model(fields: str):
    return edit('"model",', f'"model", {fields},')


def settings(file: str = "config.json", **values: object):
    """Changes values of one of the model's JSON files; None takes them out."""

    def change(folder):
        path = folder / "model" / file
        held = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({name: value for name, value in held.items() if value is not None}))

    return change


def weights(change):
    """Changes the tensors, given by name, in place."""

    def rewrite(folder):
        path = folder / "model" / "model.safetensors"
        held = load_file(path)
        change(held)
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, path, {"format": "pt"})

    return rewrite


def without(*names: str):
    def remove(folder):
        for name in names:
            (folder / "model" / name).unlink()

    return remove


def put(name: str, text: str | bytes):
    def write(folder):
        (folder / "model" / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return write


def cut(folder) -> None:
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def index(folder) -> None:
    names = list(load_file(folder / "model" / "model.safetensors"))
    shards = {name: f"model-{1 + number % 2:05}-of-00002.safetensors" for number, name in enumerate(names)}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    shutil.copy(folder / "model" / "model.safetensors", folder / "model" / "model-00001-of-00002.safetensors")


def fill(value: float):
    def change(held):
        held["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    return weights(change)


def narrow(held) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        held[name] = held[name][:300]


def tie(folder) -> None:
    settings(tie_word_embeddings=True)(folder)
    weights(lambda held: held.pop("lm_head.weight"))(folder)


def adapter(folder, **changes: object):
    """Writes an adapter of peft's form to start from."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def of_adapter(change):
    """Starts from an adapter whose tensors `change` has given another form."""

    def spoil(folder):
        adapter(folder)
        path = folder / "adapter" / "adapter_model.safetensors"
        held = change(load_file(path))
        save_file(held, path, {"format": "pt"})
        START(folder)

    return spoil


def seven_wide(held):
    return {name: tensor.new_ones(tensor.shape[0], 7) for name, tensor in held.items()}


START = lora('rank=4, alpha=8, targets=("q_proj",), start="adapter"')
EARLY = [
    Case("22 rows longer than the positions", edit("length=96", "length=1024"), "E-LENGTH", ("data.length=512",)),
    Case(
        "24 flash attention",
        edit('dtype="float32"', 'attention="flash_attention_2"'),
        "E-ATTENTION-MISSING",
        ("model.attention",),
    ),
    Case("75 no folder", edit('"model",', '"./modle",'), "E-MODEL-PATH", ("./modle", "did you mean the folder model?")),
    Case("75 a file", edit('"model",', '"./text.txt",'), "E-MODEL-PATH", ("text.txt",)),
    Case(
        "75 an empty folder",
        both(lambda f: shutil.rmtree(f / "model"), lambda f: (f / "model").mkdir()),
        "E-MODEL-CONFIG",
        ("model",),
    ),
    Case("75 no config.json", without("config.json"), "E-MODEL-CONFIG", ("model", "tokenizer.json")),
    Case("75 config.json cut", put("config.json", "{"), "E-MODEL-JSON", ("model/config.json",)),
    Case("75 config.json a list", put("config.json", "[]"), "E-MODEL-JSON", ("model/config.json",)),
    Case("75 no model_type", settings(model_type=None), "E-MODEL-CONFIG", ("model_type",)),
    Case("75 no weights", without("model.safetensors"), "E-MODEL-WEIGHTS", ("model", "no weights at all")),
    Case("75 a shard is missing", index, "E-MODEL-SHARD", ("model-00002-of-00002.safetensors", "1 of 2 missing")),
    Case("75 an index of nothing", put("model.safetensors.index.json", "{}"), "E-MODEL-JSON", ("weight_map",)),
    Case("76 truncated", cut, "E-MODEL-TORN", ("model/model.safetensors", "fetch the model again")),
    Case("76 empty", put("model.safetensors", ""), "E-MODEL-TORN", ("model/model.safetensors",)),
    Case("76 a page of HTML", put("model.safetensors", "<html>" * 99), "E-MODEL-TORN", ("model/model.safetensors",)),
    Case(
        "81 more tokens than rows",
        both(settings(vocab_size=300), weights(narrow)),
        "E-VOCABULARY",
        ("model.tokenizer", "300 rows", "new_tokens"),
    ),
    Case("83 no eos token", settings("tokenizer_config.json", eos_token=None), "E-TOKENIZER-EOS", ("eos_token",)),
    Case("83 no chat template", without("chat_template.jinja"), "E-TEMPLATE-NONE", ('model.template="chatml"',)),
    Case("83 no tokenizer", without("tokenizer.json", "tokenizer_config.json"), "E-TOKENIZER", ("model",)),
    Case("83 a broken tokenizer", put("tokenizer.json", "{"), "E-TOKENIZER", ("model",)),
    Case("83 a tokenizer elsewhere", model('tokenizer="./nowhere"'), "E-MODEL-PATH", ("./nowhere",)),
    Case("83 a template's name", model('template="chatmll"'), "E-TEMPLATE-NAME", ("did you mean", "chatml")),
    Case(
        "83 a template that is no jinja",
        put("chat_template.jinja", "{% for %}"),
        "E-TEMPLATE-SYNTAX",
        ("of the tokenizer, line 1",),
    ),
    Case("83 a template without roles", put("chat_template.jinja", "hello"), "E-TEMPLATE", ("remedy",)),
    Case("83 a template that raises", put("chat_template.jinja", "{{ raise_exception('no') }}"), "E-TEMPLATE", ("no",)),
    Case(
        "83 a template that calls",
        put("chat_template.jinja", "{{ messages.__class__.__mro__ }}"),
        "E-TEMPLATE",
        ("remedy",),
    ),
    Case(
        "88 pickles only",
        both(without("model.safetensors"), put("pytorch_model.bin", b"\x80\x04")),
        "E-MODEL-WEIGHTS",
        ("pytorch_model.bin", "convert it to safetensors"),
    ),
    Case(
        "89 a kind that needs code",
        settings(model_type="mystery", auto_map={"AutoModelForCausalLM": "m.M"}),
        "E-MODEL-CODE",
        ("mystery", "remote_code"),
    ),
    Case("89 an unknown kind", settings(model_type="mystery"), "E-MODEL-CODE", ("mystery", "upgrade transformers")),
    Case(
        "89 a tokenizer that needs code",
        both(without("tokenizer.json"), settings("tokenizer_config.json", auto_map={"AutoTokenizer": ["m.M", None]})),
        "E-TOKENIZER-CODE",
        ("remote_code",),
    ),
    Case(
        "90 a hub name, offline",
        edit('"model",', '"no/such-model",'),
        "E-MODEL-HUB",
        ("no/such-model", "HF_HUB_OFFLINE", "hf download"),
    ),
    Case(
        "quantised already",
        settings(quantization_config={"quant_method": "gptq"}),
        "E-MODEL-QUANTISED",
        ("gptq", "quant=NF4()"),
    ),
    Case(
        "a config that contradicts itself",
        settings(num_attention_heads=5),
        "E-MODEL-CONFIG",
        ("config.json", "attention heads"),
    ),
    Case("a config of texts", settings(hidden_size="wide"), "E-MODEL-CONFIG", ("config.json", "hidden_size")),
    Case("an encoder and decoder", settings(model_type="t5"), "E-MODEL-KIND", ("t5",)),
    Case("an encoder", settings(model_type="bert"), "E-MODEL-KIND", ("bert",)),
    Case(
        "an adapter given as the model",
        both(adapter, edit('"model",', '"adapter",')),
        "E-MODEL-CONFIG",
        ("this is an adapter", "LoRA(start="),
    ),
    Case("25 none match", lora('targets=("w1",)'), "E-LORA-TARGET", ("w1", "q_proj")),
    Case("25 one misspelt", lora('targets=("q_proj", "v_prj")'), "E-LORA-TARGET", ("did you mean v_proj?",)),
    Case("25 the head of a tied model", both(tie, lora('targets=("q_proj", "lm_head")')), "E-LORA-TIED", ("lm_head",)),
    Case("25 no linear layer", lora('targets=("norm",)'), "E-LORA-TARGET", ("norm", "q_proj")),
    Case(
        "25 modules_to_save misspelt", lora('modules_to_save=("lm_hed",)'), "E-LORA-TARGET", ("did you mean lm_head?",)
    ),
    Case("freeze of nothing", model('freeze=("no.such.*",)'), "E-FREEZE-PATTERN", ("no.such.*",)),
    Case(
        "75 nearly a folder", edit('"model",', '"modle",'), "E-MODEL-HUB", ("modle", "did you mean the folder model?")
    ),
]
LATE = [
    Case("78 another shape", settings(intermediate_size=48), "E-MODEL-SHAPE", ("mlp", "(64, 32)", "(48, 32)")),
    Case("79 a weight is missing", weights(lambda held: held.pop("model.layers.1.mlp.up_proj.weight")),
         "E-MODEL-MISSING", ("model.layers.1.mlp.up_proj.weight",)),
    Case("79 no head", weights(lambda held: held.pop("lm_head.weight")), "E-MODEL-MISSING", ("lm_head.weight",)),
    Case("79 a weight is left over", weights(lambda held: held.update(extra=torch.ones(2))), "E-MODEL-UNEXPECTED",
         ("extra",)),
    Case("79 one layer too few", settings(num_hidden_layers=1, layer_types=None), "E-MODEL-UNEXPECTED", ("layers.1",)),
    Case("80 NaN", fill(float("nan")), "E-MODEL-NAN", ("model.layers.1.mlp.up_proj.weight",)),
    Case("80 infinity", fill(float("inf")), "E-MODEL-NAN", ("model.layers.1.mlp.up_proj.weight",)),
    Case("84 an adapter that is not there", START, "E-LORA-START", ("adapter",)),
    Case("84 an adapter of another shape", of_adapter(seven_wide),
         "E-LORA-START", ("adapter",)),
    Case("84 an adapter of another rank", both(adapter, lora('rank=8, alpha=8, targets=("q_proj",), start="adapter"')),
         "E-LORA-START", ("rank", "4", "8")),
    Case("84 an adapter of other layers", both(adapter, lora('rank=4, alpha=8, targets=("k_proj",), start="adapter"')),
         "E-LORA-START", ("targets", "k_proj")),
    Case("85 an adapter without tensors", of_adapter(lambda held: {}), "E-LORA-START", ("adapter",)),
    Case("85 an adapter of empty tensors", of_adapter(lambda held: {n: t[:0] for n, t in held.items()}),
         "E-LORA-START", ("adapter",)),
    Case("85 an adapter with NaN", of_adapter(lambda held: {n: t * float("nan") for n, t in held.items()}),
         "E-LORA-START", ("finite",)),
    Case("85 an adapter that is cut", both(adapter, START,
         lambda f: (f / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 9)), "E-LORA-START", ("adapter",)),
    Case("85 adapter_config.json cut", both(adapter, START,
         lambda f: (f / "adapter" / "adapter_config.json").write_text("{")), "E-MODEL-JSON", ("adapter_config.json",)),
    Case("freeze of all", model('freeze=("*",)'), "E-MODEL-FROZEN", ("remedy",)),
    Case("rates of nothing", edit("lr=1e-2", 'lr=1e-2, rates={"no.such": 1e-3}'), "E-OPTIM-RATES", ("no.such",)),
    Case("8-bit moments without CUDA", edit("lr=1e-2", "lr=1e-2, bits=8"), "E-OPTIM-8BIT", ("optim.bits",)),
]  # fmt: skip
WORKS = [
    Case("83 no pad token", settings("tokenizer_config.json", pad_token=None)),
    Case("83 no bos token", lambda f: rig.tokenizer(f / "model", bos=False)),
    Case("a path with a trailing slash", edit('"model",', '"./model/",')),
    Case("a start from an adapter", both(adapter, START)),
]


@pytest.mark.parametrize("case", EARLY, ids=str)
def test_a_model_that_cannot_be_used_is_told_before_a_weight_is_read(case, here, monkeypatch, capsys):
    case.wrong(here)
    monkeypatch.setattr("finetuner.train.ready.build", None)
    code, err = bad.run(case.command, capsys)
    bad.check(case, code, err, exit_code=2 if case.code == "E-TEMPLATE-NAME" else 4)


@pytest.mark.parametrize("case", LATE, ids=str)
def test_a_model_that_cannot_be_trained_is_told_before_the_first_step(case, here, capsys):
    case.wrong(here)
    code, err = bad.run(case.command, capsys)
    bad.check(case, code, err, exit_code=2 if case.code.startswith("E-OPTIM") else 4)
    assert not (here / "out" / "metrics.jsonl").exists() or not (here / "out" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("case", WORKS, ids=str)
def test_an_odd_model_that_is_right_is_trained(case, here, capsys):
    case.wrong(here)
    code, err = bad.run(case.command, capsys)
    bad.check(case, code, err)


@pytest.mark.parametrize("case", EARLY[2:17] + LATE[:6], ids=str)
def test_chat_tells_what_is_wrong_with_a_model_too(case, here, capsys):
    case.wrong(here)
    place = "no/such-model" if case.code == "E-MODEL-HUB" else "./modle" if "no folder" in case.name else "model"
    if case.name in ("75 a file",):
        place = "text.txt"
    code, err = bad.run(["chat", place, "--ask", "who?", "--max-tokens", "2"], capsys)
    told = err.partition("error[")[2].partition("]")[0]
    bad.check(Case(case.name, nothing, told), code, err, exit_code=4)
