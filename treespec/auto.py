"""`tree="auto"`: what to draft, decided every round by what it is expected to gain against what it
costs.

The yardstick is the running rate of tokens per millisecond, never less than that of plain decoding.
A step that costs `t` ms (asking the lookups or the draft, one more level, a wider verification)
pays when the tokens it is expected to add exceed `rate * t`; that is the optimal stopping rule of a
renewal-reward process. Costs come from a tuning file or from the rounds themselves, expectations
from running shares of what was right. Nothing here can change the text, only its speed. See
docs/design/003-auto.md.
"""

from __future__ import annotations

import math

import numpy as np

from treespec import whatif
from treespec.policy import (
    COUPLED_SHARPNESS,
    GREEDY_SHARPNESS,
    LOOKUP_LATER,
    LOOKUP_PRIOR,
    Outcome,
    Policy,
)
from treespec.whatif import RoundCosts

# Few widths, so that each is recorded and measured early.
_NODE_SIZES = (1, 4, 8, 12, 16, 24, 32, 48, 64)
_FRONTIER_WIDTH = 4
_CHILDREN = 4
_LEAST_PROBABILITY = 0.02
# Rounds of plain decoding that the usual rate of a text weighs as much as.
_RATE_ROUNDS = 3.0
# How far above its mean a share is taken to be when a text begins, in units of its variance.
_HOPE = 0.5
# Prompts are of a kind by the bits of their length; all up to 255 tokens are of one.
_SHORT_BITS = 8
# Draft levels of the first round in a text that asks the draft.
_PROBE_LEVELS = 2
# A draft whose root has the right child this often is taken at its word.
_TRUSTED = 0.75
# Rounds of a text that are to pay for the draft's taking in its prompt.
_CATCH_UP_ROUNDS = 25
# Share of all time that may go into asking what is not expected to pay, to see whether it does now.
_EXPLORATION = 0.006
# A wider verification before any was measured: milliseconds of a further node, as a share of one.
_NODE_SHARE = 0.03


class Belief:
    """A running mean with two memories: this text, which tells quickly, and the texts before it.

    Args:
        prior: believed before anything is seen.
        weight: how many samples of this text it takes to weigh as much as the earlier texts.
        forget: what a sample of this text is worth after the next one.
    """

    def __init__(self, prior: float, weight: float = 2.0, forget: float = 0.9) -> None:
        self._weight, self._forget = weight, forget
        self._prior = prior
        self._kinds: dict[int, list[float]] = {}
        self.begin(0)

    def begin(self, kind: int) -> None:
        """A new text begins; texts of another kind tell nothing of it."""
        self._long = self._kinds.setdefault(kind, [3.0 * self._prior, 3.0])
        self._sum = self._count = 0.0

    def age(self) -> None:
        """A round has passed; what the text told is a little staler."""
        self._sum *= 0.98
        self._count *= 0.98

    def add(self, value: float) -> None:
        # the many samples of a text that suits the draft must not drown out those that do not
        share = 1.0 / (1.0 + self._count / 3.0)
        self._long[0] += share * (value - 0.05 * self._long[0])
        self._long[1] += share * (1.0 - 0.05 * self._long[1])
        self._sum = self._sum * self._forget + value
        self._count = self._count * self._forget + 1.0

    @property
    def value(self) -> float:
        earlier = self._long[0] / self._long[1]
        return (self._weight * earlier + self._sum) / (self._weight + self._count)

    @property
    def untold(self) -> bool:
        """Whether this text has told nothing yet, or too long ago."""
        return self._count < 0.5

    @property
    def hopeful(self) -> float:
        """A share, and the more above its mean the less this text has told and the more texts
        differ."""
        value = min(max(self.value, 0.0), 1.0)
        return value + _HOPE * value * (1.0 - value) / (1.0 + self._count)


class RunningTime:
    """A cost in milliseconds that follows slow drift and shrugs off outliers."""

    def __init__(self, milliseconds: float | None = None) -> None:
        self.value = milliseconds
        self._settled = milliseconds is not None

    def add(self, milliseconds: float, settled: bool = True) -> None:
        """Takes in a measurement; one that is not settled counts only until there is a better."""
        if self.value is None or (settled and not self._settled):
            self.value, self._settled = milliseconds, settled
        elif settled:
            # a preempted process can be off by any factor; clipped, the mean is nearly the median
            clipped = min(max(milliseconds, 0.7 * self.value), 1.4 * self.value)
            self.value += 0.1 * (clipped - self.value)
        elif not self._settled:
            self.value = min(self.value, milliseconds)


class VerifyCosts:
    """Milliseconds of a verification by its number of nodes, times a pace that all sizes share: the
    text grows longer, the machine busier.

    Args:
        rows: sequences verified together.
        known: from a tuning file.
    """

    def __init__(self, rows: int, known: dict[int, float] | None = None) -> None:
        self._rows = rows
        self.times = dict(known or {})
        self.pace = 1.0
        # of forwards that were not recorded yet, used until there is better
        self._early: dict[int, float] = {}

    def add(self, num_nodes: int, milliseconds: float, settled: bool = True) -> None:
        if not settled:
            self._early[num_nodes] = min(milliseconds, self._early.get(num_nodes, math.inf))
            return
        usual = self.times.get(num_nodes)
        if usual is None:
            self.times[num_nodes] = milliseconds / self.pace
            return
        ratio = min(max(milliseconds / usual, 0.7 * self.pace), 1.4 * self.pace)
        self.pace += 0.1 * (ratio - self.pace)
        self.times[num_nodes] += 0.05 * (usual * ratio / self.pace - usual)

    def at(self, num_nodes: int) -> float | None:
        """Measured, or on a line between what was measured; None before any measurement."""
        known = self.times or self._early
        if not known:
            return None
        largest = max(known)
        if len(known) == 1 and num_nodes > largest:
            factor = self._prior(num_nodes) / self._prior(largest)
        elif num_nodes < (smallest := min(known)):
            factor = self._prior(num_nodes) / self._prior(smallest)
        else:
            factor = 1.0
        return self.pace * factor * whatif.interpolate(known, num_nodes)

    def _prior(self, num_nodes: int) -> float:
        return 1.0 + _NODE_SHARE * (self._rows * num_nodes - 1)


class MeasuredCosts:
    """What the parts of a round cost for about this many rows, and the rate they have led to."""

    def __init__(self, rows: int, known: RoundCosts | None = None) -> None:
        self.verify = VerifyCosts(rows, known.verify_ms if known else None)
        drafted = known is not None and known.level_ms
        self.root = RunningTime(known.root_ms if drafted else None)
        self.level = RunningTime(known.level(_FRONTIER_WIDTH) if drafted else None)
        self.lookup = RunningTime(known.lookup_ms if known and known.lookup_ms else None)
        self.miss = RunningTime()
        self.overhead = RunningTime(known.overhead_ms if known else None)
        self.catch_up: dict[int, RunningTime] = {}
        self.tokens = self.milliseconds = self._usual_rate = 0.0
        self._rounds = 0
        # how far predicted times of rounds were from measured ones
        self.error = RunningTime()

    def begin(self) -> None:
        """A new text, which is expected to be like the mean of the earlier ones."""
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
            None if self.level.value is None else {_FRONTIER_WIDTH: self.level.value},
            self.lookup.value or 0.0,
            self.overhead.value or 0.0,
        )

    @property
    def plain_ms(self) -> float | None:
        verify = self.verify.at(1)
        return None if verify is None else verify + (self.overhead.value or 0.0)

    @property
    def rate(self) -> float | None:
        """Tokens of a row per millisecond lately, and never less than plain decoding's; None before
        any time is known."""
        running = self.tokens / self.milliseconds if self.milliseconds > 0 else 0.0
        plain = 1.0 / self.plain_ms if self.plain_ms else 0.0
        return max(running, plain) or None

    def add_rate(self, tokens: float, milliseconds: float) -> None:
        self._rounds += 1
        self.tokens = self.tokens * 0.95 + tokens
        self.milliseconds = self.milliseconds * 0.95 + milliseconds


class Explorer:
    """Allows to ask, now and then, what is not expected to pay: a small share of all time."""

    def __init__(self) -> None:
        self._spent = self._elapsed = 0.0

    def pass_time(self, milliseconds: float) -> None:
        self._elapsed += milliseconds

    def spend(self, milliseconds: float) -> None:
        self._spent += milliseconds

    def allows(self, milliseconds: float) -> bool:
        return self._spent + milliseconds <= _EXPLORATION * self._elapsed


class AutoPolicy(Policy):
    """Decides by expected gain and measured cost.

    Args:
        with_model: a draft model is among the sources.
        with_lookup: a lookup is among the sources.
        costs: from a tuning file, by number of rows; empty to learn them in the first rounds.
        origin: where the costs come from, for `describe`.
        draft_share: the draft's parameters as a share of the target's; what it costs is guessed
            from this until it is known.
    """

    max_nodes = 64
    node_sizes = _NODE_SIZES

    def __init__(
        self,
        with_model: bool,
        with_lookup: bool,
        costs: dict[int, RoundCosts] | None = None,
        origin: str = "measured in its own rounds",
        draft_share: float = 0.2,
    ) -> None:
        self.with_model = with_model
        self.max_depth = 10
        self.lookup_length = 10 if with_lookup else 0
        self.max_rows = _FRONTIER_WIDTH * self.max_depth + 1
        self.origin = origin
        self._draft_share = draft_share
        self._costs = {rows: MeasuredCosts(rows, known) for rows, known in (costs or {}).items()}
        self.now = self._costs_for(1)
        self.lookup_first = [Belief(prior, 8.0, 0.95) for prior in LOOKUP_PRIOR]
        self.lookup_later = [Belief(max(p, LOOKUP_LATER), 8.0, 0.95) for p in LOOKUP_PRIOR]
        self.lookup_gain = Belief(0.5, 8.0, 0.98)  # tokens a lookup brings when asked
        # the same where it matched so many tokens
        self.match_gain = [Belief(2.0 * prior, 3.0, 0.93) for prior in LOOKUP_PRIOR]
        # the right child is among those of the root, and of a later node the draft expanded
        self.draft_first, self.draft_later = Belief(0.7), Belief(0.7, 4.0)
        self.ranks = [Belief(chance, 4.0) for chance in (0.5, 0.12, 0.05, 0.03)]
        # by kind of text, and by whether tokens are sampled
        self._sharpness: dict[tuple[int, bool], float] = {}
        self._lookup_explorer, self._draft_explorer = Explorer(), Explorer()
        self._exploring = self._lookup_exploring = self._draft_began = False
        self._depth, self._best_levels = 0, 2
        self._first_chance, self._kind = 0.0, 0
        self._rounds = {"plain": 0, "lookup": 0, "draft": 0}

    def _beliefs(self) -> list[Belief]:
        return [
            *self.lookup_first,
            *self.lookup_later,
            *self.match_gain,
            *self.ranks,
            self.lookup_gain,
            self.draft_first,
            self.draft_later,
        ]

    def _costs_for(self, rows: int) -> MeasuredCosts:
        """Costs of about so many rows: the next power of two."""
        rows = 1 << (rows - 1).bit_length()
        if rows not in self._costs:
            self._costs[rows] = MeasuredCosts(rows)
        return self._costs[rows]

    def begin(self, longest):
        # a draft may lose its way in long texts, where asking it also costs more to begin with
        self._kind = max(longest.bit_length(), _SHORT_BITS)
        for belief in self._beliefs():
            belief.begin(self._kind)
        self._draft_began = False
        for costs in self._costs.values():
            costs.begin()

    @property
    def rate(self) -> float | None:
        """Tokens of a row per millisecond lately; None before any time is known."""
        return self.now.rate

    def _pays(self, tokens: float, milliseconds: float) -> bool:
        return self.rate is None or tokens > self.rate * milliseconds

    def wants_lookup(self):
        self._first_chance = 0.0
        if self.lookup_length == 0:
            return False
        cost = self.now.miss.value or 0.0
        return self._pays(self.lookup_gain.value, cost) or self._lookup_explorer.allows(cost)

    def wants_matches(self, match_lengths):
        if max(match_lengths) == 0:
            return False
        slots = [min(length, len(LOOKUP_PRIOR) - 1) for length in match_lengths]
        gain = sum(self.match_gain[slot].value for slot in slots if slot) / len(slots)
        cost = (self.now.lookup.value or 0.0) - (self.now.miss.value or 0.0)
        self._lookup_exploring = not self._pays(gain, cost)
        return not self._lookup_exploring or self._lookup_explorer.allows(cost)

    def lookup_chances(self, match_lengths):
        slots = [min(length, len(LOOKUP_PRIOR) - 1) for length in match_lengths]
        first = [self.lookup_first[slot].value if slot else 0.0 for slot in slots]
        self._first_chance = min(1.0, sum(first) / len(first))
        return first, [self.lookup_later[slot].value for slot in slots]

    def sharpness(self, picker):
        if picker.knows_pick or not picker.do_sample:
            return self._sharpness_of(picker.do_sample)
        return 1.0

    def _sharpness_of(self, sampled: bool) -> float:
        prior = COUPLED_SHARPNESS if sampled else GREEDY_SHARPNESS
        return self._sharpness.setdefault((self._kind, sampled), prior)

    def wants_draft(self, lookup_scores):
        self._exploring = False
        if not self.with_model:
            return False
        self.now = self._costs_for(len(lookup_scores))
        if self._draft_began and self.now.root.value is None:
            return True  # the second time tells what it costs without the prompt
        if self.rate is None or self._draft_value(lookup_scores) > 0.0:
            return True
        self._exploring = self._draft_explorer.allows(self._draft_ms()[0])
        return self._exploring

    def _draft_value(self, lookup_scores) -> float:
        """Tokens that asking the draft is expected to bring beyond lookups, less what its time is
        worth, for the best number of levels."""
        rate, alone = self.rate or 0.0, 1

        def verify(num_nodes: int) -> float:
            return self.now.verify.at(num_nodes) or 0.0

        if lookup_scores.shape[1]:
            alone += self._width(lookup_scores, with_root=False)
        root, level = self._draft_ms()
        if not self._draft_began:
            catch_up = self.now.catch_up.get(self._kind)
            root += (catch_up.value or 0.0) / _CATCH_UP_ROUNDS if catch_up else 0.0
        missed = 1.0 - self._first_chance
        chance, later = self.draft_first.hopeful, self.draft_later.hopeful
        best, tokens = -math.inf, 0.0
        for levels in range(1, 7):
            tokens += missed * chance
            chance *= later
            wider = verify(max(alone, 2 + 2 * levels)) - verify(alone)
            cost = root + (levels - 1) * level + wider
            if tokens - rate * cost > best:
                best, self._best_levels = tokens - rate * cost, levels
        return best

    def _draft_ms(self) -> tuple[float, float]:
        """Of the first level and of a further one; a guess before they are known."""
        guess = self._draft_share * (self.now.verify.at(1) or 0.0)
        root = guess if self.now.root.value is None else self.now.root.value
        return root, root if self.now.level.value is None else self.now.level.value

    def children(self, depth):
        self._depth = depth
        return _CHILDREN

    def node_budget(self):
        return 2 + 2 * self._best_levels

    def frontier(self, depth):
        return _FRONTIER_WIDTH, math.log(_LEAST_PROBABILITY)

    def worth_expanding(self, scores):
        if self.now.root.value is None:
            return False  # one level tells what the draft costs
        if self.draft_first.untold and self._depth + 1 >= _PROBE_LEVELS:
            return False  # nor is more than a probe spent on a new text
        # a draft that is mostly wrong of late is no longer taken at its word
        trust = min(1.0, self.draft_first.hopeful / _TRUSTED) * self.draft_later.value
        expected = float(scores.exp().sum(1).mean()) * trust
        return expected > 0 and self._pays(expected, self._draft_ms()[1])

    def nodes_to_verify(self, scores):
        self.now = self._costs_for(len(scores))
        return self._width(scores)

    def _width(self, scores, with_root: bool = True) -> int:
        """How many of these nodes to verify."""
        probabilities = -np.sort(-np.exp(scores.numpy(force=True)), axis=1)
        expected = np.cumsum(probabilities, axis=1).mean(0)
        total = int((probabilities > 0).sum(1).max(initial=0))
        root = 0 if with_root else 1
        rate, best, best_value = self.rate, 1 - root, None
        for size in _NODE_SIZES:
            count = min(size - root, total)
            cost = self.now.verify.at(size)
            if rate is None or cost is None:
                return min(12, total)
            value = (float(expected[count - 1]) if count else 0.0) - rate * cost
            if best_value is None or value > best_value:
                best, best_value = count, value
            if count == total:
                break
        return best

    def observe(self, outcome: Outcome) -> None:
        rows = len(outcome.paths)
        self.now = now = self._costs_for(rows)
        self._observe_rate(outcome, rows)
        now.verify.add(outcome.num_nodes, outcome.verify_ms, outcome.settled)
        now.overhead.add(
            outcome.total_ms - outcome.draft_ms - outcome.verify_ms, outcome.settled
        )
        looked = outcome.match_lengths is not None
        if looked:
            self._learn_lookup(outcome)
        if looked and not outcome.draft_levels:
            (now.miss if outcome.tree.lookup is None else now.lookup).add(outcome.draft_ms)
        if outcome.draft_levels:
            self._learn_draft_cost(outcome, looked)
            self._learn_draft(outcome)
        if looked and not self._pays(self.lookup_gain.value, now.miss.value or 0.0):
            self._lookup_explorer.spend(now.miss.value or 0.0)
        if self._lookup_exploring and outcome.tree.lookup is not None:
            self._lookup_explorer.spend(now.lookup.value or 0.0)
        self._lookup_exploring = False
        if self._exploring:
            self._draft_explorer.spend(outcome.draft_ms)
        for explorer in (self._lookup_explorer, self._draft_explorer):
            explorer.pass_time(outcome.total_ms)
        for belief in (self.draft_first, self.draft_later, self.lookup_gain, *self.match_gain):
            belief.age()
        drafted = "draft" if outcome.draft_levels else "lookup" if outcome.num_nodes > 1 else ""
        self._rounds[drafted or "plain"] += 1

    def _observe_rate(self, outcome: Outcome, rows: int) -> None:
        milliseconds = outcome.total_ms
        predicted = self.predict_round_ms(
            outcome.num_nodes, outcome.draft_levels, outcome.match_lengths is not None
        )
        if predicted is not None:
            # a recording must not move the yardstick, nor a busy machine much
            settled = outcome.settled and outcome.draft_settled
            milliseconds = min(milliseconds, (2.0 if settled else 1.0) * predicted)
            if settled:
                self.now.error.add(abs(predicted - outcome.total_ms) / outcome.total_ms)
        self.now.add_rate(outcome.new_tokens / rows, milliseconds)

    def predict_round_ms(self, num_nodes: int, levels: int, lookup: bool) -> float | None:
        """Milliseconds of a round for the number of rows of the last one; None before any
        measurement."""
        verify = self.now.verify.at(num_nodes)
        if verify is None:
            return None
        root, level = self._draft_ms()
        draft = root + (levels - 1) * level if levels else 0.0
        lookups = (self.now.lookup.value or 0.0) if lookup else 0.0
        return verify + draft + lookups + (self.now.overhead.value or 0.0)

    def _learn_draft_cost(self, outcome: Outcome, looked: bool) -> None:
        levels, now = outcome.draft_levels, self.now
        if not self._draft_began:
            # the first time in a text takes in its prompt
            self._draft_began = True
            usual = sum(self._draft_ms()) if now.root.value else 0.0
            known = now.catch_up.setdefault(self._kind, RunningTime())
            known.add(max(outcome.draft_ms - usual, 0.0))
            return
        lookup = now.miss if outcome.tree.lookup is None else now.lookup
        spent = outcome.draft_ms - ((lookup.value or 0.0) if looked else 0.0)
        spent = max(spent, 0.1 * outcome.draft_ms)
        if levels == 1 or now.root.value is None or now.level.value is None:
            now.root.add(spent / levels, outcome.draft_settled)
        if levels == 1:
            return
        if now.level.value is None:
            now.level.add(spent / levels, outcome.draft_settled)
            return
        # only rounds of one level tell the two apart; all others move both alike
        root, level = now.root.value or 0.0, now.level.value
        factor = spent / (root + (levels - 1) * level)
        now.root.add(root * factor, outcome.draft_settled)
        now.level.add(level * factor, outcome.draft_settled)

    def _learn_draft(self, outcome: Outcome) -> None:
        rows = outcome.tree.draft_rows.numpy(force=True)
        parents = outcome.tree.parents.numpy(force=True)
        scores = outcome.tree.scores.numpy(force=True)
        for row, path in enumerate(outcome.paths):
            for node, following in zip(path, [*path[1:], None]):
                if rows[row, node] < 0:
                    break
                children = np.flatnonzero(parents[row] == node)
                ordered = children[np.argsort(-scores[row, children], kind="stable")].tolist()
                rank = ordered.index(following) if following is not None else -1
                for place, belief in enumerate(self.ranks):
                    belief.add(float(place == rank))
                hit = float(following is not None)
                (self.draft_first if node == 0 else self.draft_later).add(hit)
                expected = float(np.exp(scores[row, children] - scores[row, node]).sum())
                factor = self._sharpness_of(outcome.sampled) * math.exp(
                    0.05 * (hit - min(expected, 1.0))
                )
                self._sharpness[self._kind, outcome.sampled] = min(max(factor, 0.5), 6.0)

    def _learn_lookup(self, outcome: Outcome) -> None:
        assert outcome.match_lengths is not None
        rows = len(outcome.paths)
        if outcome.tree.lookup is None:
            self.lookup_gain.add(0.0)
            return
        lookup = outcome.tree.lookup.numpy(force=True)
        parents = outcome.tree.parents.numpy(force=True)
        brought = 0
        for row, path in enumerate(outcome.paths):
            kept = 0
            while kept + 1 < len(path) and lookup[row, path[kept + 1]]:
                kept += 1
            brought += kept
            slot = min(outcome.match_lengths[row], len(LOOKUP_PRIOR) - 1)
            if slot == 0:
                continue
            self.match_gain[slot].add(kept)
            offered = set(parents[row][lookup[row]].tolist())
            shares = self.lookup_first
            for node in path[: kept + 1]:
                if node not in offered:
                    break
                shares[slot].add(float(node != path[kept]))
                shares = self.lookup_later
        self.lookup_gain.add(brought / rows)

    def predictions(self) -> list[whatif.Prediction]:
        """What plain decoding, lookup alone, the best chain and the best tree would bring now."""
        costs = self.now.as_costs()
        if costs is None:
            return []
        listed = [whatif.plain(costs)]
        if self.lookup_length:
            tokens = 1.0 + self.lookup_gain.value
            round_ms = costs.predict_round_ms(12, lookup=True)
            listed.append(whatif.Prediction("lookup, 12 nodes", 12, 0, tokens, round_ms))
        if self.with_model and costs.level_ms:
            ranks = [belief.value for belief in self.ranks]
            listed.append(whatif.fastest(whatif.chains(costs, ranks[0], self.max_depth)))
            grown = whatif.trees(costs, ranks, 6, _NODE_SIZES[1:], _FRONTIER_WIDTH)
            if grown:
                listed.append(whatif.fastest(grown))
        return listed

    def describe(self) -> str:
        listed = self.predictions()
        if not listed or self.rate is None:
            return f"auto: nothing measured yet; costs: {self.origin}"
        now, total = self.now, max(1, sum(self._rounds.values()))
        shares = ", ".join(f"{name} {count / total:.0%}" for name, count in self._rounds.items())
        lines = [
            f"auto: {self.rate:.3f} tokens/ms lately; a step pays when it adds more than that per "
            "ms",
            f"costs: {self.origin}",
            "predicted tokens/ms now: "
            + ", ".join(f"{p.name} {p.tokens_per_ms:.3f}" for p in listed)
            + f"; best of these: {whatif.fastest(listed).name}",
            f"rounds so far: {shares}",
            "verification ms by nodes: "
            + ", ".join(f"{size}: {now.verify.at(size):.2f}" for size in sorted(now.verify.times)),
        ]
        if now.error.value is not None:
            lines.append(f"predicted times of rounds lately off by {now.error.value:.0%}")
        if self.with_model:
            root, level = self._draft_ms()
            lines.append(
                f"draft: {root:.2f} ms for the first level, {level:.2f} ms for another, "
                f"the right token among the root's children in {self.draft_first.value:.0%}, "
                f"among a later node's in {self.draft_later.value:.0%}, sharpness "
                f"{self._sharpness_of(False):.1f} greedy, {self._sharpness_of(True):.1f} sampled"
            )
        if self.lookup_length:
            found = ", ".join(f"{k}: {b.value:.0%}" for k, b in enumerate(self.lookup_first) if k)
            lines.append(
                f"lookup: {now.lookup.value or 0.0:.2f} ms, {self.lookup_gain.value:.2f} tokens "
                f"brought when asked, right first token by match length {found}"
            )
        return "\n".join(lines)
