"""Kernel tests run the Triton kernels on the GPU where there is one, and otherwise in Triton's
interpreter."""

from __future__ import annotations

import weakref

import pytest
import torch

INTERPRET = not torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """On a GPU machine ``-m gpu`` selects every test here that runs on the device."""
    for item in items:
        if not INTERPRET and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Lets every test of this folder launch kernels; modules with kernels are first imported inside
    a test."""
    if not INTERPRET:
        yield
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU in the interpreter."""
    return torch.device("cpu" if INTERPRET else "cuda")


@pytest.fixture
def made(monkeypatch, device):
    """The graphs that were captured; they are emulated where there is no GPU."""
    from treespec import graphs

    graphs_made: weakref.WeakSet = weakref.WeakSet()
    if device.type == "cuda":
        return graphs_made

    def capture_graph(function, device, pool):
        from emulated_graph import EmulatedGraph

        graph = EmulatedGraph(pool)
        logits = graph.capture(function)
        graphs_made.add(graph)
        return graph.replay, logits

    # the interpreter takes its time for every row
    monkeypatch.setattr(graphs, "_FEWEST_ROWS", 64)
    monkeypatch.setattr("treespec.sources.model._LONGEST_CATCH_UP", 8)
    monkeypatch.setattr(graphs, "runs_on", lambda device: True)

    def new_pool():
        from emulated_graph import Pool

        return Pool()

    monkeypatch.setattr(graphs, "capture_graph", capture_graph)
    monkeypatch.setattr(graphs, "new_pool", new_pool)
    return graphs_made
