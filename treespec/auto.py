"""`tree="auto"`: what to draft, decided every round by what it is expected to gain against what it
costs.

The yardstick is the running rate of tokens per millisecond. A step that costs `t` ms (asking the
draft, one more level, a wider verification) pays when the tokens it is expected to add exceed `rate
* t`; that is the optimal stopping rule of a renewal-reward process. Costs are running means of
measured times, expectations running shares of accepted proposals. Nothing here can change the text,
only its speed. See docs/design/003-auto.md.
"""

from __future__ import annotations

import math

import numpy as np

from treespec.policy import (
    COUPLED_SHARPNESS,
    GREEDY_SHARPNESS,
    LOOKUP_LATER,
    LOOKUP_PRIOR,
    Outcome,
    Policy,
)

# Few widths, so that each is recorded and measured early.
_NODE_SIZES = (1, 4, 8, 12, 16, 24, 32, 48, 64)
_FRONTIER_WIDTH = 4
_CHILDREN = 4
_LEAST_PROBABILITY = 0.02
_PRIOR_WEIGHT = 8.0
_FORGET = 0.97
_LONGEST_SILENCE = 128


class RunningShare:
    """A share of successes that starts from a prior and forgets slowly."""

    def __init__(self, prior: float) -> None:
        self._hits, self._trials = prior * _PRIOR_WEIGHT, _PRIOR_WEIGHT

    def add(self, hits: float, trials: float) -> None:
        self._hits = self._hits * _FORGET + hits
        self._trials = self._trials * _FORGET + trials

    @property
    def value(self) -> float:
        return self._hits / self._trials


class RunningTime:
    """A cost in milliseconds that follows slow drift and shrugs off outliers."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, milliseconds: float) -> None:
        if self.value is None:
            self.value = milliseconds
        else:
            # a preempted process can be off by any factor; a faster time is always believed
            self.value += 0.1 * (min(milliseconds, 2.0 * self.value) - self.value)


class VerifyCosts:
    """Milliseconds of a verification by its number of nodes."""

    def __init__(self) -> None:
        self.times = {size: RunningTime() for size in _NODE_SIZES}
        self._seen: dict[int, int] = {}

    def add(self, num_nodes: int, milliseconds: float) -> None:
        # the first calls of a size are recorded and checked, which takes several times as long
        self._seen[num_nodes] = self._seen.get(num_nodes, 0) + 1
        if self._seen[num_nodes] > 3:
            self.times[num_nodes].add(milliseconds)

    def at(self, num_nodes: int) -> float | None:
        """Measured, or interpolated between what was measured; None before any measurement."""
        known = [(size, time.value) for size, time in self.times.items() if time.value is not None]
        if not known:
            return None
        if len(known) == 1:
            size, value = known[0]
            return value * (1 + 0.02 * (num_nodes - size)) if num_nodes > size else value
        sizes, values = zip(*known)
        # a wider verification is never cheaper; noise may say so
        rising = np.maximum.accumulate(values)
        if num_nodes > sizes[-1]:
            slope = (rising[-1] - rising[0]) / (sizes[-1] - sizes[0])
            return float(rising[-1] + slope * (num_nodes - sizes[-1]))
        return float(np.interp(num_nodes, sizes, rising))


class AutoPolicy(Policy):
    """Decides by expected gain and measured cost.

    Args:
        with_model: a draft model is among the sources.
        with_lookup: a lookup is among the sources.
    """

    max_nodes = 64
    node_sizes = _NODE_SIZES

    def __init__(self, with_model: bool, with_lookup: bool) -> None:
        self.with_model = with_model
        self.max_depth = 10
        self.lookup_length = 10 if with_lookup else 0
        self.max_rows = _FRONTIER_WIDTH * self.max_depth + 1
        self.verify = VerifyCosts()
        self.root_ms, self.level_ms = RunningTime(), RunningTime()
        self.overhead_ms = RunningTime()
        self.lookup_first = [RunningShare(prior) for prior in LOOKUP_PRIOR]
        self.lookup_later = [RunningShare(max(prior, LOOKUP_LATER)) for prior in LOOKUP_PRIOR]
        self.draft_hits = RunningShare(0.7)  # a node the draft expanded has the right child
        self.draft_gain = RunningShare(1.5)  # tokens kept of a round that asked the draft
        self._sharpness = {False: GREEDY_SHARPNESS, True: COUPLED_SHARPNESS}
        self._tokens, self._milliseconds = 0.0, 0.0
        self._silence, self._silent_rounds = 8, 0
        self._rounds = 0

    @property
    def rate(self) -> float | None:
        """Tokens per millisecond lately; None before any time is known."""
        return self._tokens / self._milliseconds if self._milliseconds > 0 else None

    def _pays(self, tokens: float, milliseconds: float | None) -> bool:
        return milliseconds is None or self.rate is None or tokens > self.rate * milliseconds

    def lookup_chances(self, match_lengths):
        slots = [min(length, len(LOOKUP_PRIOR) - 1) for length in match_lengths]
        return [self.lookup_first[k].value if k else 0.0 for k in slots], [
            self.lookup_later[k].value for k in slots
        ]

    def sharpness(self, picker):
        return (
            self._sharpness[picker.do_sample] if picker.knows_pick or not picker.do_sample else 1.0
        )

    def wants_draft(self, lookup_scores):
        if not self.with_model:
            return False
        covered = 0.0
        if lookup_scores.shape[1]:
            # what lookups are expected to bring without the draft, held against what the draft
            # usually brings
            covered = float(lookup_scores.exp().sum(1).mean())
        gain = (
            self.draft_gain.value - min(covered, self.draft_gain.value)
            if covered
            else self.draft_gain.value
        )
        cost = None
        if self.root_ms.value is not None:
            cost = self.root_ms.value + (self.level_ms.value or 0.0)
        if self._pays(gain, cost):
            self._silent_rounds = 0
            return True
        if covered < 0.5:
            self._silent_rounds += 1
            if self._silent_rounds >= self._silence:
                # ask again now and then: the text may have become easier for the draft
                self._silent_rounds = 0
                self._silence = min(2 * self._silence, _LONGEST_SILENCE)
                return True
        return False

    def children(self, depth, logprobs):
        return _CHILDREN, None

    def frontier(self, depth):
        return _FRONTIER_WIDTH, math.log(_LEAST_PROBABILITY)

    def worth_expanding(self, scores):
        expected = float(scores.exp().sum(1).mean()) * self.draft_hits.value
        return expected > 0 and self._pays(expected, self.level_ms.value)

    def nodes_to_verify(self, scores):
        rate = self.rate
        probabilities = scores.exp().sort(dim=1, descending=True).values
        expected = probabilities.cumsum(1).mean(0)
        total = int((probabilities > 0).sum(1).max())
        best, best_value = 1, None
        for size in _NODE_SIZES:
            if size > self.max_nodes:
                break
            cost = self.verify.at(size)
            if rate is None or cost is None:
                best = min(24, total)
                break
            value = float(expected[min(size, total) - 1]) - rate * cost
            if best_value is None or value > best_value:
                best, best_value = min(size, total), value
            if size >= total:
                break
        return best

    def observe(self, outcome: Outcome) -> None:
        self._rounds += 1
        rows = len(outcome.paths)
        self.verify.add(outcome.num_nodes, outcome.verify_ms)
        usual = self.verify.at(outcome.num_nodes)
        milliseconds = outcome.total_ms
        if usual is not None:
            # one slow round (a recording, a busy machine) must not move the yardstick
            milliseconds = min(
                milliseconds, 2.0 * (usual + outcome.draft_levels * (self.level_ms.value or usual))
            )
            self._tokens = self._tokens * _FORGET + outcome.new_tokens / rows
            self._milliseconds = self._milliseconds * _FORGET + milliseconds
        if outcome.draft_levels:
            self._learn_draft(outcome)
        if outcome.match_lengths is not None and outcome.tree.lookup is not None:
            self._learn_lookup(outcome, outcome.match_lengths)

    def _learn_draft(self, outcome: Outcome) -> None:
        levels = outcome.draft_levels
        if self._rounds > 3:
            per_level = outcome.draft_ms / levels
            (self.root_ms if levels == 1 else self.level_ms).add(per_level)
            if levels > 1 and self.root_ms.value is None:
                self.root_ms.add(per_level)
        kept = sum(len(path) - 1 for path in outcome.paths) / len(outcome.paths)
        self.draft_gain.add(kept, 1.0)
        if kept > 0:
            self._silence = 8
        rows = outcome.tree.draft_rows.numpy(force=True)
        parents = outcome.tree.parents.numpy(force=True)
        scores = outcome.tree.scores.numpy(force=True)
        for row, path in enumerate(outcome.paths):
            for node, following in zip(path, [*path[1:], None]):
                if rows[row, node] < 0:
                    break
                hit = float(following is not None)
                self.draft_hits.add(hit, 1.0)
                expected = float(
                    np.exp(scores[row][parents[row] == node] - scores[row, node]).sum()
                )
                factor = self._sharpness[outcome.sampled] * math.exp(
                    0.05 * (hit - min(expected, 1.0))
                )
                self._sharpness[outcome.sampled] = min(max(factor, 0.5), 6.0)

    def _learn_lookup(self, outcome: Outcome, match_lengths: list[int]) -> None:
        lookup = outcome.tree.lookup.numpy(force=True)
        parents = outcome.tree.parents.numpy(force=True)
        for row, path in enumerate(outcome.paths):
            slot = min(match_lengths[row], len(LOOKUP_PRIOR) - 1)
            if slot == 0:
                continue
            offered = set(parents[row][lookup[row]].tolist())
            shares = self.lookup_first
            for node, following in zip(path, [*path[1:], None]):
                if node not in offered:
                    break
                hit = following is not None and bool(lookup[row, following])
                shares[slot].add(float(hit), 1.0)
                shares = self.lookup_later
                if not hit:
                    break

    def describe(self) -> str:
        rate = self.rate
        if rate is None:
            return "auto: nothing measured yet"
        verify = ", ".join(
            f"{size}: {time.value:.2f}"
            for size, time in self.verify.times.items()
            if time.value is not None
        )
        lines = [
            f"auto: {rate:.3f} tokens/ms lately; a step pays when it adds more than that per ms",
            f"verification ms by nodes: {verify or 'not measured'}",
        ]
        if self.with_model:
            level = self.level_ms.value
            lines.append(
                f"draft: {'not measured' if level is None else f'{level:.2f} ms'} a level, right "
                "child in "
                f"{self.draft_hits.value:.0%} of expanded nodes, {self.draft_gain.value:.2f} "
                "tokens kept when asked, "
                f"sharpness {self._sharpness[False]:.1f} greedy, {self._sharpness[True]:.1f} "
                "sampled"
            )
        if self.lookup_length:
            shares = ", ".join(
                f"{k}: {share.value:.0%}" for k, share in enumerate(self.lookup_first) if k
            )
            lines.append(f"lookup: right first token by match length {shares}")
        return "\n".join(lines)
