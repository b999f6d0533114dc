"""Kernel tests run the Triton kernels on the GPU where there is one, and otherwise in Triton's
interpreter."""

from __future__ import annotations

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
