"""The nouns that say what is learned from: where rows lie, how a row is read, how long a sample may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from finetuner.config.node import Node, node, refuse
from finetuner.dialogue import rows as row_functions

Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(gt=0)]
Files = Name | tuple[Name, ...]
RowFunction = Callable[..., Any]


@node
class Json(Node):
    """Rows of .json (an array) or .jsonl (one a line) files; which of the two is seen in the file itself."""

    files: Files
    """A file, a glob, a folder, or several of them."""


@node
class Csv(Node):
    """Rows of .csv files with a header line."""

    files: Files
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","


@node
class Parquet(Node):
    """Rows of .parquet files."""

    files: Files


@node
class Text(Node):
    """Plain text files; each row is {"text": ...}."""

    files: Files
    document: Literal["line", "file"] = "line"
    """What a row is: a line that is not blank, or a whole file."""


@node
class Hub(Node):
    """A data set of the Hugging Face hub, or of its local cache when offline."""

    name: Name
    subset: Name | None = None
    split: Name = "train"
    revision: Name | None = None


Source = Json | Csv | Parquet | Text | Hub


@node
class Skip(Node):
    """Leaves up to `limit` wrong rows out, counts each in data_report.json, and refuses more."""

    limit: Positive


@node
class Dialogues(Node):
    """Conversations, learned on the assistant's turns."""

    source: Source
    rows: RowFunction = row_functions.openai
    """What reads a row: one of `finetuner.dialogue.rows`, or a function of your own."""
    length: Annotated[int, Field(ge=8)] = 2048
    """Tokens of a training row; no sample is longer."""
    pack: bool = True
    """Lay several samples into one row of `length` tokens; they do not see each other."""
    too_long: Literal["error", "drop", "truncate"] = "error"
    """What happens to a sample of more than `length` tokens; each one is counted."""
    turns: Literal["all", "last", "split"] = "all"
    """Which assistant turns are learned: all; only the last; or one sample for each (exact for thinking models)."""
    system: Name | None = None
    """System message for rows that have none."""
    on_bad_row: Literal["error"] | Skip = "error"
    replace: tuple[tuple[Name, str], ...] = ()
    """Words to replace in every row, such as (("{{name}}", "Ada"),)."""


@node
class Documents(Node):
    """Texts for continued pretraining, learned on every token, laid end to end into rows of `length` tokens."""

    source: Source
    rows: RowFunction = row_functions.text
    length: Annotated[int, Field(ge=8)] = 2048
    on_bad_row: Literal["error"] | Skip = "error"
    replace: tuple[tuple[Name, str], ...] = ()


@node
class Mix(Node):
    """Several data sets by weight: of an epoch's samples, each part gives its share, repeated or thinned as needed.

    An epoch has as many samples as the parts together. `Mix(((chat, 3.0), (code, 1.0)))`: three of four from chat.
    """

    parts: tuple[tuple[Dialogues | Documents, Annotated[float, Field(gt=0)]], ...]

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            found = str(len(self.parts))
            refuse("E-MIX", "a Mix has two parts or more", found=found, remedy="give the data set itself")
        lengths = {part.length for part, _ in self.parts}
        if len(lengths) > 1:
            refuse(
                "E-MIX",
                "the parts of a Mix have one length",
                found=", ".join(map(str, sorted(lengths))),
                remedy="give each the same length=...",
            )
        packs = {part.pack for part, _ in self.parts if isinstance(part, Dialogues)}
        if len(packs) > 1:
            refuse(
                "E-MIX",
                "the parts of a Mix are packed, or are not",
                found="pack=True beside pack=False",
                remedy="give each the same pack=...",
            )

    @property
    def length(self) -> int:
        return self.parts[0][0].length


Data = Dialogues | Documents | Mix
