"""The command line: one verb, its arguments, an exit code.

- Only the verb that is called is imported, so `finetuner --help` and a config's errors cost no torch.
- Whatever a person can mend is told without a traceback; `--debug`, anywhere on the line, shows it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import finetuner
from finetuner.cli.machine import of_the_machine
from finetuner.errors import FinetunerError, Problem, UsageError, nearest, printable
from finetuner.runtime.log import tell


@dataclass(frozen=True, slots=True)
class Verb:
    """Where a verb stands: `add(parser)` of the module declares its arguments, `run(args)` gives the exit code."""

    module: str
    help: str
    add: str = "add"
    run: str = "run"


VERBS = {
    "train": Verb("train", "train the run that a config file describes; go on with one that was interrupted"),
    "check": Verb("check", "find everything that is wrong before training"),
    "show": Verb("look", "print the resolved config", "add_show", "show"),
    "preview": Verb("preview", "print the first samples, with what is learned in them"),
    "profile": Verb("profile", "measure where the time and the memory of a step go"),
    "estimate": Verb("estimate", "estimate memory, steps and what would fit"),
    "list": Verb("look", "list the ready configs", "add_list", "list_ready"),
    "copy": Verb("look", "copy a ready config, to edit it", "add_copy", "copy"),
    "new": Verb("new", "write a fresh config for a journey"),
    "chat": Verb("chat", "talk with a checkpoint, an adapter or a model"),
    "merge": Verb("export", "merge an adapter into its base model"),
    "convert": Verb("convert", "turn a checkpoint into a folder that other tools load"),
    "compare": Verb("compare", "put two runs or models side by side"),
    "env": Verb("look", "print versions, devices and what is missing", "add_env", "env"),
}
EPILOG = """
A config is a Python file, and finetuner executes it: it is your program, so run no config that you would not run.
Nothing that is found in a checkpoint, an adapter or a data set is ever executed.

  finetuner list qwen                                    ready configs
  finetuner copy NAME my_run.py                          one of them, to edit
  finetuner train my_run.py optim.lr=1e-5                train; the same command goes on after an interruption
  finetuner chat work_dirs/my_run/last                   talk with what came out

Options of one command: finetuner COMMAND --help. --debug, with any of them, shows the traceback of an error.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of one command line: 0; 1 a bug; 2 usage or config; 3 data; 4 model; 5 stopped; 130 Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot write a character gets its escape instead of an exception.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = dispatch([word for word in given if word != "--debug"])
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except FinetunerError as error:
        if debug:
            raise
        tell(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (| head) has left; what is still buffered goes nowhere, or Python complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            raise
        if outside := of_the_machine(error):
            tell(str(outside))
            return outside.exit_code
        text = printable(f"{type(error).__name__}: {error}".partition("\n")[0])
        tell(f"unexpected error: {text}; this is a bug, run again with --debug to see where")
        return 1


def dispatch(words: Sequence[str]) -> int:
    """Runs the verb that stands first."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"finetuner {finetuner.__version__}")
        return 0
    verbs = available()
    if words[0] not in verbs:
        best = nearest(words[0], verbs)
        remedy = f"did you mean `finetuner {best}`?" if best else "see finetuner --help"
        what = f"there is no command {words[0]!r}"
        raise UsageError(Problem("E-USAGE", what, found=words[0], fits=", ".join(verbs), remedy=remedy))
    verb = verbs[words[0]]
    module = importlib.import_module(f"finetuner.cli.{verb.module}")
    parser = parser_for(words[0], verb)
    getattr(module, verb.add)(parser)
    for action in parser._actions:
        # argparse calls an empty field=value missing where CONFIG is.
        action.required = action.required and action.nargs != "*"
    try:
        # Intermixed, so that field=value may stand before, between and behind the options.
        args = parser.parse_intermixed_args(list(words[1:]))
    except SystemExit as stop:
        return int(stop.code or 0)
    return int(getattr(module, verb.run)(args))


def available() -> dict[str, Verb]:
    """The verbs whose file is there."""
    return {n: verb for n, verb in VERBS.items() if importlib.util.find_spec(f"finetuner.cli.{verb.module}")}


def overview() -> str:
    """What `finetuner --help` prints."""
    verbs = "\n".join(f"  {name:<10}{verb.help}" for name, verb in available().items())
    return f"usage: finetuner COMMAND ...\n\nFine-tunes language models: one Python file, one run.\n\n{verbs}\n{EPILOG}"


def parser_for(name: str, verb: Verb) -> argparse.ArgumentParser:
    """An argument parser that tells a wrong line as a `UsageError`."""
    parser = argparse.ArgumentParser(
        f"finetuner {name}", description=verb.help[0].upper() + verb.help[1:] + ".", allow_abbrev=False
    )

    def refuse(message: str) -> NoReturn:
        options = [option for action in parser._actions for option in action.option_strings]
        unknown = message.removeprefix("unrecognized arguments: ") if "unrecognized" in message else ""
        best = nearest(unknown.partition("=")[0].partition(" ")[0], options)
        remedy = f"did you mean {best}?" if best else f"see finetuner {name} --help"
        raise UsageError(Problem("E-USAGE", f"{name}: {message}", fits=parser.format_usage().strip(), remedy=remedy))

    parser.error = refuse  # type: ignore[method-assign]
    return parser
