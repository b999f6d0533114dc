"""What a CUDA graph does, on a CPU: the calls of one run are made again over the same memory."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor


class Pool:
    """Memory that graphs share: whatever one of them computes may lie where another's results
    lay."""

    def __init__(self) -> None:
        self.graphs: weakref.WeakSet[EmulatedGraph] = weakref.WeakSet()
        self.used = False

    def enter(self, graph: EmulatedGraph) -> None:
        if self.used and not self.graphs:
            raise RuntimeError("INTERNAL ASSERT FAILED: use_count > 0")
        self.used = True
        self.graphs.add(graph)


class EmulatedGraph(TorchDispatchMode):
    """Notes every ATen call and every kernel launch of one run, with its tensors by identity and
    its host values as they were.

    `replay` makes them again; what a call returns goes to where it lay. What may not happen while a
    stream is captured is refused: reading a tensor's value, and tensors made of host values.
    """

    _forbidden = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.steps: list[tuple] = []
        self.replays = 0
        self._launching = False
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._pool = pool
        pool.enter(self)

    def capture(self, function):
        """What `function()` returns; nothing outside the graph has changed."""
        launch = GridExecutor.__call__

        def noted(executor, *args, **kwargs):
            self._remember(_tensors((args, kwargs)))
            self._launching = True
            try:
                launch(executor, *args, **kwargs)
            finally:
                self._launching = False
            self.steps.append((launch, (executor, *args), kwargs, None))

        GridExecutor.__call__ = noted
        try:
            with self:
                result = function()
        finally:
            GridExecutor.__call__ = launch
        with torch.inference_mode():
            for tensor, before in self._before.values():
                tensor.copy_(before)
        self._before.clear()
        self.spoil()
        return result

    def _remember(self, tensors: list[torch.Tensor]) -> None:
        """Keeps what lies in memory that is about to be written for the first time."""
        for tensor in tensors:
            if _memory(tensor) not in self._before:
                size = tensor.untyped_storage().nbytes() // tensor.itemsize
                whole = tensor.as_strided((size,), (1,), 0)
                self._before[_memory(tensor)] = whole, whole.clone()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._launching:
            return func(*args, **kwargs)
        host_values = func is torch.ops.aten.lift_fresh.default
        if host_values or any(tag in func.tags for tag in self._forbidden):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        if func._schema.is_mutable:
            self._remember(_tensors((args, kwargs)))
        out = func(*args, **kwargs)
        self.steps.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        for other in self._pool.graphs - {self}:
            other.spoil()
        with torch.inference_mode():
            for func, args, kwargs, out in self.steps:
                again = func(*args, **kwargs)
                for old, new in zip(_tensors(out), _tensors(again)):
                    if _memory(old) not in _memories((args, kwargs)):
                        old.copy_(new)

    def spoil(self) -> None:
        """What becomes of all it has computed when another graph runs."""
        with torch.inference_mode():
            for _, args, kwargs, out in self.steps:
                for tensor in _tensors(out):
                    if _memory(tensor) not in _memories((args, kwargs)):
                        tensor.fill_(float("nan") if tensor.is_floating_point() else 1)


def _tensors(values) -> list[torch.Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def _memories(values) -> set[int]:
    return {_memory(tensor) for tensor in _tensors(values)}


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
