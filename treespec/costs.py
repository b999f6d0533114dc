"""What the parts of a round cost, as `tree="auto"` measures them while it runs."""

from __future__ import annotations

import math

import numpy as np

from treespec.whatif import CostCurve, RoundCosts

# Nodes that a draft level of `auto` forwards, and children of each.
FRONTIER_WIDTH = 3
# Rounds of plain decoding that the usual rate of a text weighs as much as.
_RATE_ROUNDS = 3.0
# Rounds of plain decoding within which its time is expected to settle.
_PLAIN_ROUNDS = 12
# A wider verification before any was measured: milliseconds of a further node, as a share of one.
_NODE_SHARE = 0.03
# Measurements of a size after which it tells the pace of all.
_SURE = 10
# Most measurements that a size counts for, as one of a tuning file does.
_MOST = 40.0
# What a size's measurements count for after a text that made none, but never for less than those
# that suffice to be believed.
_STALE = 0.5
# Plain decoding that seems so much dearer than a wider verification was measured in a busy moment.
_TOO_DEAR = 1.25
# No part of a round takes less: a time that is what others left of it could be none at all.
_LEAST_MS = 1e-3
# The part of an error that is corrected at once, of what draft levels cost.
_LEVELS_STEP = 0.2
# Measurements of a cost of which the smallest counts: the first ones find cold code.
_FEW = 3
# What a verification that the last text did not measure is taken for, as a share of what it was
# taken for then: one measured in a busy moment would never be measured again. The second is of one
# that was measured often enough to be believed.
_DOUBT, _SLIGHT_DOUBT = 0.9, 0.97
# The fixed part of a round of several sequences, before it is known.
_FIXED_SHARE = 0.6
# Sequences that differ by less than this share of what is left may yet change places.
_CLOSE = 0.15


def row_shares(left: list[int], fixed: float) -> np.ndarray:
    """What a token of each sequence is worth, as a share of one of every sequence.

    A batch lasts as long as its slowest sequence. A token of any sequence saves that sequence's own
    part of a round; only one of the sequence that ends last saves a round's fixed part too.

    Args:
        left: tokens every sequence may still write.
        fixed: the part of a round's time that does not depend on the number of sequences.

    Returns:
        float64 `[B]`; their sum is 1.
    """
    tokens = np.array(left, dtype=float)
    if len(tokens) == 1:
        return np.ones(1)
    close = 2.0 + _CLOSE * tokens.mean()
    later = np.clip(0.5 + (tokens[:, None] - tokens) / (2.0 * close), 1e-3, 1.0)
    np.fill_diagonal(later, 1.0)
    last = later.prod(axis=1)
    return (1.0 - fixed) / len(tokens) + fixed * last / last.sum()


def never_falling(times: dict[int, float], counts: dict[int, float]) -> dict[int, float]:
    """Times by size, neighbours of which the larger is the faster averaged by how often they were
    measured.

    Ayer et al., An Empirical Distribution Function for Sampling with Incomplete Information, 1955:
    pool adjacent violators.
    """
    pools: list[tuple[float, float, list[int]]] = []
    for size in sorted(times):
        time, count, sizes = times[size], counts[size], [size]
        while pools and pools[-1][0] > time:
            other, further, smaller = pools.pop()
            time = (count * time + further * other) / (count + further)
            count, sizes = count + further, smaller + sizes
        pools.append((time, count, sizes))
    return {size: time for time, _, sizes in pools for size in sizes}


class RunningTime:
    """A cost, in milliseconds unless said otherwise, that follows slow drift and shrugs off
    outliers."""

    def __init__(self, milliseconds: float | None = None) -> None:
        self.value = milliseconds
        # settled measurements
        self._count = 0 if milliseconds is None else _FEW

    def add(self, milliseconds: float, settled: bool = True) -> None:
        """Takes in a measurement; one that is not settled counts only until there is a better."""
        milliseconds = max(milliseconds, _LEAST_MS)
        if self.value is None or (settled and self._count == 0):
            self.value = milliseconds
        elif settled and self.sure:
            # a preempted process can be off by any factor; clipped, the mean is nearly the median
            clipped = min(max(milliseconds, 0.7 * self.value), 1.4 * self.value)
            self.value += 0.1 * (clipped - self.value)
        elif settled or self._count == 0:
            self.value = min(self.value, milliseconds)
        self._count += settled

    @property
    def sure(self) -> bool:
        """Whether it was measured often enough to be believed."""
        return self._count >= _FEW

    def expected(self, guess: float) -> float:
        """The cost; a guess before there is a measurement, and where only few or unsettled ones say
        more."""
        if self.value is None:
            return guess
        return self.value if self.sure else min(self.value, guess)


class VerifyCosts:
    """Milliseconds of a verification by its number of nodes, and of what a tree takes to be decided
    and committed beyond a single token; times a pace that all sizes share: the text grows longer,
    the machine busier. Plain decoding's own time, once it is known, stays unless texts go by that
    do not measure it: the pace says what it takes now.

    Args:
        rows: sequences verified together.
        known: from a tuning file.
    """

    def __init__(self, rows: int, known: dict[int, float] | None = None) -> None:
        self._rows = rows
        self.times = dict(known or {})
        self.pace = 1.0
        # settled measurements of every size, and the sizes measured in this text
        self._counts = dict.fromkeys(self.times, _MOST)
        self._fresh: set[int] = set()
        # times as they were measured, of sizes doubted since
        self._doubted: dict[int, float] = {}
        # of forwards that were not recorded yet, used until there is better
        self._early: dict[int, float] = {}
        # through what was known at the last measurement, and what was read off it
        self._curve: CostCurve | None = None
        self._read: dict[int, float] = {}

    def begin(self) -> None:
        """A new text begins, for which times that the last one did not measure are doubted; the
        next measurement ends that."""
        self._curve = None
        plain = self._plain()
        for size, count in self._counts.items():
            if size in self._fresh:
                continue
            self._counts[size] = count = max(_STALE * count, min(count, _FEW))
            if plain is not None and count < _SURE:
                # where plain decoding was taken for dear in a busy moment everything seems to gain
                self._doubt(size, plain, _DOUBT if size == 1 or count < _FEW else _SLIGHT_DOUBT)
        self._fresh.clear()

    def _doubt(self, size: int, plain: float, share: float) -> None:
        """Takes a size for less than before, but no wider one for less than plain decoding."""
        usual = self.times[size]
        self._doubted.setdefault(size, usual)
        least = plain * self._prior(size) / self._prior(1) if size > 1 else 0.0
        self.times[size] = max(share * usual, min(usual, least))

    def _is_doubtful(self, plain: float) -> bool:
        """Whether this time of plain decoding gives way to the next measurement."""
        return 1 in self._doubted or plain > _TOO_DEAR * min(self.times.values())

    def _plain(self) -> float | None:
        """Plain decoding's time at a pace of one: no wider verification takes less."""
        return min(self.times.values()) if 1 in self.times else None

    def add(
        self, num_nodes: int, milliseconds: float, settled: bool = True, drafted: bool = False
    ) -> None:
        """Takes in a verification; one right after a draft's forwards finds other caches than plain
        decoding does, and does not move the pace."""
        milliseconds = max(milliseconds, _LEAST_MS)
        self._curve = None
        if not settled:
            self._early[num_nodes] = min(milliseconds, self._early.get(num_nodes, math.inf))
            return
        self._fresh.add(num_nodes)
        usual = self.times.get(num_nodes)
        if num_nodes == 1 and usual is not None and self._is_doubtful(usual):
            self._doubted.pop(1, None)
            usual = None
        if usual is None:
            self.times[num_nodes] = milliseconds / self.pace
            self._counts[num_nodes] = 1.0
            return
        usual = self.times[num_nodes] = self._doubted.pop(num_nodes, usual)
        count = self._counts[num_nodes] = min(self._counts[num_nodes] + 1.0, _MOST)
        ratio = min(max(milliseconds / usual, 0.5 * self.pace), 1.4 * self.pace)
        # a size that was measured once or twice says little of the pace
        if not drafted:
            self.pace += 0.1 * min(count / _SURE, 1.0) * (ratio - self.pace)
        # were all times to follow, they could all shrink as the pace grows, but for those in no use
        if num_nodes > 1 or count <= _SURE:
            step = max(1.0 / count, 0.05)
            self.times[num_nodes] += step * (usual * ratio / self.pace - usual)

    def at(self, num_nodes: int) -> float | None:
        """Measured, or on a line between what was measured; None before any measurement."""
        if num_nodes == 1 and (plain := self._plain()) is not None:
            return self.pace * plain
        if self._curve is not None and num_nodes in self._read:
            return self._read[num_nodes]
        known = self.times or self._early
        if not known:
            return None
        largest, smallest = max(known), min(known)
        if len(known) == 1 and num_nodes > largest:
            factor = self._prior(num_nodes) / self._prior(largest)
        elif num_nodes < smallest:
            factor = self._prior(num_nodes) / self._prior(smallest)
        else:
            factor = 1.0
        if self._curve is None:
            if (plain := self._plain()) is not None:
                known = {**known, 1: plain}
            self._curve = CostCurve(never_falling(known, self._counts) if self.times else known)
            self._read.clear()
        found = self._read[num_nodes] = self.pace * factor * self._curve.at(num_nodes)
        return found

    def _prior(self, num_nodes: int) -> float:
        return 1.0 + _NODE_SHARE * (self._rows * num_nodes - 1)


class MeasuredCosts:
    """What the parts of a round cost for about this many rows, and the rate they have led to."""

    def __init__(self, rows: int, known: RoundCosts | None = None) -> None:
        self._rows = rows
        self.verify = VerifyCosts(rows, known.verify_ms if known else None)
        drafted = known is not None and known.level_ms
        self.root = RunningTime(known.root_ms if drafted else None)
        self.level = RunningTime(known.level(FRONTIER_WIDTH) if drafted else None)
        self.lookup = RunningTime(known.lookup_ms if known and known.lookup_ms else None)
        self.miss = RunningTime()
        self.overhead = RunningTime(known.overhead_ms if known else None)
        # what it takes the draft to take in prompts, over what it takes the target
        self.catch_up = RunningTime()
        self.tokens = self.milliseconds = self._usual_rate = 0.0
        self._rounds = self._all_rounds = 0
        # how far predicted times of rounds were from measured ones
        self.error = RunningTime()

    def begin(self) -> None:
        """A new text, which is expected to be like the mean of the earlier ones."""
        self.verify.begin()
        if self.milliseconds > 0 and self._rounds > 0:
            rate = self.tokens / self.milliseconds
            self._usual_rate += 0.25 * (rate - self._usual_rate) if self._usual_rate else rate
        self._rounds = 0
        self.milliseconds = _RATE_ROUNDS * (self.plain_ms or 0.0)
        # half way to plain decoding, so that what may help is tried
        self.tokens = 0.5 * (_RATE_ROUNDS + self.milliseconds * self._usual_rate)

    def as_costs(self) -> RoundCosts | None:
        """A snapshot; None before any measurement."""
        if not self.verify.times:
            return None
        sizes = sorted({1, *self.verify.times})
        return RoundCosts(
            {size: self.verify.at(size) or 0.0 for size in sizes},
            self.root.value or 0.0,
            None if self.level.value is None else {FRONTIER_WIDTH: self.level.value},
            self.lookup.value or 0.0,
            self.overhead.value or 0.0,
        )

    @property
    def needs_plain(self) -> bool:
        """Whether plain decoding, which everything is held against, is still to be measured; that
        is given up where its time does not settle."""
        return 1 not in self.verify.times and self._all_rounds < _PLAIN_ROUNDS

    @property
    def plain_ms(self) -> float | None:
        verify = self.verify.at(1)
        return None if verify is None else verify + (self.overhead.value or 0.0)

    def fixed_share(self, alone: MeasuredCosts) -> float:
        """The part of a round of plain decoding that does not depend on the number of sequences.

        Args:
            alone: costs of one sequence.
        """
        together, single = self.plain_ms, alone.plain_ms
        if together is None or single is None or self._rows == 1:
            return _FIXED_SHARE
        own = (together - single) / (self._rows - 1)
        return min(max((single - own) / together, 0.0), 1.0)

    @property
    def rate(self) -> float | None:
        """Tokens of a row per millisecond lately, and never less than plain decoding's; None before
        any time is known."""
        running = self.tokens / self.milliseconds if self.milliseconds > 0 else 0.0
        plain = 1.0 / self.plain_ms if self.plain_ms else 0.0
        return max(running, plain) or None

    def add_levels(
        self,
        levels: int,
        milliseconds: float,
        settled: bool,
        beside: RunningTime | None = None,
        doubted: bool = False,
    ) -> None:
        """Takes in what so many draft levels took together.

        Rounds of different depth tell the first level from further ones, so once both are known
        every round corrects them by their part in it (normalised least mean squares).

        Args:
            levels: of the draft.
            milliseconds: of the levels and of what was beside them.
            settled: nothing else was unusual about them.
            beside: the cost of that; None for nothing.
            doubted: it was not measured alone for long, and may be less.
        """
        if beside is not None:
            milliseconds = max(milliseconds - (beside.value or 0.0), 0.1 * milliseconds)
        root, level, further = self.root.value, self.level.value, levels - 1
        if root is None or level is None or not (self.root.sure and self.level.sure):
            self.root.add(milliseconds / levels, settled)
            if further:
                self.level.add(milliseconds / levels, settled)
        elif settled:
            expected = root + further * level
            missing = min(max(milliseconds - expected, -0.4 * expected), 0.4 * expected)
            step = _LEVELS_STEP * missing / (1 + further * further)
            least = 0.1 * expected / levels
            root, level = max(root + step, least), max(level + further * step, least)
            if doubted and beside is not None and beside.value is not None and root < level:
                # than a further one it takes no less: the rest was taken for what is beside it
                part = min(level - root, 0.5 * beside.value)
                root, beside.value = root + part, beside.value - part
            self.root.value, self.level.value = root, level

    def add_rate(self, tokens: float, milliseconds: float) -> None:
        self._rounds += 1
        self._all_rounds += 1
        self.tokens = self.tokens * 0.95 + tokens
        self.milliseconds = self.milliseconds * 0.95 + milliseconds
