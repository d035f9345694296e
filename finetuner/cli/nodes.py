"""Which processes one `finetuner train` starts: `--nproc` on this machine, of `--nnodes` machines."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass

from finetuner.errors import Problem, UsageError
from finetuner.runtime.log import TOLD
from finetuner.runtime.ranks import world

PORT = 29500
"""Where several nodes meet, unless told; one node takes any free port."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """The processes of a run, and which of them are this machine's."""

    nproc: int
    """Processes a machine."""
    nnodes: int
    node_rank: int
    host: str
    """Of node 0, where all meet."""
    port: int | None
    """None: any that is free."""

    @property
    def world(self) -> int:
        """Processes of all machines."""
        return self.nproc * self.nnodes


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how many processes there are."""
    parser.add_argument("--nproc", type=int, metavar="N", help="processes on this machine, one a GPU (default: 1)")
    parser.add_argument("--nnodes", type=int, metavar="N", help="machines; start the same command on each (default: 1)")
    parser.add_argument("--node-rank", type=int, metavar="R", help="this machine's number, from 0")
    parser.add_argument("--master-addr", metavar="HOST[:PORT]", help="machine 0, as the others reach it")
    parser.add_argument("--master-port", type=int, metavar="PORT", help=f"a free port of machine 0 (default: {PORT})")


def nodes_of(args: argparse.Namespace) -> Nodes | None:
    """What is to be started here; None where this process trains itself, alone or as a rank that was started.

    Raises:
        UsageError: E-NPROC; E-NODES, E-NODES-RANK, E-NODES-MASTER, E-NODES-STARTED: arguments that do not fit together.
    """
    if TOLD in os.environ:
        return None  # one of the ranks that the same command line started
    given = [f"--{name}" for name in ("nproc", "nnodes", "node-rank", "master-addr", "master-port")
             if getattr(args, name.replace("-", "_")) is not None]  # fmt: skip
    if world() > 1:
        if given:
            what, found = "the ranks are started already, by torchrun or srun", f"WORLD_SIZE={world()}"
            remedy = f"leave out {' '.join(given)}, or unset RANK and WORLD_SIZE"
            raise UsageError(Problem("E-NODES-STARTED", what, " ".join(given), found, "one launcher", remedy))
        return None
    nproc, nnodes = 1 if args.nproc is None else args.nproc, 1 if args.nnodes is None else args.nnodes
    if nproc < 1:
        remedy = "leave --nproc out for one process"
        raise UsageError(Problem("E-NPROC", "--nproc counts processes", "--nproc", str(nproc), "1 or more", remedy))
    if nnodes < 1:
        remedy = "leave --nnodes out for one machine"
        raise UsageError(Problem("E-NODES", "--nnodes counts machines", "--nnodes", str(nnodes), "1 or more", remedy))
    node_rank = rank_of(args.node_rank, nnodes)
    host, port = master_of(args.master_addr, args.master_port, nnodes)
    return None if nproc * nnodes == 1 else Nodes(nproc, nnodes, node_rank, host, port)


def rank_of(node_rank: int | None, nnodes: int) -> int:
    """This machine's number, which is never guessed where there are several."""
    if node_rank is None and nnodes == 1:
        return 0
    if node_rank is None or not 0 <= node_rank < nnodes:
        found = "none" if node_rank is None else str(node_rank)
        what, fits = f"which of the {nnodes} machines is this?", f"0 to {nnodes - 1}, each once"
        remedy = "give each machine its --node-rank; where --nnodes is left out there is one machine"
        raise UsageError(Problem("E-NODES-RANK", what, "--node-rank", found, fits, remedy))
    return node_rank


def master_of(address: str | None, port: int | None, nnodes: int) -> tuple[str, int | None]:
    """(host, port) of the meeting: "gpu1:29600" -> ("gpu1", 29600); "[fe80::1]:29600" and "fe80::1" are understood."""
    if address is None:
        if nnodes > 1:
            what, remedy = "nobody says where machine 0 is", "--master-addr HOST, the name or address of machine 0"
            raise UsageError(Problem("E-NODES-MASTER", what, "--master-addr", "none", "HOST[:PORT]", remedy))
        return "127.0.0.1", checked(port, "--master-port") if port is not None else None
    # [IPv6]:port, or host:port, or an address that is bare
    parts = re.fullmatch(r"\[([^\]]+)\](?::(.*))?|([^:]+)(?::([^:]*))?|([0-9a-fA-F:.%]*:[^:]*:\S*)", address)
    host = next((part for part in parts.group(1, 3, 5) if part), "") if parts else ""
    if not parts or not host:
        what = "this is no address of a machine"
        raise UsageError(Problem("E-NODES-MASTER", what, "--master-addr", repr(address), "HOST[:PORT]"))
    tail = parts[2] if parts[2] is not None else parts[4]
    named = checked(int(tail) if tail.isdecimal() else -1, "--master-addr") if tail is not None else None
    if named is not None and port is not None and named != port:
        what, found = "two ports are given", f"{named} and {port}"
        raise UsageError(Problem("E-NODES-MASTER", what, "--master-addr, --master-port", found, "one"))
    chosen = named if named is not None else checked(port, "--master-port") if port is not None else None
    return host, PORT if chosen is None and nnodes > 1 else chosen


def checked(port: int, where: str) -> int:
    """`port`, if it is one."""
    if not 0 < port < 65536:
        raise UsageError(Problem("E-NODES-MASTER", "this is no port", where, str(port), "1 to 65535"))
    return port
