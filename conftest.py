"""Without a GPU the kernel tests run in Triton's interpreter, which must be asked for before
anything imports triton."""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch


def _import_interpreted_triton() -> None:
    """Import triton with its library interpreted, and leave the environment as it was.

    transformers imports triton too, and triton's own library is interpreted or not for good when
    first imported. The variable goes away again so that other tests take the path that a user
    without a GPU takes.
    """
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        importlib.import_module("triton.language")
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


_import_interpreted_triton()
