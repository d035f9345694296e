"""Secrets left out of what is printed and saved.

- What is named token, key, secret, password, ...: {"hub_token": "abc"} -> {"hub_token": "***"}. Names of the field,
  such as pad_token or eos_token, stay.
- What looks like a secret wherever it stands: hf_..., sk-..., https://user:password@host.
- What equals the value of an environment variable of such a name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
NAME = r"(?:[a-z0-9]+[_-])*(?:token|key|secret|password|passwd|credentials?|auth)"
SECRET_NAME = re.compile(NAME, re.IGNORECASE)
ORDINARY = re.compile(
    r"(?:(?:pad|eos|bos|unk|sep|cls|mask|image|video|audio|start|end|stop|header|new|special|num|max|min|per|first|last|system|"
    r"user|assistant|sort|group|primary|foreign|row|column|field|decoder|boi|eoi|think)[_-])+(?:token|key)",
    re.IGNORECASE,
)
LOOKS_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{16,}|(?<=://)[^/\s:@'\"]+:[^/\s@'\"]+(?=@)")
ASSIGNED = re.compile(rf"""(\b{NAME}["']?\s*[=:]\s*[bru]*)(["'])(?!\2)(.*?)(?<!\\)\2""", re.IGNORECASE)


def is_secret_name(name: str) -> bool:
    """Whether the value under this name is nobody else's business: "hub_token" is, "pad_token" is not."""
    return SECRET_NAME.fullmatch(name) is not None and ORDINARY.fullmatch(name) is None


def mask_text(text: str) -> str:
    """`text` without what looks like a secret or is one in this process's environment."""
    text = LOOKS_SECRET.sub(HIDDEN, text)
    for name, value in os.environ.items():
        if len(value) >= 8 and is_secret_name(name):
            text = text.replace(value, HIDDEN)
    return text


def mask(value: Any) -> Any:
    """A text, mapping or sequence without its secrets; anything else as it is."""
    match value:
        case str():
            return mask_text(value)
        case Mapping():
            return {
                key: HIDDEN if isinstance(item, str) and isinstance(key, str) and is_secret_name(key) else mask(item)
                for key, item in value.items()
            }
        case tuple() | list():
            return type(value)(mask(item) for item in value)
        case _:
            return value


def secret_lines(source: str) -> list[int]:
    """The numbers of the lines that hold what looks like a secret."""
    return [number for number, line in enumerate(source.splitlines(), 1) if LOOKS_SECRET.search(line)]


def mask_source(source: str) -> str:
    """The text of a program for the run's folder: also without the strings that are assigned to secret names."""

    def hidden(match: re.Match[str]) -> str:
        name = re.match(NAME, match.group(1), re.IGNORECASE)
        if name is None or not is_secret_name(name.group()):
            return match.group()
        return f"{match.group(1)}{match.group(2)}{HIDDEN}{match.group(2)}"

    return mask_text(ASSIGNED.sub(hidden, source))
