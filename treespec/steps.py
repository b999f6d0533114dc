"""Steps of a round: what is done between forwards, on a GPU captured as graphs.

Growing a tree, selecting its nodes and the verdict are small kernels by the dozen. A GPU takes a
microsecond or two for each, Python some ten to launch it. A step is a function of tensors and
constants; called often enough with tensors of one shape, it is captured once and replayed. See
docs/design/007-captured-forwards.md.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch

from treespec import graphs

# Calls of a step before it is captured: a shape that hardly occurs is not worth it.
CALLS_BEFORE = 2
# About what the host does for a replay.
_REPLAY_MS = 0.03

# .calling: whether a function is being called that will be a replay some day
_thread = threading.local()


class Steps:
    """Calls functions, or replays what they did.

    What a function returns holds until the next call of any step like it. A function may read no
    tensor on the host, and may change none in place but attributes of an owner. Within a function
    that is being captured all other steps are plain calls, and part of its graph.

    Args:
        captures: capture graphs; otherwise functions are just called.
        agreeing: share of the entries of a first replay's results that must be those of a call.
    """

    def __init__(self, captures: bool = False, agreeing: float = 1.0) -> None:
        self._captures, self._agreeing = captures, agreeing
        self._known: dict[tuple, _Step] = {}
        self._pool = graphs.new_pool() if captures else None
        # addresses of what steps read and write; nothing else lies there
        self._own: set[int] = set()
        self._held: dict[int, weakref.ref[torch.Tensor]] = {}
        self._families: tuple[Steps, ...] = (self,)
        self.refusals: list[str] = []
        self.start_round()

    @property
    def captured(self) -> bool:
        """Whether what is called often is replayed."""
        return self._captures and not graphs.is_inside()

    def start_round(self) -> None:
        """From here on times are summed up: `capture_ms` is what capturing takes, `extra_ms` what
        calls take longer than their replays will, and `first_ms` what first calls take, which
        compile kernels."""
        self.capture_ms = self.extra_ms = self.first_ms = 0.0

    def beside(self, other: Steps) -> None:
        """Steps of the two hand tensors to one another, which are then read where they lie."""
        if other is not self:
            self._families = other._families = (self, other)

    def _lies_still(self, value: torch.Tensor) -> bool:
        """Whether graphs may read a tensor where it lies."""
        place = value.data_ptr()
        held = self._held.get(place, lambda: None)()
        return value.is_contiguous() and (place in self._own or held is not None)

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
        state.update(after)
        return result

    def make(self, kind: type, *args: Any) -> Any:
        """`kind(*args)`."""
        if not self.captured:
            return kind(*args)
        owner: Any = object.__new__(kind)
        self.on(owner, kind.__init__, *args)  # type: ignore[misc]
        return owner

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, which graphs may from now on read where it lies: it is not copied for them.
        Nothing but its holder may count on what is in it between two rounds."""
        if self._captures:
            self._held[tensor.data_ptr()] = weakref.ref(tensor)
        return tensor

    def forget(self) -> None:
        """Drops all graphs."""
        self._known.clear()
        self._own.clear()
        # the memory of graphs that are gone cannot be shared again
        self._pool = graphs.new_pool() if self._captures else None

    @property
    def num_replayed(self) -> int:
        return sum(step.replay is not None for step in self._known.values())

    def _run(self, call: _Call, values: tuple) -> tuple[Any, dict]:
        key = (call.key, *(_kind_of(value) for value in values))
        step = self._known.get(key)
        if step is None:
            step = self._known[key] = _Step()
        step.calls += 1
        if step.replay is not None:
            return step.replay([value for value in values if isinstance(value, torch.Tensor)])
        if step.refused:
            return call(values)
        if step.calls <= CALLS_BEFORE:
            return self._called(call, values, step.calls == 1)
        return self._capture(step, call, values)

    def _called(self, call: _Call, values: tuple, first: bool) -> tuple[Any, dict]:
        """A call that will be a replay some day; of calls within calls the time is taken once."""
        if getattr(_thread, "calling", False):
            return call(values)
        _thread.calling, started = True, time.perf_counter()
        try:
            return call(values)
        finally:
            _thread.calling = False
            spent_ms = 1e3 * (time.perf_counter() - started)
            if first:
                self.first_ms += spent_ms
            else:
                self.extra_ms += max(spent_ms - _REPLAY_MS, 0.0)

    def _capture(self, step: _Step, call: _Call, values: tuple) -> tuple[Any, dict]:
        """The first replay, or what a call gives where there can be none."""
        started = time.perf_counter()
        try:
            with graphs.inside():
                replay = _Replay(call, values, self._pool, self._lie_still)
        except Exception as failure:
            self._refuse(step, call, graphs.reason_of(failure))
            # nor can that of a broken one
            self._pool = graphs.new_pool()
            result = call(values)
        else:
            result = replay([value for value in values if isinstance(value, torch.Tensor)])
            agreement = _agreement(result, replay.trial)
            if agreement >= self._agreeing:
                self._own.update(replay.places)
                step.replay = replay
            else:
                self._refuse(step, call, f"{agreement:.0%} of its replay is what a call gives")
                # the replay has changed what it was given
                result = replay.trial
            replay.trial = None
        self.capture_ms += 1e3 * (time.perf_counter() - started)
        return result

    def _lie_still(self, value: torch.Tensor) -> bool:
        return any(steps._lies_still(value) for steps in self._families)

    def _refuse(self, step: _Step, call: _Call, reason: str) -> None:
        step.refused = True
        self.refusals.append(f"{call.name}: {reason}")


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
        owner: Any = object.__new__(self._kind)
        count = len(self._names)
        vars(owner).update(zip(self._names, values[:count]))
        result = self._function(owner, *values[count:])
        return result, vars(owner)


class _Replay:
    """A captured call. What it returns lies outside the graphs' memory, where no other graph
    writes."""

    def __init__(
        self,
        call: _Call,
        values: tuple,
        pool: tuple[int, int] | None,
        lies_still: Callable[[torch.Tensor], bool],
    ) -> None:
        def held(value):
            if not isinstance(value, torch.Tensor) or lies_still(value):
                return value
            return value.clone(memory_format=torch.contiguous_format)

        arguments = tuple(held(value) for value in values)
        self._inputs = [value for value in arguments if isinstance(value, torch.Tensor)]
        # on copies, whose changes do not matter: kernels are compiled, sizes become known
        copies = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in arguments)
        self.trial: Any = call(copies)
        rooms = {id(copy): value for copy, value in zip(copies, arguments)}
        self._outcome = _mapped(lambda x: _room_for(x, rooms), self.trial)
        inputs = {id(value) for value in self._inputs}

        def run() -> None:
            for room, value in zip(_tensors(self._outcome), _tensors(call(arguments))):
                if id(room) not in inputs:
                    room.copy_(value)

        self._replay, _ = graphs.capture_graph(run, self._inputs[0].device, pool)
        self._lie = [value.data_ptr() for value in self._inputs]
        # of all that is read and written
        self.places = {x.data_ptr() for x in (*self._inputs, *_tensors(self._outcome)) if x.numel()}

    def __call__(self, given: list[torch.Tensor]) -> tuple[Any, dict]:
        moved = [
            (own, value)
            for own, place, value in zip(self._inputs, self._lie, given)
            if value.data_ptr() != place
        ]
        if moved:
            if any(value.data_ptr() in self._lie for _, value in moved):
                # one input lies where another belongs
                moved = [(own, value.clone()) for own, value in moved]
            for own, value in moved:
                own.copy_(value)
        self._replay()
        return self._outcome


def _agreement(found: Any, expected: Any) -> float:
    """The share of entries that are the same, fractions to rounding, of the tensor in which fewest
    are."""

    def same(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            return torch.isclose(x.float(), y.float(), 0.01, 0.01, equal_nan=True)
        return x == y

    pairs = [(x, y) for x, y in zip(_tensors(found), _tensors(expected)) if x.numel()]
    # counted: on a GPU a mean of ones may be less than one
    others = ((int((~same(x, y)).sum()), x.numel()) for x, y in pairs)
    return min((1.0 - different / total for different, total in others), default=1.0)


def _room_for(value: Any, rooms: dict[int, torch.Tensor]) -> Any:
    """Where a result will lie: in the argument that it is, or in a tensor of its own."""
    if not isinstance(value, torch.Tensor) or id(value) in rooms:
        return rooms.get(id(value), value)
    return torch.empty_like(value, memory_format=torch.contiguous_format)


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
