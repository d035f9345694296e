"""The inputs of checkpointed layers, held in the host's memory between the forward and the backward pass.

    forward:   layer i is done -> its input leaves on a side stream, while layer i + 1 computes
    backward:  layer i's input is there -> that of layer i - 1 starts on its way, while layer i recomputes

- torch's `save_on_cpu` copies on the stream that computes, which waits; here a copy hides behind a layer's work.
- All device memory is taken and given back on the stream that computes, and that stream waits for a copy before the
  memory which the copy reads or writes is given back. So no block of memory stays blocked (`record_stream` does that).
- Not more than two inputs are on their way out at a time: the memory that is wanted does not depend on how far the
  host runs ahead.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

LEAVING = 2
"""Tensors that may be on their way out."""


class Lane(Protocol):
    """Where copies go between the device and the host, beside the computation."""

    def out(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Starts a copy to the host: the copy, and what tells that it is done."""

    def back(self, held: Tensor) -> tuple[Tensor, Any]:
        """Starts a copy to the device."""

    def wait(self, done: Any) -> None:
        """Lets the computation wait for a copy; the host does not wait."""


class CudaLane:
    """A side stream of a GPU, and pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def out(self, tensor: Tensor) -> tuple[Tensor, Any]:
        held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return held, self._copy(held, tensor)

    def back(self, held: Tensor) -> tuple[Tensor, Any]:
        tensor = torch.empty(held.shape, dtype=held.dtype, device=self._device)
        return tensor, self._copy(tensor, held)

    def wait(self, done: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(done)

    def _copy(self, into: Tensor, source: Tensor) -> Any:
        # What is read must have been computed; what is written into may still be in use by what had the memory before.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)
            return self._stream.record_event()


class Parcel:
    """A tensor on the host; `before` is the one that left just before it, and `coming` the copy that is on its way."""

    __slots__ = ("__weakref__", "before", "coming", "held", "lane")

    def __init__(self, held: Tensor, lane: Lane, before: Parcel | None) -> None:
        self.held, self.lane = held, lane
        self.before = None if before is None else weakref.ref(before)
        self.coming: tuple[Tensor, Any] | None = None

    def start(self) -> tuple[Tensor, Any]:
        """Sets out for the device unless it has."""
        if self.coming is None:
            self.coming = self.lane.back(self.held)
        return self.coming

    def __del__(self) -> None:
        if self.coming is not None:  # a graph dropped without its backward pass, while a copy writes into the memory
            self.lane.wait(self.coming[1])


class Host:
    """Takes tensors out to the host and gives them back, the last one first."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._leaving: deque[tuple[Tensor, Any]] = deque()
        self._last: weakref.ref[Parcel] | None = None

    def pack(self, tensor: Tensor) -> Parcel:
        self._settle(LEAVING - 1)
        tensor = tensor.detach()
        held, done = self._lane.out(tensor)
        self._leaving.append((tensor, done))
        parcel = Parcel(held, self._lane, self._last() if self._last is not None else None)
        self._last = weakref.ref(parcel)
        return parcel

    def unpack(self, parcel: Parcel) -> Tensor:
        self._settle(0)
        tensor, done = parcel.start()
        self._lane.wait(done)
        parcel.coming = None
        before = None if parcel.before is None else parcel.before()
        if before is not None:
            before.start()
        return tensor

    def _settle(self, count: int) -> None:
        """Lets go of tensors that leave until `count` are left, each once it is out."""
        while len(self._leaving) > count:
            self._lane.wait(self._leaving[0][1])
            self._leaving.popleft()


def offloaded(host: Host, function: Callable[..., Any], *args: Any) -> Any:
    """As torch's checkpoint, with what it saves (a layer's input) on `host`."""
    with saved_tensors_hooks(host.pack, host.unpack):
        return checkpoint(function, *args, use_reentrant=False)
