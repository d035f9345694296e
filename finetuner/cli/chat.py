"""`finetuner chat FOLDER_OR_MODEL`: talks with a checkpoint, a run, an adapter, a merged or a pretrained model.

- Without `--ask` lines are read from the terminal, or from a pipe, until /exit or the end.
- With `--ask`, each text is a conversation of its own, and each answer one line of standard output.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from finetuner.cli.numbers import at_least_one, not_negative, share
from finetuner.errors import Problem, UsageError

if TYPE_CHECKING:
    from finetuner.generate.answer import Answer
    from finetuner.generate.load import Answerer


def add(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("model", metavar="FOLDER_OR_MODEL", help="a run, a checkpoint, an adapter, a model, a hub name")
    parser.add_argument(
        "--ask", nargs="+", action="extend", metavar="TEXT", help="answer each by itself, a line each, and end"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max-tokens", type=at_least_one, default=512, metavar="N", help="of an answer (512)")
    parser.add_argument(
        "--temperature", type=not_negative, default=0.0, metavar="T", help="0 (the default): always the likeliest token"
    )
    parser.add_argument("--top-p", type=share, default=1.0, metavar="P", help="draw from the likeliest P of tokens (1)")
    parser.add_argument("--seed", type=int, metavar="N", help="makes draws repeatable")
    parser.add_argument("--quant", choices=["nf4"], help="hold the weights in 4 bits")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="compute in it (default: as stored)")
    parser.add_argument("--base", metavar="MODEL", help="an adapter's base, where it is not at its old place")
    parser.add_argument("--template", metavar="NAME", help="chat template, where the folder has none")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")


def run(args: argparse.Namespace) -> int:
    """Talks; gives the exit code."""
    if args.ask and not all(text.strip() for text in args.ask):
        raise UsageError(
            Problem("E-USAGE", "--ask needs a text", "--ask", fits="a text", remedy='--ask "Who are you?"')
        )
    from finetuner.generate.load import load_for_chat

    answerer = load_for_chat(args.model, base=args.base, quant=args.quant, template=args.template, device=args.device,
                             dtype=args.dtype)  # fmt: skip
    return answer_each(answerer, args) if args.ask else converse(answerer, args)


def answer_each(answerer: Answerer, args: argparse.Namespace) -> int:
    """One line for each `--ask`."""
    from finetuner.generate.conversation import on_one_line

    for text in args.ask:
        given = ask(answerer, args, [*system(args), {"role": "user", "content": text}], 0, None)
        print(on_one_line(given.text), flush=True)
    return 0


def converse(answerer: Answerer, args: argparse.Namespace) -> int:
    """A conversation, until /exit or the end of the input."""
    from finetuner.generate.conversation import Conversation, shown

    def show(piece: str) -> None:
        print(shown(piece), end="", flush=True)

    def tell(text: str) -> None:
        print(shown(text), file=sys.stderr, flush=True)

    def answered(messages: list[dict[str, str]], turn: int, stream: Callable[[str], None]) -> Answer:
        return ask(answerer, args, messages, turn, stream)

    tell(f"{answerer.name}\n/help lists the commands")
    conversation = Conversation(answered, show, tell, system(args))
    for line in lines():
        if not conversation.take(line):
            break
    return 0


def ask(
    answerer: Answerer,
    args: argparse.Namespace,
    messages: list[dict[str, str]],
    turn: int,
    stream: Callable[[str], None] | None,
) -> Answer:
    """The next turn, under the options of the command line."""
    return answerer.ask(
        messages, max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p,
        seed=None if args.seed is None else args.seed + turn, stream=stream,
    )  # fmt: skip


def system(args: argparse.Namespace) -> list[dict[str, str]]:
    """The system message, if one was given."""
    return [{"role": "system", "content": args.system}] if args.system else []


def lines() -> Iterator[str]:
    """Lines of the terminal, with its editing, or of a pipe; bytes that are not UTF-8 do not end them."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  # gives `input` its editing and history

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
