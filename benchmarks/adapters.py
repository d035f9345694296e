"""What a step through adapters costs, in time and in memory held for the backward pass, on a CPU in bfloat16.

    python benchmarks/adapters.py [--rounds 5] [--tokens 1024] [--long 2048 8192]

- The floor is the frozen base: one adapter of rank 1 in the first layer, so that the backward pass goes all the way.
- Ours holds A and B in float32 and multiplies in bfloat16. "peft's default" multiplies in float32, with a float32 copy
  of each layer's input; "peft in bfloat16" holds A and B in bfloat16 too, where small updates are lost.
- QLoRA is ours over NF4 weights, against ours over bfloat16 weights, at each of `--long` tokens.

Kinds take turns in one process; a ratio is of two CPU times of one round.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from toy import CONFIG, write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from finetuner import NF4, CausalLM, LoRA
from finetuner.data.batch import IGNORED, Batch
from finetuner.model.build import build
from finetuner.model.causal_lm import CausalLearner

SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4,
         "max_position_embeddings": 16384, "vocab_size": 4096}  # fmt: skip
FLOOR = LoRA(rank=1, targets=("layers.0.self_attn.q_proj",))


def learner(folder: Path, **fields: object) -> CausalLearner:
    """A learner of the model in `folder`, all of its activations kept."""
    torch.manual_seed(0)
    model = CausalLM(str(folder), checkpointing=False, **{"adapter": LoRA(rank=16), **fields})
    return build(model, torch.device("cpu"), dialogues=True).learner


def as_peft(made: CausalLearner, dtype: torch.dtype) -> CausalLearner:
    """`made` with A and B held and multiplied in `dtype`, without autocast, as peft does by itself."""
    for module in made.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = True
    for _, parameter in made.trainable():
        parameter.data = parameter.data.to(dtype)
    made.autocast = contextlib.nullcontext
    return made


def row(tokens: int) -> Batch:
    """A packed row of four documents, of which two fifths are learned."""
    draw = torch.Generator().manual_seed(0)
    lengths = tuple(tokens * part // 16 for part in (7, 4, 3, 2))
    tokens_1T = torch.randint(300, 4096, (1, tokens), generator=draw)
    targets_1T = torch.where(torch.rand(1, tokens, generator=draw) < 0.4, tokens_1T.roll(-1, 1), IGNORED)
    positions_1T = torch.cat([torch.arange(length) for length in lengths])[None]
    return Batch(tokens_1T, targets_1T, positions_1T, lengths, (), int((targets_1T != IGNORED).sum()))


@contextlib.contextmanager
def counting(made: CausalLearner) -> Iterator[list[int]]:
    """Fills the list with the bytes that the block saves for the backward pass, the weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in made.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}
    total: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total.append(sum(size for size, _ in kept.values()))


def seconds(made: CausalLearner, batch: Batch) -> float:
    """CPU seconds of one forward and backward pass."""
    made.zero_grad()
    begin = time.process_time()
    made(batch).backward()
    return time.process_time() - begin


def table(kinds: dict[str, CausalLearner], batch: Batch, rounds: int) -> None:
    """Prints each kind against the first."""
    first, *_ = kinds
    saved = {}
    for name, made in kinds.items():
        with counting(made) as total:
            loss = made(batch)
        saved[name] = total[0] / 2**20
        del loss
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds + 1):
        for name, made in kinds.items():
            taken = seconds(made, batch)
            if number:  # the first round warms up
                times[name].append(taken)
    print(f"{batch.tokens_1T.shape[1]:,} tokens{'':<12}{'min':>8}{'median':>8}{'max':>8}{'s':>8}{'MiB kept':>10}")
    for name in kinds:
        ratios = [own / base for own, base in zip(times[name], times[first], strict=True)]
        print(f"{name:<24}{min(ratios):>8.2f}{statistics.median(ratios):>8.2f}{max(ratios):>8.2f}", end="")
        print(f"{statistics.median(times[name]):>8.2f}{saved[name]:>10.0f}", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--long", type=int, nargs="*", default=[2048, 8192])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = write_tokenizer(Path(name))
        torch.manual_seed(0)
        values = {key: value for key, value in (CONFIG | SIZES).items() if key != "model_type"}
        LlamaForCausalLM(LlamaConfig(**values)).bfloat16().save_pretrained(folder)
        ours = learner(folder)
        kinds = {
            "floor: frozen base": learner(folder, adapter=FLOOR),
            "ours": ours,
            "peft in bfloat16": as_peft(learner(folder), torch.bfloat16),
            "peft's default": as_peft(learner(folder), torch.float32),
            "ours, dropout 0.05": learner(folder, adapter=LoRA(rank=16, dropout=0.05)),
        }
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.rounds} rounds")
        table(kinds, row(args.tokens), args.rounds)
        packed = learner(folder, quant=NF4())
        for tokens in args.long:
            table({"LoRA": ours, "QLoRA": packed}, row(tokens), max(2, args.rounds - 2))


if __name__ == "__main__":
    main()
