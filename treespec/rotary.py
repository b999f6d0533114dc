"""RoPE and the cache write in one launch, in place of a model's own rotary function
(docs/kernels/append_rotary.md).

transformers' layers rotate queries and keys, write keys and values into the cache, and attend. Here
the rotation waits for the write: the model's function hands its arguments over and returns them
unturned, the write turns both and stores the keys, and attention takes the turned queries. A model
is only taken over after one forward in which its own function was watched and gave the same.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Protocol

import torch
from transformers import PreTrainedModel

from treespec.cache import TreeCache
from treespec.kernels import ops

NAME = "apply_rotary_pos_emb"
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
_TOLERANCE_16BIT = 0.03


class Rotary(Protocol):
    """What a forward asks of either class below."""

    def turn(self, own: Callable, q: torch.Tensor, k: torch.Tensor, *rest, **kwargs) -> tuple:
        """Called by the layer in place of `own(q, k, ...)`."""

    def write(
        self,
        cache: TreeCache,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        starts: torch.Tensor,
    ) -> bool:
        """Called with what the layer writes into the cache from rows `starts` `[B]` on; whether it
        is written."""

    def query(self, query: torch.Tensor) -> torch.Tensor:
        """The queries to attend with, given those the layer attends with."""


class WatchedRotary:
    """Lets a model's function work, and finds out whether the kernel can stand in for it.

    Attributes:
        obstacle: why not, or None.
        interleaved: which columns make a pair; None while no layer has rotated.
    """

    def __init__(self) -> None:
        self.obstacle: str | None = None
        self._variants = {False, True}
        self._turned: tuple = (None, None)
        self._seen = False

    @property
    def interleaved(self) -> bool | None:
        return min(self._variants) if self._seen and self._variants else None

    def turn(self, own, q, k, *rest, **kwargs):
        self._turned = own(q, k, *rest, **kwargs)
        self._seen = True
        if kwargs or len(rest) != 2:
            self.obstacle = "its rotary function takes further arguments"
        elif any(x.dim() != 3 for x in rest) or q.dim() != 4:
            self.obstacle = "its rotary function takes tensors of another layout"
        else:
            self._variants = {x for x in self._variants if self._agrees(q, k, *rest, x)}
            if not self._variants:
                self.obstacle = "its rotary function turns other pairs than the kernel"
        return self._turned

    def _agrees(self, q, k, cos, sin, interleaved: bool) -> bool:
        rows = torch.zeros_like(k)
        starts = torch.zeros(len(k), dtype=torch.long, device=k.device)
        angles = (x.expand(len(k), -1, -1) for x in (cos, sin))
        try:
            turned = ops.append_rotary(
                q, k, k, *angles, rows, rows.clone(), starts, interleaved=interleaved
            )
        except ValueError:
            return False
        tolerance = _TOLERANCE.get(q.dtype, _TOLERANCE_16BIT)
        return all(
            x.shape == y.shape and float((x - y).abs().max()) <= tolerance * float(y.abs().max())
            for x, y in zip((turned, rows), self._turned)
        )

    def write(self, cache, layer, keys, values, starts):
        if self._turned[1] is not None and keys is not self._turned[1]:
            self.obstacle = "its keys change between rotation and cache"
        return False

    def query(self, query):
        if self._turned[0] is not None and query is not self._turned[0]:
            self.obstacle = "its queries change between rotation and attention"
        self._turned = (None, None)
        return query


class FusedRotary:
    """Turns queries and keys when the keys are written.

    Args:
        interleaved: pairs are neighbouring columns.
    """

    def __init__(self, interleaved: bool) -> None:
        self.interleaved = interleaved
        self._pending: tuple | None = None
        self._turned: tuple | None = None

    def turn(self, own, q, k, *angles):
        self._pending = (q, k, *angles)
        return q, k

    def write(self, cache, layer, keys, values, starts):
        if self._pending is None:
            return False
        q, k, cos, sin = self._pending
        assert keys is k, "the layer was watched handing its keys on as they are"
        self._pending = None
        turned = ops.append_rotary(
            q,
            keys,
            values,
            cos.expand(len(q), -1, -1),
            sin.expand(len(q), -1, -1),
            cache.keys[layer],
            cache.values[layer],
            starts,
            interleaved=self.interleaved,
            implementation="triton",
        )
        self._turned = (q, turned)
        return True

    def query(self, query):
        if self._turned is None or query is not self._turned[0]:
            return query
        turned, self._turned = self._turned[1], None
        return turned


def rotary_modules(model: PreTrainedModel) -> list[ModuleType]:
    """The Python modules whose rotary function the model's layers call."""
    names = {type(module).__module__ for module in model.modules()}
    return [sys.modules[name] for name in sorted(names) if hasattr(sys.modules.get(name), NAME)]


@contextlib.contextmanager
def taken_over(modules: list[ModuleType], rotary: Rotary) -> Iterator[None]:
    """Puts `rotary` in the place of the modules' functions for a block and this thread."""
    thread = threading.get_ident()

    def turn(own: Callable, *args, **kwargs):
        if threading.get_ident() != thread:
            return own(*args, **kwargs)
        return rotary.turn(own, *args, **kwargs)

    before = [getattr(module, NAME) for module in modules]
    try:
        for module, own in zip(modules, before):
            setattr(module, NAME, partial(turn, own))
        yield
    finally:
        for module, own in zip(modules, before):
            setattr(module, NAME, own)
