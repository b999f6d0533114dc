"""How a comparison is run: every method continues a prompt before any sees the next, and each text
is checked before its time is kept.

Methods of ours can pause after a round, so they run side by side, a slice of time each: a machine
that is slow for a second is slow for all of them. The others run one after another.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from treespec.bench import figures
from treespec.bench.methods import Continuation, Method, Stepwise, Task
from treespec.bench.models import Pair
from treespec.bench.results import RunFile
from treespec.demo import first_difference_gap

# Long enough that what the others left in the caches is soon forgotten: slices of 50 ms made every
# method slower.
SLICE_S = 0.2


class DifferingText(Exception):
    """A float32 text of ours is not the oracle's; no time of the run counts."""


class OutOfMemory(ValueError):
    """A method did not fit the memory; the message names it."""


class MethodFailed(Exception):
    """A method raised `error`."""

    def __init__(self, method: Method, error: Exception) -> None:
        super().__init__(f"{method.name}: {error}")
        self.method, self.error = method, error


@dataclass
class Group:
    """Methods and tasks that are run together, in turns.

    Attributes:
        methods: plain generation first.
        tasks: one turn each.
        not_run: rows left out and why.
        label: follows a method's name where the record says that it could not run here.
    """

    methods: list[Method]
    tasks: list[Task]
    not_run: dict[str, str]
    label: str = ""

    def turn_of(self, task: Task) -> tuple[int, int]:
        """How many tasks of its category, and how many categories, come before."""
        alike = [other.id for other in self.tasks if other.category == task.category]
        categories = list(dict.fromkeys(other.category for other in self.tasks))
        return alike.index(task.id), categories.index(task.category)


class Clock:
    """The minutes of a run, over all its sittings.

    Args:
        minutes: the budget, None for no limit.
        elapsed_s: seconds used by earlier sittings.
    """

    def __init__(self, minutes: float | None, elapsed_s: float) -> None:
        self.minutes = minutes
        self._started = time.perf_counter() - elapsed_s

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._started

    def left_s(self) -> float:
        return float("inf") if self.minutes is None else 60 * self.minutes - self.elapsed_s


def _prepare(method: Method, task: Task, oracle: torch.Tensor) -> None:
    if method.prepare is None:
        return
    try:
        method.prepare(task, oracle)
    except Exception as error:
        raise MethodFailed(method, error) from error


def _walk(method: Method, task: Task) -> Generator[Any, None, Continuation]:
    """Continues, pausing wherever the method can."""
    if isinstance(method.run, Stepwise):
        return (yield from method.run.steps(task))
    return method.run(task)


def _slice(
    walk: Generator[Any, None, Continuation], device: torch.device
) -> tuple[Continuation | None, float]:
    """Goes on for a slice of time; what was written, if that was the end, and the seconds, with the
    device idle before and after."""
    found = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    try:
        while time.perf_counter() - started < SLICE_S:
            next(walk)
    except StopIteration as end:
        found = end.value
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return found, time.perf_counter() - started


def timed(methods: list[Method], task: Task) -> Iterator[tuple[Method, Continuation, float]]:
    """Lets methods continue a task side by side; yields every one with what it wrote and its own
    seconds, the quickest first.

    Raises:
        MethodFailed: if one of them raises.
    """
    walks = {method.name: _walk(method, task) for method in methods}
    seconds = dict.fromkeys(walks, 0.0)
    while walks:
        for method in [method for method in methods if method.name in walks]:
            try:
                found, spent = _slice(walks[method.name], task.input_ids.device)
            except Exception as error:
                raise MethodFailed(method, error) from error
            seconds[method.name] += spent
            if found is not None:
                del walks[method.name]
                yield method, found, seconds[method.name]


def identical(found: torch.Tensor, oracle: torch.Tensor) -> bool:
    """Whether two texts `[B, new]` are the same, token for token."""
    return found.shape == oracle.shape and torch.equal(found, oracle)


def logit_gap(target, task: Task, found: torch.Tensor, oracle: torch.Tensor) -> float | None:
    """How much the target prefers the oracle's token where the texts of the first differing row
    part; None when one merely ends."""
    if found.shape != oracle.shape:
        return None
    row = int((found != oracle).any(1).nonzero()[0, 0])
    prompt = task.input_ids[row][task.attention_mask[row].bool()]
    texts = [torch.cat([prompt, ids[row].to(prompt.device)]) for ids in (oracle, found)]
    return first_difference_gap(target, *texts)


class Comparison:
    """A run over groups of methods and tasks.

    Args:
        pair: the models.
        oracle: what our rows must write.
        run: the file that keeps samples.
        warm_ups: untimed tasks of every method before a group's first turn.
        minutes: no turn is begun that would end later; the first turn of a group always is.
        on_step: called with a line on what was done.
        record_ahead: forwards of our rows are recorded before the warm-ups, not as they occur.
    """

    def __init__(
        self,
        pair: Pair,
        oracle: Callable[[Task], torch.Tensor],
        run: RunFile,
        warm_ups: int,
        minutes: float | None,
        on_step: Callable[[str], None],
        record_ahead: bool = False,
    ) -> None:
        self.pair = pair
        self.run_file = run
        self.warm_ups = warm_ups
        self.on_step = on_step
        self.record_ahead = record_ahead
        self.clock = Clock(minutes, run.record["elapsed_s"])
        self._oracle = oracle
        self._cut = False

    def run(self, groups: list[Group]) -> dict[str, Any]:
        """Runs what is not yet in the file; returns the finished record.

        Raises:
            DifferingText: if a float32 text of ours differs; the file keeps no time then.
            OutOfMemory: if a row of ours does not fit; what was measured is kept.
        """
        record = self.run_file.record
        record["sittings"] += 1
        methods = {m.name: m.about() for group in groups for m in group.methods}
        record["methods"] = list(methods.values())
        record["tasks"] = [_about_task(task) for group in groups for task in group.tasks]
        for group in groups:
            record["not_run"] |= group.not_run
        try:
            for place, group in enumerate(groups):
                self._group(group, self.clock.left_s() / (len(groups) - place))
        except DifferingText as error:
            self.run_file.fail(str(error))
            raise
        finally:
            record["elapsed_s"] = self.clock.elapsed_s
            self.run_file.save()
        rows = figures.all_rows(record)
        self.run_file.finish(rows, "minutes" if self._cut else None)
        return record

    def _group(self, group: Group, seconds: float) -> None:
        done = [all(self._has(m, task) for m in self._left(group)) for task in group.tasks]
        if all(done):
            return
        end = self.clock.elapsed_s + seconds
        if self.record_ahead:
            self._record(group)
        self._warm_up(group)
        longest, turns = 0.0, sum(done)
        for task, complete in zip(group.tasks, done):
            if complete:
                continue
            if turns and self.clock.elapsed_s + longest > end:
                self._cut = True
                return
            started = self.clock.elapsed_s
            self._turn(group, task)
            turns += 1
            longest = max(longest, self.clock.elapsed_s - started)

    def _has(self, method: Method, task: Task) -> bool:
        return self.run_file.has(method.name, task.id)

    def _left(self, group: Group) -> list[Method]:
        not_run = self.run_file.record["not_run"]
        return [method for method in group.methods if method.name + group.label not in not_run]

    def _record(self, group: Group) -> None:
        longest: dict[float, Task] = {}
        for task in sorted(group.tasks, key=lambda task: task.input_ids.shape[1] + task.new_tokens):
            longest[task.temperature] = task
        for method in self._left(group):
            if not (method.ours and isinstance(method.run, Stepwise)):
                continue
            started = time.perf_counter()
            for task in longest.values():
                try:
                    method.run.record(task)
                except Exception as error:
                    # raises: no run goes on without one of ours
                    self._leave_out(group, method, task, error)
            seconds = self.run_file.record.setdefault("warmup_s", {})
            seconds[method.name + group.label] = time.perf_counter() - started
            self.on_step(f"{method.name}, recorded ahead")

    def _warm_up(self, group: Group) -> None:
        for task in (group.tasks * self.warm_ups)[: self.warm_ups]:
            oracle = self._text(task)
            for party in _parties(self._left(group)):
                self._attempt(group, party, task, oracle, keep=False)

    def _turn(self, group: Group, task: Task) -> None:
        oracle = self._text(task)
        for party in _parties(self._left(group), *group.turn_of(task)):
            left = [method for method in party if not self._has(method, task)]
            self._attempt(group, left, task, oracle, keep=True)

    def _text(self, task: Task) -> torch.Tensor:
        """The oracle's text, kept in the file until the run is finished."""
        kept = self.run_file.record["oracle"]
        if task.id not in kept:
            kept[task.id] = self._oracle(task).tolist()
        return torch.tensor(kept[task.id])

    def _attempt(
        self, group: Group, party: list[Method], task: Task, oracle: torch.Tensor, keep: bool
    ) -> None:
        """One continuation of each, checked; a method of others that cannot run is left out by
        name."""
        written = []
        try:
            for method in party:
                _prepare(method, task, oracle)
            for result in timed(party, task):
                # checked later: that would find its way into the caches of those not done yet
                written.append(result)
        except MethodFailed as failure:
            self._leave_out(group, failure.method, task, failure.error)
        finally:
            for method, found, seconds in written:
                sample = self._sample(method, task, found, seconds, oracle)
                if keep:
                    self.run_file.record["elapsed_s"] = self.clock.elapsed_s
                    self.run_file.add(sample)
                self.on_step(f"{method.name}, {task.id}{'' if keep else ', warm-up'}")

    def _leave_out(self, group: Group, method: Method, task: Task, error: Exception) -> None:
        """Goes on without a method of others that failed; no run goes on without one of ours."""
        out_of_memory = _is_out_of_memory(error)
        if method.ours or method.name == figures.BASE:
            if out_of_memory:
                raise OutOfMemory(
                    f"too little memory for {method.name!r} on {task.id}: what was measured "
                    f"is in {self.run_file.path}; use fewer --rows, a smaller --batch, or "
                    "fewer --new-tokens"
                ) from error
            raise error
        reason = "too little memory" if out_of_memory else _one_line(error)
        self.run_file.drop(method.name, {t.id for t in group.tasks}, group.label, reason)
        self.on_step(f"{method.name}: not run: {reason}")

    def _sample(
        self, method: Method, task: Task, found: Continuation, seconds: float, oracle: torch.Tensor
    ) -> dict[str, Any]:
        # others draw their own noise, so sampled texts of theirs have nothing to be compared with
        compared = task.temperature == 0 or method.ours
        same = identical(found.ids, oracle) if compared else None
        gap = None
        if same is False and task.temperature == 0:
            gap = logit_gap(self.pair.target, task, found.ids, oracle)
        if same is False and method.ours and self.pair.exact:
            told = f", logit gap {gap:.2g}" if gap is not None else ""
            raise DifferingText(f"{method.name!r} wrote another text on {task.id}{told}")
        return {
            "method": method.name,
            "task": task.id,
            "sitting": self.run_file.record["sittings"],
            "seconds": seconds,
            "new_tokens": found.ids.numel(),
            "row_rounds": found.row_rounds,
            "identical": same,
            "logit_gap": gap,
            "text": hashlib.sha256(str(found.ids.tolist()).encode()).hexdigest()[:12],
            "stats": found.stats,
        }


def _parties(methods: list[Method], turn: int = 0, shift: int = 0) -> list[list[Method]]:
    """Ours side by side, the others by themselves; all of ours come first, second, ... equally
    often as turns go by, and so do these parties."""
    ours = [method for method in methods if method.ours]
    parties = [[method] for method in methods if not method.ours]
    if ours:
        # who follows whom changes after each of them came first once
        random.Random(turn // len(ours)).shuffle(ours)
        parties.append(_rotated(ours, turn + shift))
    return _rotated(parties, turn + shift)


def _rotated(items: list, places: int) -> list:
    first = places % len(items) if items else 0
    return items[first:] + items[:first]


def _about_task(task: Task) -> dict[str, Any]:
    return {
        "id": task.id,
        "category": task.category,
        "temperature": task.temperature,
        "batch": task.batch,
        "prompt_tokens": int(task.attention_mask.sum()),
        "new_tokens": task.new_tokens,
        "seed": task.seed,
    }


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
