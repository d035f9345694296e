"""A chat template: the Jinja text that writes a dialogue down, rendered as transformers renders it.

- The environment is that of `tokenizer.apply_chat_template`: sandboxed, same filters, same globals, same variables.
- `{% generation %}` blocks (the template's own marks of what the assistant says) are found even inside macros.
- A template may refuse a dialogue (`raise_exception`); that is a `RowError`, for the dialogue is what does not fit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetuner.dialogue.message import Dialogue, Message, RowError
from finetuner.errors import ConfigError, ModelError, Problem, nearest

FOLDER = Path(__file__).with_name("templates")
OPEN, CLOSE = "\U0010fffc", "\U0010fffd"
"""Private-use characters (plane 16) around a `{% generation %}` block while its place is looked for."""


class Template:
    """Writes dialogues as text. `special` are the tokenizer's special tokens: {"bos_token": "<s>", ...}."""

    def __init__(self, source: str, *, name: str, special: Mapping[str, str]) -> None:
        self.source, self.name, self.special = source, name, dict(special)
        self.has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self._render = compiled(source, name, Unmarked)
        self._render_marked = compiled(source, name, Marked) if self.has_marks else None

    def render(self, dialogue: Dialogue, *, ask: bool = False) -> str:
        """The text of `dialogue`; with `ask`, also the words that make the assistant speak next.

        Raises: RowError("template") where the template cannot write this dialogue.
        """
        return self._written(self._render, dialogue, ask)

    def marks(self, dialogue: Dialogue) -> list[tuple[int, int]]:
        """The `{% generation %}` blocks of `render(dialogue)` as pairs of character positions."""
        assert self._render_marked is not None, "only a template with marks has them"
        text = self._written(self._render_marked, dialogue, False)
        places = [(found.group(), found.start() - k) for k, found in enumerate(re.finditer(f"[{OPEN}{CLOSE}]", text))]
        assert all(sign == (OPEN, CLOSE)[k % 2] for k, (sign, _) in enumerate(places)), "blocks do not nest"
        return [(start, stop) for (_, start), (_, stop) in zip(places[::2], places[1::2], strict=True)]

    def _written(self, render: Callable[..., str], dialogue: Dialogue, ask: bool) -> str:
        try:
            return render(
                self.special,
                messages=[as_dict(message) for message in dialogue.messages],
                tools=list(dialogue.tools) or None,
                documents=None,
                add_generation_prompt=ask,
            )
        except (TemplateError, TypeError, ValueError, LookupError, OverflowError) as error:
            # The last four: a template is foreign code, and adding None to a string is a TypeError inside it.
            raise RowError("template", f"the template {self.name!r} cannot write this dialogue: {error}") from error


def as_dict(message: Message) -> dict[str, Any]:
    """A message as transformers hands it to a template; a key that has no value is left out."""
    given: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        given["reasoning_content"] = given["thinking"] = message.reasoning
    if message.tool_calls:
        given["tool_calls"] = [
            ({} if call.id is None else {"id": call.id})
            | {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        given["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        given["name"] = message.name
    return given


def bundled(name_or_path: str) -> str:
    """The source of the template of that name in this package, or of the file at that path.

    Raises: ConfigError (E-TEMPLATE-NAME) with the nearest name.
    """
    names = sorted(path.stem for path in FOLDER.glob("*.jinja"))
    path = FOLDER / f"{name_or_path}.jinja" if name_or_path in names else Path(name_or_path)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    best = nearest(name_or_path, names)
    remedy = f"did you mean {best!r}?" if best else "give one of these names, or the path of a .jinja file"
    what = "no chat template of that name, and no file at that path"
    raise ConfigError(Problem("E-TEMPLATE-NAME", what, found=name_or_path, fits=", ".join(names), remedy=remedy))


def compiled(source: str, name: str, generation: type[Extension]) -> Callable[..., str]:
    """The render function of `source` in an environment equal to transformers' own."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(source).render
    except TemplateSyntaxError as error:
        where = f"{name}, line {error.lineno}"
        remedy = "mend the template, or name one of the bundled ones"
        raise ModelError(Problem("E-TEMPLATE-SYNTAX", str(error.message), where, remedy=remedy)) from error


class Unmarked(Extension):
    """Reads `{% generation %}` blocks as if their marks were not there."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)
    around = ("", "")

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_block"), [], [], body).set_lineno(line)

    def _block(self, caller: Callable[[], str]) -> str:
        return self.around[0] + caller() + self.around[1]


class Marked(Unmarked):
    """Puts `OPEN` and `CLOSE` around what a `{% generation %}` block writes."""

    around = (OPEN, CLOSE)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """`value` as JSON, without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> str:
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
