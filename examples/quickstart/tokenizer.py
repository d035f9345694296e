"""Trains a byte-level BPE tokenizer of 1,024 tokens on the example texts, and writes a folder that others load.

    python examples/quickstart/tokenizer.py FOLDER

- `<|im_end|>` ends a turn and a text alike, so that a model pretrained on texts already knows how to stop.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

DATA = Path(__file__).parent.parent / "data"
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
WORDS = 1024


def texts() -> Iterator[str]:
    """The texts of the world, and what is said in the rows; not the rows' own marks."""
    for file in sorted(DATA.glob("*.txt")):
        yield file.read_text(encoding="utf-8")
    for row in map(json.loads, (DATA / "identity.jsonl").read_text(encoding="utf-8").splitlines()):
        yield from row.values()


def main(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
