"""Times of a round's parts: the host's on a CPU, the device's on a GPU."""

from __future__ import annotations

import time
from typing import ClassVar

import pytest
import torch

from treespec.laps import Laps
from treespec.transfer import on_device


class FakeEvent:
    """Passed by the device as many milliseconds after the last as were launched before it."""

    launched = 0.0
    waited: ClassVar[list] = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        assert stream == "stream of cuda:1"
        self.at = FakeEvent.launched

    def synchronize(self):
        FakeEvent.waited.append(self)

    def elapsed_time(self, end):
        assert FakeEvent.waited, "read before the device was waited for"
        return end.at - self.at


def test_on_a_cpu_they_are_the_hosts():
    laps = Laps(torch.device("cpu"))
    for pause in (0.02, 0.04):
        laps.start()
        laps.mark()
        time.sleep(pause)
        laps.mark()
        first, second = laps.read()
        assert first < 5.0
        assert 1e3 * pause <= second < 1e3 * pause + 15.0


def test_on_a_gpu_they_are_the_devices(monkeypatch):
    """Launching takes no time; what was launched does."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    laps = Laps(torch.device("cuda:1"))
    for parts in ((3.0, 5.0), (1.0, 2.0)):
        FakeEvent.waited = []
        laps.start()
        for milliseconds in parts:
            FakeEvent.launched += milliseconds
            laps.mark()
        assert laps.read() == pytest.approx(list(parts))
        assert len(FakeEvent.waited) == 1


def test_host_values_on_the_device():
    for values in ([3, 1], [[1, -1], [2, 3]], []):
        found = on_device(values, torch.device("cpu"))
        assert found.dtype == torch.long and found.tolist() == values
