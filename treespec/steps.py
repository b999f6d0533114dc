"""Steps of a round: what is done between forwards, on a GPU captured as graphs.

Growing a tree, selecting its nodes and the verdict are small kernels by the dozen. A GPU takes a
microsecond or two for each, Python some ten to launch it. A step is a function of tensors and
constants; called often enough with tensors of one shape, it is captured once and replayed. See
docs/design/007-captured-forwards.md.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from treespec import graphs

# Calls of a step before it is captured: a shape that hardly occurs is not worth it.
_CALLS_BEFORE = 2


class Steps:
    """Calls functions, or replays what they did.

    What a function returns holds until the next call of any step like it. A function may read no
    tensor on the host, and may change none in place but attributes of an owner.

    Args:
        captured: capture graphs; otherwise functions are just called.
    """

    def __init__(self, captured: bool = False) -> None:
        self.captured = captured
        self._known: dict[tuple, _Step] = {}
        self._pool = graphs.new_pool() if self.captured else None
        # addresses of what steps read and write; nothing else lies there
        self._own: set[int] = set()
        self.refusals: list[str] = []
        self.start_round()

    def start_round(self) -> None:
        """From here on, `capture_ms` sums up what capturing takes, and `settled` is False once a
        step was not replayed."""
        self.capture_ms = 0.0
        self.settled = True

    def __call__(self, function: Callable, *args: Any) -> Any:
        """`function(*args)`; arguments are tensors and hashable constants."""
        if not self.captured:
            return function(*args)
        return self._run(_Call(function, (), None), args)[0]

    def on(self, owner: Any, function: Callable, *args: Any) -> Any:
        """`function(owner, *args)`, which may change the owner's attributes; they are tensors and
        hashable constants too."""
        if not self.captured:
            return function(owner, *args)
        state = vars(owner)
        call = _Call(function, tuple(state), type(owner))
        result, after = self._run(call, (*state.values(), *args))
        vars(owner).update(after)
        return result

    def make(self, kind: type, *args: Any) -> Any:
        """`kind(*args)`."""
        if not self.captured:
            return kind(*args)
        owner = object.__new__(kind)
        self.on(owner, kind.__init__, *args)
        return owner

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, which graphs may from now on read where it lies: it is not copied for them.
        Nothing but its holder may count on what is in it between two rounds."""
        if self.captured:
            self._own.add(tensor.data_ptr())
        return tensor

    def forget(self) -> None:
        """Drops all graphs."""
        self._known.clear()
        self._own.clear()
        # the memory of graphs that are gone cannot be shared again
        self._pool = graphs.new_pool() if self.captured else None

    def _run(self, call: _Call, values: tuple) -> tuple[Any, dict]:
        key = (call.key, *(_kind_of(value) for value in values))
        step = self._known.get(key)
        if step is None:
            step = self._known[key] = _Step()
        step.calls += 1
        if step.replay is None:
            self.settled = False
            if step.refused or step.calls <= _CALLS_BEFORE:
                return call(values)
            self._capture(step, call, values)
            if step.replay is None:
                return call(values)
        return step.replay([value for value in values if isinstance(value, torch.Tensor)])

    def _capture(self, step: _Step, call: _Call, values: tuple) -> None:
        started = time.perf_counter()
        try:
            step.replay = _Replay(call, values, self._pool, self._own)
        except Exception as failure:
            step.refused = True
            self.refusals.append(f"{call.name}: {graphs.reason_of(failure)}")
            # nor can that of a broken one
            self._pool = graphs.new_pool()
        self.capture_ms += 1e3 * (time.perf_counter() - started)


class _Step:
    """One function with arguments of one kind: how often it was called, and its replay."""

    def __init__(self) -> None:
        self.calls = 0
        self.refused = False
        self.replay: _Replay | None = None


class _Call:
    """A function, and the owner whose attributes are its first arguments."""

    def __init__(self, function: Callable, names: tuple[str, ...], kind: type | None) -> None:
        self.key = (function, names, kind)
        self._function, self._names, self._kind = function, names, kind

    @property
    def name(self) -> str:
        return getattr(self._function, "__qualname__", repr(self._function))

    def __call__(self, values: tuple) -> tuple[Any, dict]:
        """The result, and the owner's attributes after it."""
        if self._kind is None:
            return self._function(*values), {}
        owner = object.__new__(self._kind)
        count = len(self._names)
        vars(owner).update(zip(self._names, values[:count]))
        result = self._function(owner, *values[count:])
        return result, vars(owner)


class _Replay:
    """A captured call. What it returns lies outside the graphs' memory, where no other graph
    writes."""

    def __init__(
        self, call: _Call, values: tuple, pool: tuple[int, int] | None, own: set[int]
    ) -> None:
        def held(value):
            if not isinstance(value, torch.Tensor):
                return value
            is_own = value.data_ptr() in own and value.is_contiguous()
            return value if is_own else value.clone(memory_format=torch.contiguous_format)

        arguments = tuple(held(value) for value in values)
        self._inputs = [value for value in arguments if isinstance(value, torch.Tensor)]
        # on copies, whose changes do not matter: kernels are compiled, sizes become known
        copies = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in arguments)
        places = {id(copy): value for copy, value in zip(copies, arguments)}
        self._outcome = _mapped(lambda x: _room_for(x, places), call(copies))
        filled = dict(zip(map(id, _tensors(self._outcome)), _tensors(self._outcome)))
        for value in self._inputs:
            filled.pop(id(value), None)

        def run() -> torch.Tensor | None:
            found = call(arguments)
            for room, value in zip(_tensors(self._outcome), _tensors(found)):
                if id(room) in filled:
                    room.copy_(value)
            return None

        self._replay, _ = graphs.capture_graph(run, self._device, pool)
        own.update(x.data_ptr() for x in (*self._inputs, *filled.values()) if x.numel())
        self._places = [x.data_ptr() for x in self._inputs]

    @property
    def _device(self) -> torch.device:
        return self._inputs[0].device

    def __call__(self, given: list[torch.Tensor]) -> tuple[Any, dict]:
        moved = [
            (own, value)
            for own, place, value in zip(self._inputs, self._places, given)
            if value.data_ptr() != place
        ]
        if moved:
            if any(value.data_ptr() in self._places for _, value in moved):
                # one input lies where another belongs
                moved = [(own, value.clone()) for own, value in moved]
            for own, value in moved:
                own.copy_(value)
        self._replay()
        return self._outcome


def _room_for(value: Any, places: dict[int, torch.Tensor]) -> Any:
    """Where a result will lie: in the argument that it is, or in a tensor of its own."""
    if not isinstance(value, torch.Tensor):
        return value
    return places.get(id(value), torch.empty_like(value, memory_format=torch.contiguous_format))


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """A value with everything in its tuples, dictionaries and dataclasses changed."""
    if isinstance(value, tuple):
        return tuple(_mapped(change, item) for item in value)
    if isinstance(value, dict):
        return {name: _mapped(change, item) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **_mapped(change, fields))
    return change(value)


def _tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in a value, always in the same order."""
    found: list[torch.Tensor] = []
    _mapped(lambda x: found.append(x) if isinstance(x, torch.Tensor) else x, value)
    return found


def _kind_of(value: Any) -> Any:
    """What tells arguments of one kind: a tensor's shape and type, or the constant."""
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value
