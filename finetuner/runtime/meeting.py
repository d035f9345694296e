"""How the processes of a run find one another: the store at MASTER_ADDR:MASTER_PORT, and who came to it.

- Rank 0 holds the store; under torchrun its agent does. A prefix keeps a second start under the same agent apart.
- Each wrong start has its error: a port that is taken, ranks that never came, two of one number, two world sizes.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import socket
import struct
from typing import NoReturn

from torch.distributed import DistError, DistNetworkError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from finetuner.errors import Problem, UsageError
from finetuner.runtime.log import say
from finetuner.runtime.ranks import rank, world

JOIN = datetime.timedelta(seconds=60)
"""How long the processes of a run wait for one another at the start."""
REMEDY = "unset RANK and WORLD_SIZE for one process, or start all of them by --nproc or torchrun"


def meet() -> Store:
    """The store through which all processes of the run found one another.

    Raises:
        UsageError: E-PORT, the port is taken; E-RANKS, not all of them came in time; E-RANKS-TWICE, two came as one;
            E-RANKS-WORLD, they do not agree on how many they are.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    say(f"{world()} processes meet at {place}, within {JOIN.seconds} s")
    try:
        # The store of rank 0 is held by what this gives: it must outlive the run.
        store = connect(holding=rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True", timeout=JOIN)
        check_in(store, place)
        store.wait([f"here/{number}" for number in range(world())], JOIN)
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise _alone(place) from error
        what, remedy = "the port at which the processes meet is taken", "give another: MASTER_PORT=29501"
        raise UsageError(
            Problem("E-PORT", what, place, "another program listens there", "a free port", remedy)
        ) from error
    except (DistError, ValueError) as error:
        raise _alone(place) from error
    return store


def connect(*, timeout: datetime.timedelta, holding: bool = False) -> Store:
    """The store of the run, by a connection of its own; `holding`: this process is the one that serves it."""
    store = TCPStore(
        os.environ["MASTER_ADDR"], _port(), world(), holding, timeout, wait_for_workers=False, multi_tenant=True
    )
    return PrefixStore(f"finetuner/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def check_in(store: Store, place: str) -> None:
    """Writes into the store that this rank is here, and how many it believes there are.

    Raises:
        UsageError: E-RANKS-WORLD, E-RANKS-TWICE.
    """
    first = store.compare_set("world", "", str(world())).decode()
    if first != str(world()):
        what, found = "the ranks do not agree on how many they are", f"WORLD_SIZE={world()} here, {first} elsewhere"
        remedy = "start all nodes with the same --nproc and --nnodes"
        raise UsageError(Problem("E-RANKS-WORLD", what, place, found, "one world size", remedy))
    if store.add(f"here/{rank()}", 1) != 1:
        what, remedy = "two processes are the same rank", "give each node a --node-rank of its own, from 0"
        raise UsageError(Problem("E-RANKS-TWICE", what, place, f"RANK={rank()} twice", "each rank once", remedy))


def _alone(place: str) -> UsageError:
    what, found = "not all processes of the run came", f"RANK={rank()}, WORLD_SIZE={world()}"
    fits = f"{world()} processes within {JOIN.seconds} s"
    return UsageError(Problem("E-RANKS", what, place, found, fits, REMEDY))


def _port() -> int:
    text = os.environ["MASTER_PORT"]
    if not text.isdecimal() or not 0 < int(text) < 65536:
        _refuse(text)
    return int(text)


def _refuse(text: str) -> NoReturn:
    what, remedy = "the port at which the processes meet is none", "unset MASTER_PORT, or give one"
    raise UsageError(Problem("E-PORT", what, "the variable MASTER_PORT", repr(text), "1 to 65535", remedy))


def interface_towards(host: str) -> str | None:
    """The network interface by which this machine reaches `host`; None where that cannot be told.

    gloo else takes the address of this machine's own name, which on many machines is 127.0.0.1.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # nothing is sent: the kernel only chooses the way
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                try:
                    answer = fcntl.ioctl(probe, 0x8915, request)  # SIOCGIFADDR of Linux
                except OSError:
                    continue  # an interface without an address
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    except OSError:
        return None  # the meeting itself will tell that the host is not reached
    return None
