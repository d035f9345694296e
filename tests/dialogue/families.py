"""Tokenizers and conversations for the template families; imports nothing from finetuner."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|action_start|>", "<|action_end|>", "<|plugin|>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<image>",
]  # fmt: skip
"""Special tokens of every family at once."""
ORDINARY = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<｜User｜>", "<｜Assistant｜>"]
"""Added tokens that are not special, as their families have them."""
WORDS = ["the quick brown fox jumps over the lazy dog!", "user assistant system name arguments \n\n USER: ASSISTANT:"]

WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How Llama 3 and Qwen part words: line ends stand together, so that a prompt's last token does not depend on what
follows."""


@cache
def byte_level(rstrip: bool = False) -> str:
    """tokenizer.json of a byte-level BPE whose id 0 is "!"; `rstrip`: special tokens swallow the blanks behind them."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    built.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    built.train_from_iterator(WORDS * 8, trainer)
    built.add_special_tokens([AddedToken(name, normalized=False, rstrip=rstrip) for name in SPECIAL])
    built.add_tokens([AddedToken(name, normalized=False) for name in ORDINARY])
    return str(built.to_str())


@cache
def sentencepiece() -> str:
    """tokenizer.json in the manner of Llama 2: "▁" for a blank and before each piece, bytes for unknown characters."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["▁", *map(chr, range(33, 127)), "▁a", "he", "▁the", "an", "or"]
    merges = [("▁", "a"), ("h", "e"), ("a", "n"), ("o", "r")]
    vocab = {name: number for number, name in enumerate(dict.fromkeys(names))}
    built = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    built.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    built.add_tokens([AddedToken(name, normalized=False) for name in ORDINARY])
    return str(built.to_str())


@cache
def unigram() -> str:
    """tokenizer.json of a Unigram model that finds whole pieces, "</s>" too, in ordinary text."""
    built = Tokenizer(models.Unigram())
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    built.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    built.train_from_iterator(WORDS * 8 + ATOMS * 5, trainer)
    built.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    built.add_tokens([AddedToken(name, normalized=False) for name in ORDINARY])
    return str(built.to_str())


ATOMS = [
    "hello", " the", "{{ name }}", "{% if %}", "{}", "😀", "é", "e\u0301", "中文", "\r\n",
    "\n", "  ", "!", "!!", "7", "\t", "#}",
    '"quoted"', "\\n", "user\n", "USER:", " ASSISTANT: ", "None",
]  # fmt: skip
CONTROL = ["</s>", "<|im_end|>", "<image>", "<|im_start|>assistant\n", "<|eot_id|>", "[/INST]", "<|end|>", "<s>"]


def text(rng: random.Random, control: bool) -> str:
    """A text that says something, made of awkward pieces."""
    pool = ATOMS + CONTROL if control else ATOMS
    while True:
        made = "".join(rng.choice(pool) for _ in range(rng.randint(1, 7)))
        if made.strip():
            return made


def conversation(seed: int, *, control: bool = False, system: bool = True) -> list[dict[str, Any]]:
    """One to four turns."""
    rng = random.Random(seed)
    messages = []
    if system and rng.random() < 0.4:
        messages.append({"role": "system", "content": text(rng, control)})
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": text(rng, control)})
        messages.append({"role": "assistant", "content": text(rng, control)})
    return messages


TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "gives\n</s>", "parameters": {"é": ["<|im_end|>"]}}}
]


def tool_talk(arguments: dict[str, Any], said: str = "", answer: str = '{"t": "22\n"}') -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return [
        {"role": "system", "content": "help"},
        {"role": "user", "content": " w?"},
        {"role": "assistant", "content": said, "tool_calls": [call]},
        {"role": "tool", "content": answer},
        {"role": "assistant", "content": "22 "},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "bye"},
    ]
