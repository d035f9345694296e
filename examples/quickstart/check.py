"""Holds the quickstart to its word: the base has learned more than how often tokens come; the tuned one has a name.

python examples/quickstart/check.py work_dirs/quickstart
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer

HELD_OUT = Path(__file__).parent.parent / "data" / "held_out.txt"
NAME = "Ada"
SHARE = 0.6
"""The held-out loss is to be less than this share of the unigram entropy."""


def unigram_entropy(tokenizer: Tokenizer) -> float:
    """Nats a token of the held-out text: the loss of the best model that knows only how often each token comes.

    Counted over the tokens that are predicted: all but the first of each line, and the end of the text.
    """
    end = tokenizer.token_to_id("<|im_end|>")
    lines = HELD_OUT.read_text(encoding="utf-8").splitlines()
    counts = Counter(token for line in tokenizer.encode_batch(lines) for token in [*line.ids[1:], end])
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())


def held_out_loss(run: Path) -> float:
    """The last validation loss of a run."""
    records = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [record["eval_loss"] for record in records if "eval_loss" in record][-1]


def main(work: Path) -> int:
    """Prints what holds and what does not; the exit code tells whether all does."""
    entropy = unigram_entropy(Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json")))
    loss = held_out_loss(work / "base")
    before, after = ((work / f"{name}.txt").read_text(encoding="utf-8") for name in ("before", "after"))
    findings = {
        f"held-out loss {loss:.2f} < {SHARE} x unigram entropy {entropy:.2f}": loss < SHARE * entropy,
        f"the base does not say {NAME}": NAME not in before,
        f"the tuned model says {NAME}": NAME in after,
    }
    print()
    for finding, holds in findings.items():
        print(f"{'yes' if holds else 'NO '}  {finding}")
    return 0 if all(findings.values()) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
