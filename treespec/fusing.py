"""Recorded forwards in fewer calls.

Two idioms of transformers' models are half of a small forward's calls: rotary embedding, seven
calls for queries and seven for keys, and the inverse root mean square of a norm, four. Each is
written anew in fewer: queries and keys are turned together, halves swapped by a roll and the sign
kept in the sine; the mean and what is added to it are one product. Results differ by rounding, as
those of packed weights do. See docs/design/002-recorded-forwards.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from treespec.capture import Step, is_pure

_aten = torch.ops.aten


def fuse(steps: list[Step]) -> list[Step]:
    """The same forward, with what the two idioms compute computed in fewer calls.

    Args:
        steps: of a `Recorder`, in order; those of a float64 model stay as they are.
    """
    if any(x.dtype == torch.float64 for _, _, _, out in steps for x in _tensors(out)):
        # who computes in float64 minds roundings more than time
        return steps
    flow = _Flow(_without_repeats(steps))
    new: dict[int, list[Step]] = {}
    gone: set[int] = set()
    for root in filter(None, map(flow.inverse_root, range(len(flow.steps)))):
        new[root.place] = [root.step]
        gone |= root.inner
    turns = [turn for turn in map(flow.turn, range(len(flow.steps))) if turn]
    signed: dict[int, torch.Tensor] = {}
    for queries, keys in pairwise(turns):
        if queries.place in gone or not flow.turn_together(queries, keys):
            continue
        sine = keys.sine
        before: list[Step] = []
        if id(sine) not in signed:
            signs = torch.ones(sine.shape[-1], dtype=sine.dtype)
            signs[: sine.shape[-1] // 2] = -1.0
            signed[id(sine)] = sine * signs
            before = [(torch.mul, (sine, signs), {}, signed[id(sine)])]
        new[keys.place] = [*before, _together(queries, keys, signed[id(sine)])]
        gone |= queries.inner | keys.inner
    kept = ([step] if k not in gone else [] for k, step in enumerate(flow.steps))
    return [step for k, own in enumerate(kept) for step in new.get(k, own)]


@dataclass
class _Root:
    """One norm's inverse root mean square: the step that takes the place of `inner`, at `place`."""

    place: int
    inner: set[int]
    step: Step


@dataclass
class _Turn:
    """One rotary embedding: steps `inner`, the last at `place`, that turn `source` into `out`."""

    place: int
    inner: set[int]
    source: torch.Tensor
    cosine: torch.Tensor
    sine: torch.Tensor
    out: torch.Tensor


def _inverse_root(squares: torch.Tensor, share: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    return F.linear(squares, share, eps).rsqrt_()


def _turned(
    queries: torch.Tensor,
    keys: torch.Tensor,
    cosine: torch.Tensor,
    signed_sine: torch.Tensor,
    half: int,
    heads: list[int],
) -> tuple[torch.Tensor, ...]:
    both = torch.cat((queries, keys), 1)
    turned = torch.addcmul(torch.mul(both, cosine), torch.roll(both, half, 3), signed_sine)
    return turned.split_with_sizes(heads, 1)


def _together(queries: _Turn, keys: _Turn, signed_sine: torch.Tensor) -> Step:
    half, heads = keys.source.shape[3] // 2, [x.source.shape[1] for x in (queries, keys)]
    args = (queries.source, keys.source, keys.cosine, signed_sine, half, heads)
    return _turned, args, {}, [queries.out, keys.out]


def _without_repeats(steps: list[Step]) -> list[Step]:
    """Without calls that gave one of their arguments back, and with every tensor unsqueezed only
    once one way."""
    first: dict[tuple, torch.Tensor] = {}
    instead: dict[int, torch.Tensor] = {}

    def renamed(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return instead.get(id(value), value)
        if isinstance(value, (list, tuple)):
            return type(value)(map(renamed, value))
        return value

    kept = []
    for func, args, kwargs, out in steps:
        args, kwargs = renamed(args), {name: renamed(value) for name, value in kwargs.items()}
        if is_pure(func) and any(out is arg for arg in args):
            continue
        if func is _aten.unsqueeze.default:
            key = (id(args[0]), args[1])
            if key in first:
                instead[id(out)] = first[key]
                continue
            first[key] = out
        kept.append((func, args, kwargs, out))
    return kept


class _Flow:
    """Which step made a tensor, and which read it."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps
        self._made: dict[int, int] = {}
        self._readers: dict[int, list[int]] = {}
        self._changed: set[int] = set()
        for k, (func, args, kwargs, out) in enumerate(steps):
            for tensor in _tensors((args, list(kwargs.values()))):
                self._readers.setdefault(id(tensor), []).append(k)
                if isinstance(func, torch._ops.OpOverload) and not is_pure(func):
                    self._changed.add(id(tensor))
            for tensor in _tensors(out):
                self._made.setdefault(id(tensor), k)

    def _maker(self, tensor: Any, func: Any, once: bool = True) -> tuple[int, tuple] | None:
        """The step that made a tensor and its arguments, if it is a call of `func`, without
        keywords; and the tensor is read once."""
        k = self._made.get(id(tensor))
        if k is None or self.steps[k][0] is not func or self.steps[k][2]:
            return None
        if once and len(self._readers[id(tensor)]) != 1:
            return None
        return k, self.steps[k][1]

    def inverse_root(self, k: int) -> _Root | None:
        """The norm whose inverse root step `k` computes, if it is one."""
        func, args, _, out = self.steps[k]
        if func is not _aten.rsqrt.default or out.dtype != torch.float32:
            return None
        added = self._maker(args[0], _aten.add.Tensor)
        if added is None or not isinstance(added[1][1], float):
            return None
        mean = self._maker(added[1][0], _aten.mean.dim)
        if mean is None or tuple(mean[1][1:]) != ([-1], True):
            return None
        squares = mean[1][0]
        if squares.dtype != torch.float32 or id(squares) in self._changed:
            return None
        size = squares.shape[-1]
        share, eps = torch.full((1, size), 1.0 / size), torch.tensor([added[1][1]])
        step: Step = (_inverse_root, (squares, share, eps), {}, out)
        return _Root(k, {k, added[0], mean[0]}, step)

    def turn(self, k: int) -> _Turn | None:
        """The rotary embedding that step `k` ends, if it is one: x * cos + (-x2, x1) * sin."""
        func, args, kwargs, out = self.steps[k]
        if func is not _aten.add.Tensor or kwargs or out.dim() != 4:
            return None
        straight, across = (self._maker(x, _aten.mul.Tensor) for x in args[:2])
        if straight is None or across is None:
            return None
        (source, cosine), (swapped, sine) = straight[1], across[1]
        joined = self._maker(swapped, _aten.cat.default)
        if joined is None or joined[1][1:] not in ((-1,), (3,)) or len(joined[1][0]) != 2:
            return None
        negated = self._maker(joined[1][0][0], _aten.neg.default)
        if negated is None:
            return None
        half = source.shape[-1] // 2
        low = self._half(joined[1][0][1], source, 0)
        high = self._half(negated[1][0], source, half)
        if low is None or high is None or source.shape != out.shape:
            return None
        readers = self._readers.get(id(out), ())
        if any(self.steps[reader][0] is _aten.view.default for reader in readers):
            # the turned queries lie in another order of dimensions
            return None
        tensors = (source, cosine, sine)
        if any(x.dtype != out.dtype or id(x) in self._changed for x in tensors):
            return None
        inner = {k, straight[0], across[0], joined[0], negated[0], low, high}
        return _Turn(k, inner, source, cosine, sine, out)

    def _half(self, part: torch.Tensor, source: torch.Tensor, start: int) -> int | None:
        """The step that cut `part` out of `source`, the half of its last dimension from `start`
        on."""
        cut = self._maker(part, _aten.slice.Tensor)
        if cut is None or cut[1][0] is not source or cut[1][1:3] != (3, start):
            return None
        return cut[0] if 2 * part.shape[3] == source.shape[3] else None

    def turn_together(self, first: _Turn, second: _Turn) -> bool:
        """Whether two are turned by the same angles and the first is not needed before the
        second."""
        shapes = [(x.source.shape[0], *x.source.shape[2:]) for x in (first, second)]
        return (
            first.cosine is second.cosine
            and first.sine is second.sine
            and shapes[0] == shapes[1]
            and min(self._readers.get(id(first.out), ()), default=0) > second.place
        )


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
