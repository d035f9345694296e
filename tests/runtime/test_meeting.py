"""Each wrong start of several ranks has its error."""

from __future__ import annotations

import datetime
import socket

import pytest

from finetuner.errors import UsageError
from finetuner.runtime import meeting

SOON = datetime.timedelta(seconds=1)


@pytest.fixture
def place(monkeypatch):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(meeting, "JOIN", SOON)
    return f"127.0.0.1:{port}"


def code(error):
    return error.value.problems[0].code


def test_ranks_that_never_come_are_told(place):
    with pytest.raises(UsageError) as error:
        meeting.meet()
    assert code(error) == "E-RANKS"


def test_a_port_that_is_taken_is_told(place):
    with socket.socket() as held:
        held.bind(("", int(place.split(":")[1])))
        held.listen()
        with pytest.raises(UsageError) as error:
            meeting.meet()
    assert code(error) == "E-PORT"


@pytest.mark.parametrize("port", ["0", "70000", "x"])
def test_a_port_that_is_none_is_told(place, monkeypatch, port):
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(UsageError) as error:
        meeting.meet()
    assert code(error) == "E-PORT"


def test_two_that_are_one_rank_and_two_world_sizes_are_told(place, monkeypatch):
    store = meeting.connect(holding=True, timeout=SOON)
    meeting.check_in(store, place)
    with pytest.raises(UsageError) as error:
        meeting.check_in(store, place)
    assert code(error) == "E-RANKS-TWICE"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError) as error:
        meeting.check_in(store, place)
    assert code(error) == "E-RANKS-WORLD"


def test_the_interface_by_which_a_host_is_reached():
    assert meeting.interface_towards("127.0.0.1") == "lo"
    assert meeting.interface_towards("no-such-host.invalid") is None
