"""The rig that tests stand on: a tokenizer and a model made on the spot, in seconds, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<pad>", "<|u|>", "<|a|>", "<|im_start|>", "<|im_end|>", "<image>"]
WORDS = [
    "the quick brown fox jumps over the lazy dog",
    "hello world, how are you today? I am fine, thank you.",
    "user assistant system tool function name arguments",
    "what is your name? my name is Ada and I was made by students",
]


def tokenizer(
    folder: Path, *, template: str | None = CHATML, pad_is_eos: bool = False, bos: bool = True, eos: str = "<|im_end|>"
) -> Path:
    """Writes a byte-level BPE tokenizer (about 400 tokens) that `AutoTokenizer` loads; returns the folder."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    built.train_from_iterator(WORDS * 8, trainer)
    built.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    if bos:
        ids = [("<s>", built.token_to_id("<s>"))]
        built.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=ids)
    folder.mkdir(parents=True, exist_ok=True)
    built.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "pad_token": eos if pad_is_eos else "<pad>",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    if bos:
        config["bos_token"] = "<s>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def tiny_llama(folder: Path, *, seed: int = 0, dtype: str = "float32", **config: Any) -> Path:
    """Writes a two-layer Llama (hidden 32, 4 heads, 2 kv heads) with the rig's tokenizer; returns the folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if not (folder / "tokenizer.json").exists():
        tokenizer(folder)
    tok = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": len(tok),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
    } | config
    model = LlamaForCausalLM(LlamaConfig(**values)).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder
