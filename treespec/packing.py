"""Linear layers of a recorded forward over prepacked weights, wherever that is faster here.

oneDNN keeps weights in a layout of its own; layers that read the same input become one product of
joined weights. A CPU that cannot multiply a 16-bit type gets float32 copies of such weights:
products of 16-bit numbers are exact in float32, and the sum is rounded once, as 16-bit hardware
does it. What is faster depends on the CPU, the sizes and the number of rows, so both ways are timed
on the recorded calls themselves. See docs/design/002-recorded-forwards.md.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from treespec.capture import Step

_LINEAR = torch.ops.aten.linear.default
# Both ways are timed on a few groups alike: on one alone, caches would hold more than in a forward.
_TIMED_GROUPS, _PASSES = 3, 4
# From so many rows on, products of a type that the CPU cannot multiply are slow beyond doubt.
_CLEAR_ROWS = 4

_linear_pointwise: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def available() -> bool:
    """Whether this build of torch can prepack weights."""
    return bool(torch.backends.mkldnn.is_available()) and _linear_pointwise is not None


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies a 16-bit type on this CPU."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def copy_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """What copies of weights of this dtype are kept in; None where none are made."""
    if dtype in (torch.bfloat16, torch.float16):
        return dtype if _multiplies(dtype) else torch.float32
    return torch.float32 if dtype == torch.float32 else None


def copy_bytes(weights: Iterable[torch.Tensor]) -> int:
    """Bytes that copies of these weights take."""
    sizes = ((w.numel(), copy_dtype(w.dtype)) for w in weights)
    return sum(count * dtype.itemsize for count, dtype in sizes if dtype is not None)


def wide_linears(dtype: torch.dtype, device: torch.device, rows: int):
    """A context for eager forwards of so many rows: `WideLinears` where the CPU does not multiply
    the dtype."""
    if device.type == "cpu" and rows >= _CLEAR_ROWS and copy_dtype(dtype) not in (None, dtype):
        return WideLinears()
    return contextlib.nullcontext()


class WideLinears(TorchFunctionMode):
    """`with WideLinears():` linear layers of a 16-bit type that this CPU cannot multiply are
    computed in float32, their weights converted as they are met; for forwards of many rows."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not kwargs and _can_be_packed(*args[:2]):
            source, *weights = args
            wide = [w if w is None else w.to(copy_dtype(w.dtype)) for w in (source, *weights)]
            return func(*wide).to(source.dtype)
        return func(*args, **(kwargs or {}))


def pack_linears(steps: list[Step], packed: PackedWeights) -> list[Step]:
    """Replaces linear layers by prepacked ones where these are faster.

    Only where the weight is a constant of the recording, not something computed in it.
    """
    alike: dict[tuple, list[_Group]] = {}
    for group in _groups(steps):
        alike.setdefault(group.key, []).append(group)
    replaced: dict[int, Step | None] = {}
    for groups in alike.values():
        for group in packed.worth_packing(groups):
            replaced.update(dict.fromkeys(group.places))
            replaced[group.places[0]] = group.packed_step(packed.get(group.weights, group.rows))
    return [step for k, old in enumerate(steps) if (step := replaced.get(k, old)) is not None]


@dataclass
class _Group:
    """Linear layers that read one input: several without bias, or one.

    Attributes:
        places: of their steps in the recording.
        source: what they read, `[..., in]`.
        weights: each `[out, in]`.
        bias: of the one layer, `[out]`, or None.
        outs: their results.
    """

    places: list[int]
    source: torch.Tensor
    weights: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None
    outs: list[torch.Tensor]

    @property
    def rows(self) -> int:
        return self.source.numel() // self.source.shape[-1]

    @property
    def key(self) -> tuple:
        """Groups of one key cost the same."""
        shapes = tuple(tuple(weight.shape) for weight in self.weights)
        return self.rows, shapes, self.source.dtype, self.bias is None

    def apart(self) -> list[torch.Tensor]:
        """Results of the layers as they were recorded."""
        return [F.linear(self.source, weight, self.bias) for weight in self.weights]

    def packed_step(self, weight: torch.Tensor) -> Step:
        """The same result by one product with a packed weight."""
        bias = self.bias if self.bias is None else self.bias.detach().to(weight.dtype)
        wide = weight.dtype != self.source.dtype
        if len(self.weights) == 1:
            function: Callable = _wide_linear if wide else _packed_linear
            return function, (self.source, weight, bias), {}, self.outs[0]
        sizes = [w.shape[0] for w in self.weights]
        function = _wide_split_linear if wide else _split_linear
        return function, (self.source, weight, sizes), {}, self.outs


def _groups(steps: list[Step]) -> list[_Group]:
    computed = {
        id(t) for _, _, _, out in steps for t in (out if isinstance(out, (list, tuple)) else [out])
    }
    readers: dict[int, list[int]] = {}
    for k, (func, args, _, _) in enumerate(steps):
        if func is _LINEAR and id(args[1]) not in computed and _can_be_packed(*args[:2]):
            readers.setdefault(id(args[0]), []).append(k)
    groups = []
    for places in readers.values():
        biases = [steps[k][1][2] if len(steps[k][1]) > 2 else None for k in places]
        joined = [places] if not any(b is not None for b in biases) else [[k] for k in places]
        for members in joined:
            bias = biases[places.index(members[0])]
            weights = tuple(steps[k][1][1] for k in members)
            outs = [steps[k][3] for k in members]
            groups.append(_Group(members, steps[members[0]][1][0], weights, bias, outs))
    return groups


def _can_be_packed(source: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        source.dtype == weight.dtype
        and copy_dtype(weight.dtype) is not None
        and weight.device.type == "cpu"
        and weight.dim() == 2
    )


def _packed_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return _linear_pointwise(x, weight, bias, "none", [], "")


def _wide_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _linear_pointwise(x.float(), weight, bias, "none", [], "").to(x.dtype)


def _split_linear(
    x: torch.Tensor, weight: torch.Tensor, sizes: list[int]
) -> tuple[torch.Tensor, ...]:
    return _packed_linear(x, weight, None).split_with_sizes(sizes, -1)


def _wide_split_linear(
    x: torch.Tensor, weight: torch.Tensor, sizes: list[int]
) -> tuple[torch.Tensor, ...]:
    return _wide_linear(x, weight, None).split_with_sizes(sizes, -1)


class PackedWeights:
    """Packed copies, made once per group of weights and shared by all recordings of a model.

    Args:
        max_bytes: most bytes the copies may take; weights beyond are left as they are.
    """

    _of_models: ClassVar[weakref.WeakKeyDictionary] = weakref.WeakKeyDictionary()

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._packed: dict[tuple[int, ...], tuple[torch.Tensor, tuple[torch.Tensor, ...]]] = {}
        self._faster: dict[tuple, bool] = {}
        self._marks: tuple = ()

    @classmethod
    def of(cls, model: torch.nn.Module, max_bytes: int) -> PackedWeights:
        """The copies of this model's weights, the same for every speculator that uses it."""
        packed = cls._of_models.setdefault(model, cls(max_bytes))
        packed.max_bytes = max_bytes
        return packed

    def keep_for(self, marks: tuple) -> None:
        """Forgets copies of weights that were not marked like this."""
        if marks != self._marks:
            self.forget()
            self._marks = marks

    def forget(self) -> None:
        """Recordings keep the copies they use."""
        self._packed.clear()
        self._faster.clear()

    @property
    def bytes(self) -> int:
        """What the copies take."""
        return sum(copy_bytes(weights) for _, weights in self._packed.values())

    def get(self, weights: tuple[torch.Tensor, ...], rows: int) -> torch.Tensor:
        """The copy of these weights, joined, laid out for about so many rows."""
        key = _identity(weights)
        if key not in self._packed:
            self._packed[key] = (_pack(weights, rows), weights)
        return self._packed[key][0]

    def worth_packing(self, groups: list[_Group]) -> list[_Group]:
        """Those of some groups alike that fit, if packed products are the faster ones."""
        room, fitting = self.max_bytes - self.bytes, []
        for group in groups:
            size = 0 if _identity(group.weights) in self._packed else copy_bytes(group.weights)
            if size <= room:
                fitting.append(group)
                room -= size
        if not fitting:
            return []
        key = groups[0].key
        if key not in self._faster:
            self._faster[key] = self._is_faster(fitting)
        return fitting if self._faster[key] else []

    def _is_faster(self, groups: list[_Group]) -> bool:
        """Times both ways in turns; what cannot be packed is not."""
        groups, steps = groups[:_TIMED_GROUPS], []
        dtype = groups[0].source.dtype
        if copy_dtype(dtype) != dtype and groups[0].rows >= _CLEAR_ROWS:
            return True
        try:
            for group in groups:
                known = self._packed.get(_identity(group.weights))
                weight = _pack(group.weights, group.rows) if known is None else known[0]
                steps.append(group.packed_step(weight))
        except RuntimeError:
            return False
        apart, packed = [], []
        for _ in range(_PASSES):
            apart.append(_seconds(lambda: [group.apart() for group in groups]))
            packed.append(_seconds(lambda: [func(*args) for func, args, _, _ in steps]))
            # the first pass sets things up; after it a clear case is not looked at for longer
            if len(packed) > 1 and not 0.5 < min(packed) / min(apart) < 2.0:
                break
        return min(packed) < min(apart)


def _identity(weights: tuple[torch.Tensor, ...]) -> tuple[int, ...]:
    return tuple(id(weight) for weight in weights)


def _pack(weights: tuple[torch.Tensor, ...], rows: int) -> torch.Tensor:
    joined = torch.cat(weights) if len(weights) > 1 else weights[0]
    joined = joined.detach().to(copy_dtype(joined.dtype)).contiguous()
    return torch.ops.mkldnn._reorder_linear_weight(joined, rows)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
