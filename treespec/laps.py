"""How long the parts of a round take.

On a GPU a part is over when the device is done with it, not when its last kernel was launched. So
marks are CUDA events there, which are read once the round's verdict has been waited for anyway.
"""

from __future__ import annotations

import time
from itertools import pairwise

import torch


class Laps:
    """Marks of one round after the other.

    Args:
        device: where the round's work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []
        self._count = 0

    def start(self) -> None:
        """Forgets all marks and makes the first."""
        self._count = 0
        self._times.clear()
        self.mark()

    def mark(self) -> None:
        if not self._on_gpu:
            self._times.append(time.perf_counter())
            return
        if self._count == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[self._count].record(torch.cuda.current_stream(self._device))
        self._count += 1

    def read(self) -> list[float]:
        """Milliseconds between the marks; waits until the device has passed the last of them."""
        if not self._on_gpu:
            return [1e3 * (end - start) for start, end in pairwise(self._times)]
        events = self._events[: self._count]
        events[-1].synchronize()
        return [start.elapsed_time(end) for start, end in pairwise(events)]
