"""A conversation keeps its history, tells what it cannot do, and drops nothing in silence."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetuner.errors import ModelError, Problem
from finetuner.generate.answer import Answer
from finetuner.generate.conversation import Conversation, on_one_line, shown


class Parrot:
    """Answers with the number of messages it was given and the last of them."""

    def __init__(self) -> None:
        self.seen: list[list[dict[str, str]]] = []
        self.raises: BaseException | None = None
        self.stopped = "stop"

    def __call__(self, messages: list[dict[str, str]], turn: int, stream: Callable[[str], None]) -> Answer:
        if self.raises is not None:
            raise self.raises
        self.seen.append(list(messages))
        text = f"{len(messages)}:{messages[-1]['content']}"
        stream(text)
        return Answer(text, 3, self.stopped)  # type: ignore[arg-type]


@pytest.fixture
def talk() -> tuple[Conversation, Parrot, list[str], list[str]]:
    parrot, shows, tells = Parrot(), [], []
    return Conversation(parrot, shows.append, tells.append, []), parrot, shows, tells


def test_every_turn_sees_the_whole_history(talk: tuple[Conversation, Parrot, list[str], list[str]]) -> None:
    conversation, parrot, shows, _ = talk
    for line in ("one\n", "\n", "   ", "two"):
        assert conversation.take(line)
    assert [message["content"] for message in parrot.seen[-1]] == ["one", "1:one", "two"]
    assert "".join(shows) == "1:one\n3:two\n"


def test_commands_do_what_help_says(talk: tuple[Conversation, Parrot, list[str], list[str]], tmp_path: Path) -> None:
    conversation, parrot, _, tells = talk
    for line in ("/system", "/save", "/save x", "/system Be kind.", "hi", f"/save {tmp_path / 'a.jsonl'}", "/help"):
        assert conversation.take(line)
    row = {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"},
                        {"role": "assistant", "content": "2:hi"}]}  # fmt: skip
    assert json.loads((tmp_path / "a.jsonl").read_text()) == row
    conversation.take("/reset")
    conversation.take("again")
    assert [message["role"] for message in parrot.seen[-1]] == ["system", "user"]
    conversation.take("/system")
    assert tells[-1] == "Be kind."
    assert not conversation.take("/exit")


def test_an_unknown_command_is_told_and_not_said(talk: tuple[Conversation, Parrot, list[str], list[str]]) -> None:
    conversation, parrot, _, tells = talk
    for line in ("/quit", "/", "/rest now", "/home/me is a path"):
        assert conversation.take(line)
    assert not parrot.seen
    assert "no command /quit" in tells[0]
    assert "did you mean /reset?" in tells[2]
    conversation.take(" /home/me is a path")
    assert parrot.seen[-1][-1]["content"] == "/home/me is a path"


@pytest.mark.parametrize("raises", [ModelError(Problem("E-ASK-LENGTH", "too long")), KeyboardInterrupt()])
def test_a_line_that_was_not_answered_is_told_and_not_kept(
    raises: BaseException, talk: tuple[Conversation, Parrot, list[str], list[str]]
) -> None:
    conversation, parrot, _, tells = talk
    conversation.take("one")
    parrot.raises = raises
    conversation.take("two")
    assert "not kept" in tells[-1]
    parrot.raises = None
    conversation.take("three")
    assert [message["content"] for message in parrot.seen[-1]] == ["one", "1:one", "three"]


def test_a_cut_answer_and_bytes_that_are_not_utf8_are_told(
    talk: tuple[Conversation, Parrot, list[str], list[str]],
) -> None:
    conversation, parrot, _, tells = talk
    parrot.stopped = "length"
    conversation.take("a\ufffdb")
    assert "UTF-8" in tells[0]
    assert "cut at 3 tokens" in tells[1]


def test_a_file_that_cannot_be_written_is_told(
    talk: tuple[Conversation, Parrot, list[str], list[str]], tmp_path: Path
) -> None:
    conversation, _, _, tells = talk
    conversation.take("hi")
    assert conversation.take(f"/save {tmp_path}")
    assert "not saved" in tells[-1]


def test_nothing_that_is_shown_drives_a_terminal() -> None:
    assert shown("a\x1b[2J\x07\x9b\r\x00b\tc\nd　李 👩‍🚀") == "a\\x1b[2J\\x07\\x9b\\r\\x00b\tc\nd　李 👩‍🚀"
    assert on_one_line("a\nb\u2028c") == "a\\nb\\u2028c"
