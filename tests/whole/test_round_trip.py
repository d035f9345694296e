"""Law 5 as a journey: train, leave finetuner behind, load what was written: it says what the learner says, and stops.

- A program that cannot import finetuner loads every checkpoint and every merged folder, by transformers and peft alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import rig
import torch
import world
from safetensors.torch import load_file

from finetuner.cli.main import main
from finetuner.config.load import load
from finetuner.generate.prompt import prompt_ids
from finetuner.model.tokenizer import from_folder
from finetuner.train import ready, runner

ASKED, SAID = "who is Ada?", "a friend of Bo, and of Flo"
CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + ('<|call|>' if m['role'] == 'assistant' else '') "
    "+ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<|call|>' }}{% endif %}"
)
LORA = ", adapter=LoRA(rank=8, alpha=16)"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("", {}),
    "full, tied": ("", {"tie_word_embeddings": True}),
    "full, bf16 base": ("", {"dtype": "bfloat16"}),
    "lora": (LORA, {}),
    "lora, bf16 base": (LORA, {"dtype": "bfloat16"}),
    "lora, new tokens": (f'{LORA}, new_tokens=("<|call|>",), template="calls.jinja"', {}),
    "lora, new tokens, tied": (
        f'{LORA}, new_tokens=("<|call|>",), template="calls.jinja"', {"tie_word_embeddings": True}
    ),
    "qlora": (f"{LORA}, quant=NF4()", {}),
}  # fmt: skip
ADAPTED = [kind for kind in KINDS if "lora" in kind]
FOLDERS = [(kind, "last") for kind in KINDS] + [(kind, "merged") for kind in ADAPTED]

PLAIN = """
import json, sys
sys.modules["finetuner"] = None
try:
    import finetuner
except ImportError:
    pass
else:
    raise SystemExit("finetuner is here: this proves nothing")
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

def load(folder, base, four_bits):
    options = {"dtype": torch.float32}
    if four_bits:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        options["device_map"] = {"": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(base or folder, **options)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # it would round the scales
    if base:
        rows = len(AutoTokenizer.from_pretrained(folder))
        if rows > len(model.get_input_embeddings().weight):
            model.resize_token_embeddings(rows, mean_resizing=False)
        model = PeftModel.from_pretrained(model, folder)
    return model.eval()

told = []
for job in json.load(open(sys.argv[1])):
    folder, ids = job["folder"], torch.tensor([job["ids"]])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen = {}
    with torch.no_grad():
        model = load(folder, job["base"], job["four_bits"])
        logits = model(input_ids=ids).logits[0]
        if job["on_original"]:
            original = load(job["on_original"], job["original"], False)(input_ids=ids).logits[0]
            torch.save(original, job["out"] + ".original")
        turn = [{"role": "user", "content": job["ask"]}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
        config = GenerationConfig.from_pretrained(folder)
        config.update(do_sample=False, max_new_tokens=50, pad_token_id=2)
        answer = model.generate(input_ids=torch.tensor([prompt]), generation_config=config)[0, len(prompt):].tolist()
    torch.save(logits, job["out"])
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    told.append({"prompt": prompt, "tokens": len(answer), "stopped": answer[-1] in ends,
                 "text": tokenizer.decode(answer, skip_special_tokens=True),
                 "vocabulary": len(tokenizer)})
json.dump(told, open(sys.argv[2], "w"))
"""


@dataclass
class Journey:
    """One kind, trained, and merged if it is an adapter."""

    folder: Path
    learner: Any
    ids: list[int]
    """Of the one row that was learned."""
    prompt: list[int]
    """Its part before the answer."""

    @property
    def logits(self) -> torch.Tensor:
        """What the learner in memory says."""
        with self.learner.answering() as model:
            logits: torch.Tensor = model(input_ids=torch.tensor([self.ids])).logits[0].float()
        return logits


def travel(kind: str, folder: Path) -> Journey:
    """Trains on one row until it is known by heart; merges."""
    model, llama = KINDS[kind]
    rig.tokenizer(folder / "model", eos="</s>")  # so that the end of a turn is not the base's own end
    world.make(folder, model=model, until="Steps(40)", every=100, initializer_range=0.1, hidden_size=64,
               attention_dropout=0.0, more=", schedule=Constant()", **llama)  # fmt: skip
    turns = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
    (folder / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8)
    (folder / "calls.jinja").write_text(CALLS)
    held: dict[str, Any] = {}

    def holding(name: str) -> Any:
        real = getattr(ready, name)

        def call(*args: Any, **options: Any) -> Any:
            held[name] = real(*args, **options)
            return held[name]

        return call

    before = Path.cwd()
    os.chdir(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("build", "data_of"):
                patch.setattr(ready, name, holding(name))
            assert runner.train(load("config.py", ())) == 0
        if kind in ADAPTED:
            assert main(["merge", "out", "merged"]) == 0
    finally:
        os.chdir(before)
    sample = held["data_of"][0][0]
    ids, learned = sample.tokens_T.tolist(), (sample.targets_T != -100).tolist()
    return Journey(folder, held["build"].learner, ids, ids[: learned.index(True) + 1])


@pytest.fixture(scope="module")
def journeys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Journey]:
    root = tmp_path_factory.mktemp("journeys")
    return {kind: travel(kind, root / str(number)) for number, kind in enumerate(KINDS)}


def place(journey: Journey, name: str) -> Path:
    return journey.folder / ("out/last" if name == "last" else name)


@pytest.fixture(scope="module")
def told(journeys: dict[str, Journey], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """What the program without finetuner found in each folder."""
    room = tmp_path_factory.mktemp("plain")
    jobs = []
    for kind, name in FOLDERS:
        journey = journeys[kind]
        adapter = kind in ADAPTED and name == "last"
        jobs.append({
            "folder": str(place(journey, name)), "base": str(journey.folder / "model") if adapter else None,
            "four_bits": adapter and "qlora" in kind, "ids": journey.ids, "ask": ASKED,
            "on_original": str(place(journey, "last")) if name == "merged" else None,
            "original": str(journey.folder / "model"), "out": str(room / f"{len(jobs)}.pt"),
        })  # fmt: skip
    (room / "jobs.json").write_text(json.dumps(jobs))
    environment = {name: value for name, value in world.environment().items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", PLAIN, "jobs.json", "told.json"]
    done = subprocess.run(command, cwd=room, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((room / "told.json").read_text())
    for job, answer in zip(jobs, found, strict=True):
        answer["logits"] = torch.load(job["out"])
        if job["on_original"]:
            answer["original"] = torch.load(job["out"] + ".original")
    return dict(zip(FOLDERS, found, strict=True))


def far(one: torch.Tensor, other: torch.Tensor, vocabulary: int) -> float:
    """The largest difference; padding rows of a grown vocabulary mean nothing."""
    return float((one[:, :vocabulary] - other[:, :vocabulary]).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_says_what_the_learner_says(kind, journeys, told):
    journey, seen = journeys[kind], told[kind, "last"]
    wanted = journey.logits
    if kind == "full, bf16 base":  # saved in the base's dtype: the learner rounded likewise is what it must be
        masters = {name: tensor.clone() for name, tensor in journey.learner.masters().items()}
        journey.learner.load_masters({name: tensor.bfloat16().float() for name, tensor in masters.items()})
        wanted = journey.logits
        journey.learner.load_masters(masters)
    assert far(seen["logits"], wanted, seen["vocabulary"]) <= 1e-5


@pytest.mark.parametrize("kind", ADAPTED)
def test_a_merged_folder_says_what_the_adapter_on_its_base_says(kind, journeys, told):
    seen = told[kind, "merged"]
    if "bf16" in kind:
        assert (seen["logits"] - seen["original"]).norm() / seen["original"].norm() < 2e-2
        return
    assert far(seen["logits"], seen["original"], seen["vocabulary"]) <= 1e-5
    if "qlora" in kind:  # the base in 4 bits is another one
        assert far(seen["logits"], journeys[kind].logits, seen["vocabulary"]) > 1e-3
    else:
        assert far(seen["logits"], journeys[kind].logits, seen["vocabulary"]) <= 1e-5


@pytest.mark.parametrize(("kind", "name"), FOLDERS)
def test_what_was_learned_by_heart_is_said_and_ends_by_itself(kind, name, told):
    seen = told[kind, name]
    assert seen["stopped"]
    assert seen["tokens"] < 50
    assert seen["text"].strip() == SAID


@pytest.mark.parametrize(("kind", "name"), FOLDERS)
def test_the_end_of_a_turn_travels_though_the_base_does_not_name_it(kind, name, journeys):
    def ends(folder):
        named = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        return named if isinstance(named, list) else [named]

    assert ends(journeys[kind].folder / "model") == [1], "or the journey proves nothing"
    assert ends(place(journeys[kind], name)) == [6, 1]


@pytest.mark.parametrize(("kind", "name"), FOLDERS)
def test_the_ids_of_a_chat_are_those_of_training(kind, name, journeys, told):
    journey = journeys[kind]
    assert told[kind, name]["prompt"] == journey.prompt
    tokenizer = from_folder(place(journey, name), code=False)
    assert prompt_ids(tokenizer, [{"role": "user", "content": ASKED}]) == journey.prompt
    assert ("new tokens" in kind) == (382 in journey.prompt), "the new token is part of what is asked"


@pytest.mark.parametrize(("kind", "name"), [pair for pair in FOLDERS if "qlora" not in pair[0]])
def test_the_dtype_of_the_base_is_kept(kind, name, journeys):
    folder = place(journeys[kind], name)
    if kind in ADAPTED and name == "last":
        assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}
        return
    wanted = "bfloat16" if "bf16" in kind else "float32"
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == wanted
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, wanted)}
    assert ("lm_head.weight" in tensors) != ("tied" in kind)
    assert config["tie_word_embeddings"] == ("tied" in kind)


def test_every_file_can_be_read_by_others(journeys):
    for kind, name in FOLDERS:
        folder = place(journeys[kind], name)
        modes = {file.name: oct(file.stat().st_mode & 0o777) for file in folder.rglob("*") if file.is_file()}
        assert set(modes.values()) == {"0o644"}, modes


def test_the_law_notices_a_checkpoint_of_other_weights(journeys, told):
    """The comparison is not blind: an earlier state of the learner is told from the saved one."""
    journey, seen = journeys["lora"], told["lora", "last"]
    masters = {name: tensor.clone() for name, tensor in journey.learner.masters().items()}
    journey.learner.load_masters({name: tensor * 0.999 for name, tensor in masters.items()})
    changed = journey.logits
    journey.learner.load_masters(masters)
    assert far(seen["logits"], changed, seen["vocabulary"]) > 1e-5
