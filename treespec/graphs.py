"""Captured forwards: a model's forward on a GPU as a CUDA graph, replayed without its Python
modules and without a launch a kernel.

A graph replays kernels over the addresses they were captured with. So all that a forward depends on
besides weights and cache rows (tokens, positions, who sees whom, lengths of the prefixes) lies in
tensors of the graph's own, which every replay fills first. Only the Triton kernels attend this way:
PyTorch's attention is cut to the text's length on the host. See
docs/design/007-captured-forwards.md.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from treespec import hf
from treespec.capture import RecordingRefused

# Rows of caches that graphs are bound to: a longer prompt should seldom need a larger one.
_FEWEST_ROWS = 1024
_ROWS_STEP = 8192


# .inside: whether a function is being captured
_thread = threading.local()


@contextlib.contextmanager
def inside() -> Iterator[None]:
    """Around a function that is being captured: forwards of models in it are part of its graph."""
    before, _thread.inside = is_inside(), True
    try:
        yield
    finally:
        _thread.inside = before


def is_inside() -> bool:
    return getattr(_thread, "inside", False)


class CapturedForward:
    """One shape's forward as a graph.

    Args:
        forward: a call of that shape; its data is replaced at every replay.
        tokens: int64 `[B, N]` of that call.
        call: the model's forward, `(tokens, positions) -> logits`.
        pool: memory that graphs of this model share; they are replayed one after another, and
            logits hold until the next replay.

    Attributes:
        eager_ms: what the forward takes without a graph.

    Raises:
        RecordingRefused: if it cannot be captured.
    """

    def __init__(
        self,
        forward: hf.Forward,
        tokens: torch.Tensor,
        call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        pool: tuple[int, int] | None,
    ) -> None:
        self._tokens = tokens.clone()
        self._data = GraphForward.like(forward)
        try:
            # once outside: kernels are compiled, and libraries take what they need
            started = time.perf_counter()
            self._forward(call)
            if tokens.is_cuda:
                torch.cuda.synchronize(tokens.device)
            self.eager_ms = 1e3 * (time.perf_counter() - started)
            self._data = self._data.renewed()
            self._replay, self._logits = capture_graph(
                lambda: self._forward(call), tokens.device, pool
            )
        except RecordingRefused:
            raise
        except Exception as failure:
            raise RecordingRefused(reason_of(failure)) from failure

    def _forward(self, call: Callable) -> torch.Tensor:
        with hf.forward_scope(self._data):
            return call(self._tokens, self._data.positions)

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits of the forward under way, until the model's next forward."""
        self._data.take_over(hf.current_forward(), self._tokens, tokens)
        self._replay()
        return self._logits


class GraphForward(hf.Forward):
    """A forward that reads nothing from the host but shapes."""

    @classmethod
    def like(cls, forward: hf.Forward) -> GraphForward:
        """One of the same shape, with its data in tensors of its own."""
        positions = forward.positions.clone()
        return cls(
            forward.cache,
            forward.num_nodes,
            forward.offset,
            forward.visible.clone(),
            positions,
            positions
            if forward.node_positions is forward.positions
            else forward.node_positions.clone(),
            forward.kernel,
            forward.rotary,
            forward.prefix_lens().clone(),
        )

    def renewed(self) -> GraphForward:
        """The same tensors without what was computed from them, so that a graph computes it."""
        return GraphForward(
            self.cache,
            self.num_nodes,
            self.offset,
            self.visible,
            self.positions,
            self.node_positions,
            self.kernel,
            self.rotary,
            self._prefix_lens,
        )

    def take_over(
        self, forward: hf.Forward, own_tokens: torch.Tensor, tokens: torch.Tensor
    ) -> None:
        """Fills the tensors, tokens among them, with another call's data."""
        own = [own_tokens, self.positions, self._prefix_lens]
        given = [tokens, forward.positions, forward.prefix_lens()]
        if self.node_positions is not self.positions:
            own.append(self.node_positions)
            given.append(forward.node_positions)
        # one launch for all of a type
        torch._foreach_copy_(own, given)
        self.visible.copy_(forward.visible)

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        starts = self._row_starts()
        if self.rotary is not None and self.rotary.write(self.cache, layer, keys, values, starts):
            return
        rows = starts[:, None] + torch.arange(self.num_nodes, device=starts.device)
        for cache_rows, new in ((self.cache.keys, keys), (self.cache.values, values)):
            index = rows[:, None, :, None].expand_as(new)
            cache_rows[layer].scatter_(2, index, new.to(cache_rows[layer].dtype))

    def bias(self, mask_function: Callable, dtype: torch.dtype) -> torch.Tensor | None:
        """As in `Forward`, but where something is hidden an empty mask: the kernel knows windows by
        themselves."""
        if mask_function is hf.causal_mask_function:
            return None
        return self.positions.new_empty((len(self.positions), 1, self.num_nodes, 0), dtype=dtype)

    def attend(self, query, key, value, bias, scale, softcap, sinks, window=None):
        if not self.kernel or (bias is not None and window is None):
            raise RecordingRefused("a layer attends by PyTorch, which cuts its rows on the host")
        return super().attend(query, key, value, bias, scale, softcap, sinks, window)


def reason_of(failure: BaseException) -> str:
    """What ended a capture: the end of a broken one fails in its turn."""
    while failure.__context__ is not None:
        failure = failure.__context__
    return f"{type(failure).__name__}: " + str(failure).partition("\n")[0]


def capture_graph(
    function: Callable[[], Any], device: torch.device, pool: tuple[int, int] | None
) -> tuple[Callable[[], None], Any]:
    """The kernels that `function` launches, ready to be launched again, and where its result will
    lie."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    # not `torch.cuda.graph`, which gives all free memory back first
    with torch.cuda.device(device), torch.cuda.stream(_stream(device)), _own_workspaces():
        # other threads may go on allocating meanwhile
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            result = function()
        finally:
            graph.capture_end()
    return graph.replay, result


@contextlib.contextmanager
def _own_workspaces() -> Iterator[None]:
    """Lets a graph's matrix products take their workspace from the graph's own memory.

    torch keeps one a stream from the first product on, so it would lie in the memory of the first
    graph of all, which may be gone while later ones still point there.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    clear()
    try:
        yield
    finally:
        clear()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: libraries keep memory of their own for every stream."""
    return torch.cuda.Stream(device)


def runs_on(device: torch.device) -> bool:
    """Whether graphs can be captured on a device."""
    return device.type == "cuda"


def new_pool() -> tuple[int, int] | None:
    return torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None


def roomy(rows: int) -> int:
    """A capacity of at least `rows`, out of few: the graphs of a cache die with it."""
    if rows > _ROWS_STEP:
        return -(-rows // _ROWS_STEP) * _ROWS_STEP
    return max(_FEWEST_ROWS, 1 << (rows - 1).bit_length())
