"""treespec: the text a Hugging Face causal LM would write, several times faster, by lossless tree
speculation.

Importing this package is cheap: torch, transformers and triton are imported when a name is first
used.
"""

from __future__ import annotations

import importlib
from pathlib import Path

__version__ = "0.1.0"

_EXPORTS = {
    "TreeSpeculator": "speculator",
    "Chain": "shapes",
    "FixedTree": "shapes",
    "BestFirstTree": "shapes",
    "AdaptiveTree": "shapes",
    "DraftSource": "sources",
    "SpeculationStats": "stats",
    "load_demo_pair": "demo",
}

__all__ = ["__version__", *_EXPORTS]

# In a checkout the kernels lie beside this package, not inside it; an installed package has them
# inside.
_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "kernels" / "ops.py").is_file() and (_CHECKOUT / "setup.py").is_file():
    if str(_CHECKOUT) not in __path__:
        __path__.append(str(_CHECKOUT))


def __getattr__(name: str):
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"treespec.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'treespec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
