"""Fixtures that the tests share: small models, cached for the session, and one thread."""

from __future__ import annotations

import pytest
import torch
from tiny_models import KINDS, demo_models, tiny_pair


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small models are fastest on one thread, and the machine may be shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def no_tuning_files(tmp_path_factory):
    """No test may see, or write, the tuning files of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TREESPEC_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def record_at_once():
    """The tests' texts are short, and drafts and recorded forwards are to be tested on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("treespec.model._CALLS_THAT_PAY", 0)
        patch.setattr("treespec.outlay._OF_AHEAD", 1e6)
        yield


@pytest.fixture
def ordinary_outlay(monkeypatch):
    """What auto may spend on new forwards, as ever outside the tests."""
    monkeypatch.setattr("treespec.outlay._OF_AHEAD", 0.4)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def pair(kind):
    """Target and draft of every tiny model type."""
    return tiny_pair(kind)


@pytest.fixture
def llama():
    """The tiny Llama target and its draft."""
    return tiny_pair("llama")


@pytest.fixture(scope="session")
def demo_pair():
    """The bundled target, draft and tokenizer."""
    return demo_models()
