"""A conversation with a model, line by line: what is typed in, what is told back.

- Nothing of the history is ever dropped in silence: what no longer fits is told, and /reset is the way on.
- A line that could not be answered is not kept.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetuner.errors import FinetunerError, nearest
from finetuner.generate.answer import Answer

HELP = """/reset         begin anew; the system message stays
/system TEXT   set the system message; without TEXT, show it
/save FILE     append the conversation to FILE, as a row of JSON lines that can be trained on
/exit          end (so does Ctrl-D)
/help          this text
A line that begins with a blank is said as it is, also if a / follows."""
COMMANDS = ("/reset", "/system", "/save", "/exit", "/help")


class Asked(Protocol):
    """What answers: the messages so far, the number of the turn, where pieces of the answer go."""

    def __call__(self, messages: list[dict[str, str]], turn: int, stream: Callable[[str], None]) -> Answer: ...


@dataclass(slots=True)
class Conversation:
    """`messages` so far; `show` is given the pieces of an answer, `tell` what is said about it."""

    ask: Asked
    show: Callable[[str], None]
    tell: Callable[[str], None]
    messages: list[dict[str, str]]
    turn: int = 0

    def take(self, line: str) -> bool:
        """Answers a line, or does what it commands; False where it ends the conversation."""
        if not line.strip():
            return True
        if line.startswith("/"):
            command, _, rest = line.strip().partition(" ")
            return self._command(command, rest.strip())
        if "\ufffd" in line:
            self.tell("some bytes of the line were not UTF-8; they were replaced")
        self._say(line.strip())
        return True

    def _say(self, text: str) -> None:
        turned = [*self.messages, {"role": "user", "content": text}]
        try:
            given = self.ask(turned, self.turn, self.show)
        except FinetunerError as error:
            self.tell(f"{error}\nthe line was not kept; the conversation stands as before it")
            return
        except KeyboardInterrupt:
            self.show("\n")
            self.tell("stopped; the line and its answer were not kept")
            return
        self.show("\n")
        if given.stopped == "length":
            self.tell(f"the answer was cut at {given.tokens} tokens")
        self.messages = [*turned, {"role": "assistant", "content": given.text}]
        self.turn += 1

    def _command(self, command: str, rest: str) -> bool:
        match command:
            case "/exit":
                return False
            case "/help":
                self.tell(HELP)
            case "/reset":
                self.messages = [message for message in self.messages if message["role"] == "system"]
                self.tell("a new conversation")
            case "/system":
                self._system(rest)
            case "/save":
                self._save(rest)
            case _:
                best = nearest(command, COMMANDS)
                self.tell(f"no command {command}{f'; did you mean {best}?' if best else ''} (/help lists them)")
        return True

    def _system(self, text: str) -> None:
        others = [message for message in self.messages if message["role"] != "system"]
        if text:
            self.messages = [{"role": "system", "content": text}, *others]
            self.tell("the system message is set" + (", for the conversation as it stands" if others else ""))
        else:
            own = [message["content"] for message in self.messages if message["role"] == "system"]
            self.tell(own[0] if own else "no system message; /system TEXT sets one")

    def _save(self, name: str) -> None:
        if not name:
            self.tell("where to? /save FILE")
            return
        if not any(message["role"] == "assistant" for message in self.messages):
            self.tell("there is nothing to save yet")
            return
        try:
            with Path(name).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            self.tell(f"not saved: {error.strerror}: {name}")
            return
        self.tell(f"saved: {name}")


def shown(text: str) -> str:
    """`text` with control characters as escapes: what a model says cannot drive a terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in text)


def on_one_line(text: str) -> str:
    r"""`text` for scripts that read lines: a line break is written as \n."""
    return shown(text).replace("\n", "\\n").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
