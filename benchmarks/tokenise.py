"""Tokenising chat rows with masks: ours against `datasets.map` with `apply_chat_template` a row; rates and peak memory.

    python benchmarks/tokenise.py [--rows 20000]

- Both start from the same .jsonl file and end with ids and masks on disk; their tokens and masks are compared.
- Each measurement is a process of its own, so that its peak memory is its own; the ratios are of one run.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def prose() -> list[str]:
    """Sentences of the language reference and of the docstrings that Python carries: English as people write it."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    for file in sorted(Path(os.__file__).parent.rglob("*.py")):
        if "site-packages" in file.parts or "test" in file.parts:
            continue
        with contextlib.suppress(SyntaxError, UnicodeDecodeError), warnings.catch_warnings(action="ignore"):
            nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            texts += [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    text = " ".join(" ".join(part.split()) for part in texts)
    return [sentence.strip() + "." for sentence in text.split(". ") if 20 < len(sentence) < 300 and "{" not in sentence]


def make_rows(path: Path, count: int, lines: list[str]) -> None:
    """Conversations of one to four turns, about 1.2 kB each, of sentences of prose."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            messages = []
            for _ in range(draw.randint(1, 4)):
                messages.append({"role": "user", "content": " ".join(draw.choices(lines, k=draw.randint(1, 3)))})
                messages.append({"role": "assistant", "content": " ".join(draw.choices(lines, k=draw.randint(1, 5)))})
            file.write(json.dumps({"messages": messages}) + "\n")


def make_tokenizer(folder: Path, lines: list[str]) -> None:
    """A byte-level BPE of 16,384 tokens, trained on the same prose."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=16384, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    built.train_from_iterator(lines, trainer)
    folder.mkdir()
    built.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def ours(folder: Path, rows: Path, workers: int) -> dict[str, Any]:
    from finetuner.config.data import Dialogues, Json
    from finetuner.data.samples import prepare
    from finetuner.dialogue.encode import EncoderSpec
    from finetuner.dialogue.rows import openai

    tokenizer = (folder / "tokenizer" / "tokenizer.json").read_text()
    spec = EncoderSpec(tokenizer, TEMPLATE, special=(("eos_token", "<|im_end|>"),))
    data = Dialogues(Json(str(rows)), rows=openai, length=65536)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        start, work = time.perf_counter(), cpu()
        samples = prepare(data, spec, cache=Path(cache), workers=workers)
        seconds, work = time.perf_counter() - start, cpu() - work
        start = time.perf_counter()
        prepare(data, spec, cache=Path(cache), workers=workers)
        again = time.perf_counter() - start
        print_of = [(samples[n].tokens_T.tolist(), samples[n].targets_T.tolist()) for n in range(0, len(samples), 100)]
    tokens, learned = samples.report["tokens_in"], samples.report["tokens_learned"]
    return {
        "seconds": seconds,
        "cpu": work,
        "again": again,
        "tokens": tokens,
        "learned": learned,
        "print": digest(print_of),
    }


def theirs(folder: Path, rows: Path) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        done = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": done["input_ids"], "assistant_masks": done["assistant_masks"]}

    with tempfile.TemporaryDirectory(dir=folder) as cache:
        start, work = time.perf_counter(), cpu()
        table = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=cache)
        done = table.map(encode, remove_columns=table.column_names)
        seconds, work = time.perf_counter() - start, cpu() - work
        print_of, tokens, learned = [], 0, 0
        for number, row in enumerate(done):
            ids, mask = row["input_ids"], row["assistant_masks"]
            tokens, learned = tokens + len(ids), learned + sum(mask[1:])
            if number % 100 == 0:
                targets = [token if on else -100 for token, on in zip(ids[1:], mask[1:])]
                print_of.append((ids, [*targets, -100]))
    return {"seconds": seconds, "cpu": work, "tokens": tokens, "learned": learned, "print": digest(print_of)}


def floor(folder: Path, rows: Path) -> dict[str, Any]:
    """The tokenizer's own work on one thread: the rendered texts, ids only, nothing read and nothing written."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    talks = [json.loads(line)["messages"] for line in rows.read_text().splitlines()]
    texts = ["".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in talk) for talk in talks]
    start, work, tokens = time.perf_counter(), cpu(), 0
    for first in range(0, len(texts), 512):
        done = tokenizer.encode_batch_fast(texts[first : first + 512], add_special_tokens=False)
        tokens += sum(len(one.ids) for one in done)
    return {"seconds": time.perf_counter() - start, "cpu": cpu() - work, "tokens": tokens}


def cpu() -> float:
    """Processor seconds of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def digest(value: Any) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def measured(folder: Path, rows: Path, kind: str) -> dict[str, Any]:
    """Runs one kind in a process of its own."""
    command = [sys.executable, __file__, "--one", kind, str(folder), str(rows)]
    alone = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"} if kind == "floor" else {}
    done = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, folder, rows = options.one[0], Path(options.one[1]), Path(options.one[2])
        kinds = {"theirs": theirs, "floor": floor}
        result = kinds[kind](folder, rows) if kind in kinds else ours(folder, rows, int(kind))
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        print(json.dumps(result | {"rss": max(usage.ru_maxrss for usage in usages) / 1024}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = prose()
        make_tokenizer(folder / "tokenizer", lines)
        few, many = folder / "few.jsonl", folder / "many.jsonl"
        make_rows(few, options.rows // 4, lines)
        make_rows(many, options.rows, lines)
        peer = measured(folder, many, "theirs")
        print("                           rows/s  ratio  wall s   cpu s  again s  peak MiB  at 1/4 of the rows")
        print(row("datasets.map, 1 process", options.rows, peer, peer, None))
        print(row("the tokenizer, 1 thread", options.rows, measured(folder, many, "floor"), peer, None))
        for workers in (1, 2):
            own, small = measured(folder, many, str(workers)), measured(folder, few, str(workers))
            same = all(own[key] == peer[key] for key in ("tokens", "learned", "print"))
            print(row(f"finetuner, {workers} process(es)", options.rows, own, peer, small))
            print(f"  tokens and masks are {'the same' if same else 'NOT THE SAME'}: {own['tokens']} {own['learned']}")


def row(name: str, rows: int, one: dict[str, Any], peer: dict[str, Any], small: dict[str, Any] | None) -> str:
    """A line of the table; `small` is the same with a quarter of the rows."""
    seconds, again = one["seconds"], f"{one['again']:.2f}" if "again" in one else ""
    figures = f"{rows / seconds:8.0f} {peer['seconds'] / seconds:6.2f} {seconds:7.1f} {one['cpu']:7.1f} {again:>8}"
    return f"{name:24} {figures} {one['rss']:9.0f} {'' if small is None else round(small['rss']):>19}"


if __name__ == "__main__":
    main()
