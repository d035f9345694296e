"""`finetuner preview CONFIG`: the first samples as the model will see them, learned tokens marked.

- `--json` prints ids, targets, positions and documents: the one oracle for tests, users and bug reports.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from typing import Any

from finetuner.cli.numbers import at_least_one
from finetuner.config.data import Dialogues, Documents, Mix
from finetuner.config.load import load
from finetuner.errors import DataError, Problem, printable

LEARNED, PLAIN = "\x1b[32m", "\x1b[0m"


def add(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    parser.add_argument("--rows", type=at_least_one, default=3, metavar="N", help="how many rows of each data set (3)")
    parser.add_argument("--json", action="store_true", help="ids, targets, positions and documents as JSON lines")


def run(args: argparse.Namespace) -> int:
    """Prints the samples; gives the exit code."""
    loaded = load(args.config, args.overrides)
    data = loaded.run.data
    for part in [part for part, _ in data.parts] if isinstance(data, Mix) else [data]:
        for sample in samples(loaded.run.model, part, args.rows):
            print(json.dumps(sample, ensure_ascii=False) if args.json else coloured(sample))
    return 0


def samples(model: Any, part: Dialogues | Documents, count: int) -> list[dict[str, Any]]:
    """The samples of the first `count` rows of a data set, as JSON values.

    Raises:
        DataError: the first of these rows that is wrong.
    """
    from finetuner.data.batch import IGNORED
    from finetuner.data.samples import job_of
    from finetuner.data.source import rows_of
    from finetuner.data.worker import Encoding
    from finetuner.model.tokenizer import encoder_spec, load_tokenizer
    from finetuner.runtime.files import BadRow

    tokenizer = load_tokenizer(model)
    turns, system = (part.turns, part.system) if isinstance(part, Dialogues) else ("all", None)
    encoding = Encoding(job_of(part, encoder_spec(tokenizer, turns=turns, system=system)))
    told = []
    for found in itertools.islice(rows_of(part.source), count):
        made = encoding.one(found)
        if isinstance(made, BadRow):
            remedy = "mend the row; training tells all such rows at once"
            code = f"E-ROW-{made.kind.upper()}"
            raise DataError(Problem(code, made.reason, made.place, made.found, made.fits, remedy))
        assert isinstance(found, tuple), "a bad row has no samples"
        for one in made:
            ids = one.ids.tolist()
            pieces = [tokenizer.decode([token]) for token in ids]
            learned = [bool(mark) for mark in one.learned.tolist()]
            targets = [token if mark else IGNORED for token, mark in zip(ids[1:], learned[1:], strict=True)] + [IGNORED]
            told.append(
                {
                    "place": found[0],
                    "tokens": ids,
                    "targets": targets,
                    "pieces": pieces,
                    "learned": learned,
                    "positions": list(range(len(pieces))),
                    "documents": [len(pieces)],
                    "text": tokenizer.decode(ids),
                }
            )
    return told


def coloured(sample: dict[str, Any]) -> str:
    """A sample as text, its learned tokens green, or in [[ ]] where colours are off."""
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    on, off = (LEARNED, PLAIN) if colours else ("[[", "]]")
    text = ""
    for learned, group in itertools.groupby(
        zip(sample["learned"], sample["pieces"], strict=True), key=lambda pair: pair[0]
    ):
        words = printable("".join(piece for _, piece in group))
        text += f"{on}{words}{off}" if learned else words
    learned_tokens = sum(sample["learned"])
    return f"-- {sample['place']} · {len(sample['tokens'])} tokens, {learned_tokens} learned\n{text}\n"
