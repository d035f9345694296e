"""`merge`: an adapter into its base, as a folder that plain transformers, vLLM and others load.

    what the adapter changes -> the base's tensors one by one, changed or as they are -> shards, config, tokenizer,
    template -> the folder is loaded again and must say what the adapted model says -> it gets its name

- Memory of the merge itself is near one shard and the adapter; only the check loads a model whole.
- The base is the original one, also for an adapter trained on 4 bits: rounding twice is worse than once. What that
  costs is measured and told.
- Ties stay ties unless the adapter parts them; then both matrices are written and the config says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from finetuner import __version__
from finetuner.config.model import NF4, CausalLM, LoRA
from finetuner.errors import ModelError, Problem
from finetuner.export.check import TOLERANCE, agreement, difference, logits_of, probes
from finetuner.export.huggingface import write_generation, write_tokenizer
from finetuner.export.plan import Plan, merged_tensors, planned
from finetuner.export.shards import Shards, size_of
from finetuner.generate.load import base_of, model_place, stored, torch_device
from finetuner.generate.stops import stop_ids
from finetuner.model import internlm2
from finetuner.model.adapter import load_adapter
from finetuner.model.folder import find, read_json
from finetuner.model.identity import check_base
from finetuner.model.portable import portable_config, write_json
from finetuner.model.quiet import quiet
from finetuner.model.tokenizer import from_folder
from finetuner.model.weights import load_weights, stored_dtype
from finetuner.runtime.commit import commit_dir, remove_dir, sweep, verify

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was merged and how well: written into MERGE.json."""

    checkpoint: str
    base: str
    dtype: str
    tensors: int
    changed: int
    tied: bool
    difference: float
    """Relative difference of the logits, merged folder against adapter on base."""
    tolerance: float
    agreement: float
    """Share of places with the same likeliest token."""
    effect: float
    """Relative difference of the logits that the adapter makes."""
    quantised_difference: float | None
    """Adapter on the 4-bit base against adapter on the original one; None where it was not trained on 4 bits."""
    version: str = __version__


def merge(
    checkpoint: str,
    out: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    allow_quantised: bool = False,
    max_shard: str = "5GB",
    device: str = "cpu",
) -> MergeReport:
    """Writes the merged model to `out`, or nothing; `checkpoint` is an adapter, a checkpoint or a run's folder.

    Raises: ModelError, CheckpointError, UsageError.
    """
    limit = size_of(max_shard)
    check_out(out)
    folder = model_place(checkpoint)
    if not (folder / "adapter_config.json").exists():
        raise ModelError(Problem("E-MERGE-NOTHING", "there is no adapter to merge", str(folder), "a whole model",
                                 "a checkpoint with adapter_config.json", "use the folder as it is"))  # fmt: skip
    named = base_of(folder, read_json(folder / "adapter_config.json"), base)
    whole: Path | None = None
    if allow_quantised and "quantization_config" in read_json(find(named, "model") / "config.json"):
        whole = dequantised(named, out)
    else:
        check_base(folder, find(named, "model"))
    try:
        plan = planned(folder, str(whole or named), DTYPES[dtype] if dtype else None)
        result = plan.dtype or stored_dtype(plan.folder)
        with commit_dir(out, meta={"kind": "merged", "checkpoint": str(folder), "base": named}) as temporary:
            written, changed = write_weights(plan, temporary, limit)
            write_side_files(plan, temporary, result)
            report = checked(plan, temporary, result, device)
            report = replace(report, base=named, tensors=written, changed=changed)
            write_json(temporary / "MERGE.json", asdict(report))
    finally:
        if whole is not None:
            remove_dir(whole)
    return report


def check_out(out: Path) -> None:
    """Refuses a place that holds something other than an earlier merge."""
    sweep(out.parent)
    if out.exists() and not out.is_dir():
        raise ModelError(Problem("E-OUT-EXISTS", "there is something at the place to write to", str(out), "a file",
                                 "a new or empty folder", "give another OUT"))  # fmt: skip
    if out.is_dir() and any(out.iterdir()) and (verify(out, contents=False) or not (out / "MERGE.json").exists()):
        raise ModelError(Problem("E-OUT-EXISTS", "there is something at the place to write to", str(out),
                                 ", ".join(sorted(file.name for file in out.iterdir())[:6]), "a new or empty folder",
                                 "give another OUT"))  # fmt: skip


def write_weights(plan: Plan, out: Path, limit: int) -> tuple[int, int]:
    """Writes the tensors; how many there are, and how many of them changed.

    Raises: ModelError where a change met no tensor, or a tensor is not finite.
    """
    shards = Shards(out, limit)
    names, met = set(), set()
    for name, tensor, dtype, changed in merged_tensors(plan):
        shards.add(name, tensor, dtype)
        names.add(name)
        met |= {name} if changed else set()
    if lost := sorted(plan.changes.keys() - met):
        raise ModelError(Problem("E-MERGE-NAMES", "the adapter changes tensors that the base's files do not have",
                                 str(plan.folder), ", ".join(lost[:4]), remedy="fetch the base again"))  # fmt: skip
    shards.close()
    return len(names), len(met)


def write_side_files(plan: Plan, out: Path, dtype: torch.dtype) -> None:
    """Config, tokenizer, template and generation config."""
    values = read_json(plan.folder / "config.json")
    if internlm2.is_model(values):
        values = plan.config.to_dict()
    config = portable_config(values, dtype)
    if plan.parted or "tie_word_embeddings" in config:
        config["tie_word_embeddings"] = plan.tied
    if plan.rows != plan.config.get_text_config().vocab_size:
        config["vocab_size"] = plan.rows
    write_json(out / "config.json", config)
    write_tokenizer(plan.checkpoint, plan.folder, out)
    write_generation(plan.checkpoint, plan.folder, stop_ids(from_folder(out, code=False), None), out)


def checked(plan: Plan, out: Path, dtype: torch.dtype, device: str) -> MergeReport:
    """The report of a merged folder that says what the adapted model says.

    Raises: ModelError where it does not.
    """
    tokenizer = from_folder(out, code=False)
    texts = probes(tokenizer, plan.new_ids)
    model = adapted(plan, tokenizer, None, device)
    wanted = logits_of(model, texts)
    with model.disable_adapter():
        bare = logits_of(model, texts)
    quantised = None
    if trained_on_four_bits(plan.checkpoint):
        del model
        model = adapted(plan, tokenizer, NF4(), device)
        quantised = difference(logits_of(model, texts), wanted)
    del model
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32 if dtype == torch.float16 else dtype, use_safetensors=True
        )
    found = logits_of(model.to(torch_device(device)).eval(), texts)
    far = difference(found, wanted)
    if not far <= TOLERANCE[dtype]:
        raise ModelError(Problem("E-MERGE-CHECK", "the merged model does not say what the adapted one says", str(out),
                                 f"logits differ by {far:.2e} of their size", f"at most {TOLERANCE[dtype]:.0e}",
                                 "nothing was written; please report this adapter's configuration"))  # fmt: skip
    return MergeReport(str(plan.checkpoint), plan.base, str(dtype).removeprefix("torch."), 0, 0, plan.tied, far,
                       TOLERANCE[dtype], agreement(found, wanted), difference(wanted, bare), quantised)  # fmt: skip


def adapted(plan: Plan, tokenizer: PreTrainedTokenizerFast, quant: NF4 | None, device: str) -> Any:
    """The adapter on its base, in memory, by peft."""
    source = CausalLM(plan.base, adapter=LoRA(), quant=quant, dtype=stored(plan.base))  # frozen, so in that dtype
    causal = load_weights(source, tokenizer, plan.vocabulary, plan.new_ids, torch_device(device))
    return load_adapter(causal, plan.checkpoint)


def trained_on_four_bits(checkpoint: Path) -> bool:
    """Whether the checkpoint's record says that its base was in 4 bits."""
    record = checkpoint / "finetuner.json"
    return record.exists() and read_json(record).get("quant") is not None


def dequantised(base: str, out: Path) -> Path:
    """A folder beside `out` with the weights that a 4-bit base stands for; to be removed afterwards."""
    source = find(base, "model")
    folder = out.parent / f"{out.name}.dequantised"
    with commit_dir(folder) as temporary, quiet():
        model = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True).dequantize()
        shards = Shards(temporary, size_of("5GB"))
        for name, parameter in model.named_parameters():  # tied ones once
            shards.add(name, parameter.detach(), parameter.dtype)
        shards.close()
        write_json(temporary / "config.json", portable_config(read_json(source / "config.json"), model.dtype))
        write_tokenizer(source, source, temporary)
    return folder
