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
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from treespec import whatif
from treespec.costs import FRONTIER_WIDTH, MeasuredCosts, row_shares
from treespec.outlay import Outlay
from treespec.policy import Outcome, Policy
from treespec.promises import Promises
from treespec.purse import Purse
from treespec.running_acceptance import DraftAcceptance, LookupAcceptance
from treespec.whatif import RoundCosts

# Few widths, so that each is recorded and measured early.
_NODE_SIZES = (1, 4, 8, 12, 16, 32, 64)
# And fewer for several sequences, where every number of them makes shapes of its own, and where
# each is captured with all that may have grown it.
FEW_NODE_SIZES = (1, 8, 16, 32, 64)
# Levels that are grown without a look at them.
LEVELS_AHEAD = (1, 2, 3, 4, 6)
# Nodes of a level that are expanded, and the least cumulative log-probability of one.
FRONTIER = FRONTIER_WIDTH, math.log(0.02)
# Prompts are of a kind by the bits of their length; all up to 255 tokens are of one.
_SHORT_BITS = 8
# Draft levels of a trial.
_PROBE_LEVELS = 2
# Rounds of plain decoding that a round with the draft must have saved for it to be asked: near zero
# half the texts lose.
_LEAST_GAIN = 0.15
# No round counts for more, gained or lost.
_MOST_GAINED = 3.0
# Rounds of plain decoding that a draft's forwards before them slow down, and the most that one may
# lose so, as a share of a round.
_AFTER_DRAFT = 4
_MOST_AFTER = 0.5
# A draft whose root has the right child this often is taken at its word.
_TRUSTED = 0.75
# Rounds of a text that are to pay for the draft's taking in its prompt, before it is known how many
# ask the draft; and what the last text that asked it counts against those before.
_CATCH_UP_ROUNDS = 10
_LATEST = 0.5
# Rounds of plain decoding after one that had no draft and brought one token.
_REST_ROUNDS = 3
# Of them where nothing was worth asking, which the next rounds will hardly change: at first, and at
# most while that stays so in sampled text.
_IDLE_ROUNDS, _MOST_IDLE = 8, 32
# A text repeats itself when asking the lookups brings this many tokens: there is no rest in it.
_REPEATS = 0.7
# Tokens of a continuation to begin with and at most: one that proved right to its end is followed
# by one about twice as long, of few lengths.
LOOKUP_LENGTHS = (20, 40, 63)
# The shares that lookups may have lost lately and in one text, and still be used where that is
# expected to pay. What those of one sequence lose they make up for in the next that repeats itself.
_DEBTS = (0.01, 0.015)
_DEBTS_ALONE = (math.inf, 0.02)
# Rounds with a draft after which what lookups cost alone is doubted.
_SELDOM_ALONE = 8
# Levels for which a draft is valued, and the chances of lookups that found nothing.
_LEVELS_VALUED = 6
_NOTHING = [0.0] * _LEVELS_VALUED
# The shares of one sequence.
_ALONE = np.ones(1)


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
    node_sizes: tuple[int, ...] = _NODE_SIZES
    reads_trees = True

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
        self.lookup_length = LOOKUP_LENGTHS[0] if with_lookup else 0
        self.max_rows = FRONTIER_WIDTH * self.max_depth + 1
        self.origin = origin
        self._draft_share = draft_share
        self._costs = {rows: MeasuredCosts(rows, known) for rows, known in (costs or {}).items()}
        self.now = self._costs_for(1)
        self.lookups, self.draft = LookupAcceptance(), DraftAcceptance()
        self.promises = Promises()
        # by kind of text, so that what drafts gain in some is not lost in others
        self._purses: dict[int, tuple[Purse, Purse]] = {}
        self._lookup_purse, self._draft_purse = Purse(), Purse()
        self._outlay = Outlay()
        self.may_record = True
        # rounds that ask the draft, of texts that ask it at all; by kind of text
        self._lasting: dict[int, float] = {}
        self._exploring = self._lookup_exploring = False
        self._draft_rounds = 0
        self._depth, self._best_levels = 0, 2
        self._kind = 0
        # chances that what was looked up this round is right up to each of the first levels
        self._looked_up = _NOTHING
        self._prefill_ms = 0.0
        # rounds of plain decoding still to come unasked, and those that were
        self._rest = 0
        self._idle_rounds = _IDLE_ROUNDS
        self._rested: list[Outcome] = []
        # rounds of which beliefs and purses have not heard
        self._unheard = 0
        self._unheard_ms = 0.0
        # what plain decoding of the rest of the text would take
        self._ahead_ms = 0.0
        # widths that may be verified this round
        self._open_sizes = self.node_sizes
        # nodes that a trial verifies at least, and that lookups alone would verify
        self._trial_nodes, self._nodes_alone = 0, 1
        # candidates among which the latter were chosen, none before that
        self._looked_up_nodes = 0
        # what a token of each row of this round is worth
        self._shares = _ALONE
        self._captured = False
        # rounds to come that the draft's forwards may have slowed
        self._after_draft = 0
        # rounds that asked lookups beside the draft since one that asked them alone
        self._lookups_beside = 0
        self._rounds = {"plain": 0, "lookup": 0, "draft": 0}

    def _costs_for(self, rows: int) -> MeasuredCosts:
        """Costs of about so many rows: the next power of two."""
        rows = 1 << (rows - 1).bit_length()
        if rows not in self._costs:
            self._costs[rows] = MeasuredCosts(rows)
        return self._costs[rows]

    def begin(self, longest, sampled, prefill_ms=0.0, captured=False):
        # a draft may lose its way in long texts, where asking it also costs more to begin with; and
        # sampled text repeats itself less
        self._pass_time()
        if self._draft_rounds:
            usual = self._lasting.get(self._kind, _CATCH_UP_ROUNDS)
            self._lasting[self._kind] = usual + _LATEST * (self._draft_rounds - usual)
        self._kind = 2 * max(longest.bit_length(), _SHORT_BITS) + sampled
        purses = self._purses.setdefault(self._kind, (Purse(), Purse()))
        self._lookup_purse, self._draft_purse = purses
        self._prefill_ms, self._captured = prefill_ms, captured
        like = self._kind - 2
        self.lookups.begin(self._kind, sampled)
        self.draft.begin(self._kind, like, sampled)
        self.promises.begin(self._kind, like)
        self._draft_rounds = self._rest = self._after_draft = 0
        self._idle_rounds = _IDLE_ROUNDS
        self._look_ahead(0)
        self._lookup_purse.begin()
        self._draft_purse.begin()
        for costs in self._costs.values():
            costs.begin()

    def begin_round(self, left):
        if self._rest > 0 and len(left) == len(self._shares):
            return False
        self._pass_time()
        self.now = self._costs_for(len(left))
        if len(left) > 1:
            self._shares = row_shares(left, self.now.fixed_share(self._costs_for(1)))
        else:
            self._shares = _ALONE
        few = len(left) > 1 or self._captured
        self.node_sizes = FEW_NODE_SIZES if few else _NODE_SIZES
        self._ahead_ms = max(left) * (self.now.plain_ms or 0.0)
        self._rest = self._trial_nodes = 0
        self._open_sizes, alone = self.node_sizes, len(left) == 1
        # the shapes of several sequences are charged as they come
        self.may_record = alone and self._outlay.allows(self._ahead_ms)
        if alone and not self.may_record:
            self._open_sizes = self._outlay.begun(self.node_sizes)
        return len(self._open_sizes) > 1 and not self.now.needs_plain

    def _pass_time(self) -> None:
        """Lets beliefs and purses know of the rounds since the last time."""
        for outcome in self._rested:
            self._observe_plain(outcome)
        self._rested.clear()
        rounds, milliseconds = self._unheard, self._unheard_ms
        self._unheard, self._unheard_ms = 0, 0.0
        for purse in (self._lookup_purse, self._draft_purse):
            purse.pass_time(milliseconds, rounds)
        self.lookups.age(rounds)
        self.draft.age(rounds)

    @property
    def rate(self) -> float | None:
        """Tokens of a row per millisecond lately; None before any time is known."""
        return self.now.rate

    def _shared(self, of_rows: Sequence[float] | np.ndarray) -> float:
        """What something of every row is worth, as if all rows had it."""
        if len(of_rows) == 1:
            return float(of_rows[0])
        return float(self._shares @ np.asarray(of_rows, dtype=float))

    def _pays(self, tokens: float, milliseconds: float) -> bool:
        return self.rate is None or tokens > self.rate * milliseconds

    def wants_lookup(self):
        self._looked_up = _NOTHING
        if self.lookup_length == 0:
            return False
        cost = self.now.miss.value or 0.0
        self._lookup_exploring = not self._pays(self.lookups.gain.value, cost)
        return not self._lookup_exploring or self._lookup_purse.allows(cost)

    def wants_matches(self, match_lengths):
        if max(match_lengths) == 0:
            return False
        gain = self._shared(self.lookups.of_length(self.lookups.by_match, match_lengths))
        cost = (self.now.lookup.value or 0.0) - (self.now.miss.value or 0.0)
        if self._pays(gain, cost) and self._better_than_draft(match_lengths, gain, cost):
            alone = len(match_lengths) == 1
            shares = _DEBTS_ALONE if alone else _DEBTS
            in_debt = self._lookup_purse.owes(shares, self._ahead_ms)
            return not in_debt or (alone and self._pays(gain, 2.0 * (cost + self._wider_ms())))
        self._lookup_exploring = True
        return self._lookup_purse.allows(cost)

    def _better_than_draft(
        self, match_lengths: list[int], gain: float, milliseconds: float
    ) -> bool:
        """Whether what was looked up pays beside the draft, where that is asked anyway, or instead
        of it."""
        if not self.with_model or self.now.root.value is None or not self._draft_gains():
            return True
        self._nodes_alone = 1
        draft = self._draft_value()
        if draft <= 0.0:
            return True
        instead = gain - (self.rate or 0.0) * (milliseconds + self._wider_ms())
        further = self._shared(self.lookups.of_length(self.lookups.beyond, match_lengths))
        beside = further + (gain - further) * (1.0 - self.draft.first.value)
        return instead > draft or self._pays(beside, milliseconds)

    def lookup_chances(self, match_lengths, length):
        chances = self.lookups.chances(match_lengths, length)
        reach = (self._shares @ chances[:, :_LEVELS_VALUED]).tolist()
        self._looked_up = [*reach, *_NOTHING[len(reach) :]]
        return chances

    def sharpness(self, picker):
        if picker.knows_pick or not picker.do_sample:
            return self.draft.sharpness
        return 1.0

    def wants_draft(self, lookup_scores):
        self._exploring = False
        if not (self.with_model and self._draft_open):
            return False
        if self.now.root.value is None or self.rate is None:
            return True  # what it costs is worth knowing; the second time tells, without the prompt
        gains = self._draft_gains()
        if not gains and not self._draft_purse.allows(self._trial_ms()):
            return False
        self._looked_up_nodes = lookup_scores.shape[1]
        looked_up = self._looked_up_nodes > 0
        self._nodes_alone = 1 + (self._best_width(lookup_scores) if looked_up else 0)
        if self._draft_value() > 0.0 and gains:
            return True
        if not self._draft_purse.allows(self._trial_ms()):
            return False
        self._exploring, self._trial_nodes = True, self._open_sizes[1]
        return True

    @property
    def _draft_open(self) -> bool:
        """Whether the draft may be asked at all."""
        return len(self._shares) > 1 or self.may_record or self._outlay.draft_begun

    def _draft_gains(self) -> bool:
        """Whether asking the draft may well gain something, its taking in of prompts paid."""
        if self.draft.gain.hardly_known and self._draft_rounds:
            return True
        catch_up = self._catch_up_ms() / self._lasting_rounds()
        gained = self.draft.gain.at_best - _LEAST_GAIN
        return gained * (self.now.plain_ms or 0.0) > catch_up

    def _trial_ms(self) -> float:
        """Of asking the draft for one level and verifying it."""
        return self._draft_ms()[0] + self._catch_up_ms() + self._wider_ms()

    def _wider_ms(self) -> float:
        """What the narrowest verification of candidates takes beyond plain decoding's."""
        narrow, wide = (self.now.verify.at(size) or 0.0 for size in self._open_sizes[:2])
        return wide - narrow

    def _draft_value(self) -> float:
        """Tokens that asking the draft is expected to bring beyond lookups, less what its time is
        worth, for the best number of levels."""
        rate, alone = self.rate or 0.0, self._nodes_alone

        def verify(num_nodes: int) -> float:
            return self.now.verify.at(num_nodes) or 0.0

        root, level = self._draft_ms()
        root += self._catch_up_ms() / self._lasting_rounds()
        chance, later = self.draft.first.hopeful, self.draft.later.hopeful
        best, tokens, narrow = -math.inf, 0.0, verify(alone)
        for levels, looked_up in enumerate(self._looked_up, 1):
            tokens += (1.0 - looked_up) * chance
            chance *= later
            wider = verify(max(alone, 2 + 2 * levels)) - narrow
            value = tokens - rate * (root + (levels - 1) * level + wider)
            if value < best:
                break
            best, self._best_levels = value, levels
        return best

    def _catch_up_ms(self) -> float:
        """What the draft's taking in of this text's prompt is still to cost."""
        if self._draft_rounds:
            return 0.0
        return self.now.catch_up.expected(self._draft_share) * self._prefill_ms

    def _lasting_rounds(self) -> float:
        """How many rounds of this text are expected to ask the draft, once it is asked."""
        usual = self._lasting.get(self._kind, _CATCH_UP_ROUNDS)
        return min(usual, self._ahead_ms / (self.now.plain_ms or 1.0)) or 1.0

    def _draft_ms(self) -> tuple[float, float]:
        """Of the first level and of a further one; a guess before they are known."""
        # the tree's own growth takes about as long for a level as for what a lookup found
        growth = self.now.lookup.value or 0.0
        guess = self._draft_share * (self.now.verify.at(1) or 0.0) + growth
        root = self.now.root.expected(guess)
        # the first level is a forward like the others, and more
        return root, min(root, self.now.level.expected(guess))

    def _levels_ms(self, levels: int) -> float:
        root, level = self._draft_ms()
        return root + (levels - 1) * level if levels else 0.0

    def children(self, depth):
        if depth == 0:
            self.promises.levels.clear()
        self._depth = depth
        return FRONTIER_WIDTH

    def node_budget(self):
        return 2 + 2 * self._best_levels

    def frontier(self, depth):
        return FRONTIER

    def levels_ahead(self):
        if self.now.root.value is None:
            return 1  # tells what the draft costs
        levels = min(self._best_levels, _PROBE_LEVELS) if self._exploring else self._best_levels
        return next((count for count in LEVELS_AHEAD if count >= levels), LEVELS_AHEAD[-1])

    def levels_grown(self, reached):
        self.promises.levels.clear()
        for of_rows in zip(*reached):
            promised = self._shared(of_rows) * self._trust
            if promised <= 0:
                break
            self.promises.levels.append(promised)

    def worth_expanding(self, scores):
        if self.now.root.value is None:
            return False  # one level tells what the draft costs
        if self._exploring and self._depth + 1 >= _PROBE_LEVELS:
            return False  # nor is more than a probe spent on a trial
        # what lookups and the draft both propose may be promised twice
        reached = [min(sum(map(math.exp, row)), 1.0) for row in scores.tolist()]
        promised = self._shared(reached) * self._trust
        kept = self.promises.of_level(self._depth, self._found).value
        # another level is verified too
        nodes = 2 + 2 * self._depth
        wider = (self.now.verify.at(nodes + 2) or 0.0) - (self.now.verify.at(nodes) or 0.0)
        if promised <= 0 or not self._pays(promised * kept, self._draft_ms()[1] + wider):
            return False
        self.promises.levels.append(promised)
        return True

    @property
    def _trust(self) -> float:
        """A draft that is mostly wrong of late is no longer taken at its word."""
        return min(1.0, self.draft.first.hopeful / _TRUSTED) * self.draft.later.value

    @property
    def _found(self) -> bool:
        """Whether lookups found something this round that became candidates."""
        return self._looked_up is not _NOTHING

    def nodes_to_verify(self, scores):
        # not before: drawn siblings are all verified, in whatever width that takes
        self.node_sizes = self._open_sizes
        # what is only tried may not be used again
        self.may_record &= not (self._exploring or self._lookup_exploring)
        if scores.shape[1] == 1 + self._looked_up_nodes:
            return self._nodes_alone
        count = 1 + self._best_width(scores[:, 1:])
        # a trial of which nothing is verified tells nothing
        return max(count, self._trial_nodes)

    def _best_width(self, scores: torch.Tensor) -> int:
        """How many of these candidates to verify beside the root."""
        expected = self._expected(scores)
        total, rate = len(expected) - 1, self.rate
        best, best_value = 0, None
        largest = max(self.now.verify.times, default=1)
        for size in self._open_sizes:
            count, cost = min(size - 1, total), self.now.verify.at(size)
            if rate is None or cost is None:
                return min(11, total)
            value = expected[count] - rate * cost
            if best_value is None or value > best_value:
                best, best_value = count, value
            # what a wider forward costs is not known before it was made: one width at a time
            if count == total or size > largest:
                break
        return best

    def _expected(self, scores: torch.Tensor) -> list[float]:
        """Tokens that the likeliest 0, 1, 2, ... candidates are expected to bring."""
        # plain lists: candidates are few, and every call of numpy would find cold code
        promised: list[float] = []
        for share, row in zip(self._shares.tolist(), scores.tolist()):
            likeliest = sorted((score for score in row if score > -math.inf), reverse=True)
            del likeliest[self.max_nodes - 1 :]
            promised += [0.0] * (len(likeliest) - len(promised))
            for place, score in enumerate(likeliest):
                promised[place] += share * math.exp(score)
        return list(accumulate(self.promises.held(promised), initial=0.0))

    def observe(self, outcome: Outcome) -> None:
        if self._rest > 0:
            # what little is done between forwards finds cold caches
            self._rest -= 1
            self._rested.append(outcome)
            return
        now = self.now
        self._take_time(outcome)
        predicted, rate = self._predicted(outcome), self.rate
        lost = self._observe_rate(outcome, predicted)
        self._observe_costs(outcome)
        looked, brought = outcome.match_lengths is not None, outcome.brought_by_lookups()
        scores = outcome.tree.scores.tolist()
        for path, of_row in zip(outcome.paths, scores):
            self.promises.learn_places(path, of_row)
        if looked:
            self._learn_lookup(outcome, brought)
        if outcome.draft_levels:
            self._learn_draft_gain(outcome, predicted)
            self._learn_draft_cost(outcome, looked)
            self.draft.learn(outcome, scores)
            self._learn_levels(outcome)
            self._draft_purse.pay(self._lost_by_draft(outcome, lost, rate), self._exploring)
            if outcome.tree.lookup is not None:
                beside = self._lost_beside(brought, outcome.draft_levels)
                self._lookup_purse.pay(beside, self._lookup_exploring)
        elif looked:
            cost = now.miss if outcome.tree.lookup is None else now.lookup
            self._lookups_beside = 0
            cost.add(outcome.draft_ms - outcome.draft_extra_ms)
            self._lookup_purse.pay(lost, self._lookup_exploring)
        self._lookup_exploring = False
        self._take_rest(outcome, looked)
        drafted = "draft" if outcome.draft_levels else "lookup" if outcome.num_nodes > 1 else ""
        self._rounds[drafted or "plain"] += 1

    def _take_rest(self, outcome: Outcome, looked: bool) -> None:
        """After a round that brought nothing: asking costs a share of a short round, and what did
        not help is not likely to do so one token later."""
        asked = looked or outcome.draft_levels > 0
        rest = _REST_ROUNDS if asked else self._idle_rounds
        # greedy text may repeat itself at any time
        longer = outcome.sampled and not asked
        self._idle_rounds = min(2 * rest, _MOST_IDLE) if longer else _IDLE_ROUNDS
        brought = outcome.draft_levels > 0 or outcome.new_tokens > len(outcome.paths)
        self._rest = 0 if brought or self.lookups.gain.value >= _REPEATS else rest

    def _lost_by_draft(self, outcome: Outcome, lost: float, rate: float | None) -> float:
        """The part of what a round lost, its tokens worth `1 / rate` ms each, that lookups alone
        would not have: the draft is not paid for what they brought."""
        if outcome.tree.lookup is None or self.now.plain_ms is None or rate is None:
            return lost
        tokens, alone_ms = self._by_lookups(outcome)
        return lost - (alone_ms - self.now.plain_ms) + self._shared(tokens) / rate

    def _by_lookups(self, outcome: Outcome) -> tuple[list[int], float]:
        """Tokens of every row that lookups brought in a round, whatever the draft thought of them,
        and milliseconds that it would have taken without the draft."""
        plain_ms = self.now.plain_ms or 0.0
        if outcome.tree.lookup is None:
            return [0] * len(outcome.paths), plain_ms
        both = zip(outcome.paths, outcome.tree.lookup.tolist())
        tokens = [sum(looked_up[node] for node in path) for path, looked_up in both]
        return tokens, self.predict_round_ms(self._nodes_alone, 0, True) or plain_ms

    def _lost_beside(self, brought: list[int], levels: int) -> float:
        """Milliseconds that lookups took beside so many levels of the draft, less what their tokens
        beyond its reach are worth."""
        further = [max(kept - levels, 0) for kept in brought]
        return (self.now.lookup.value or 0.0) - self._shared(further) / (self.rate or 1.0)

    def _take_time(self, outcome: Outcome) -> None:
        self._unheard += 1
        self._unheard_ms += outcome.total_ms
        if self._is_balanced(outcome):
            self._outlay.pass_time(outcome)

    @staticmethod
    def _is_balanced(outcome: Outcome) -> bool:
        """Whether a round counts in the balance: recordings of a warm-up were asked for, and those
        of several sequences are charged as losses."""
        return len(outcome.paths) == 1 and not outcome.warming

    def _observe_costs(self, outcome: Outcome) -> None:
        verify_ms = outcome.verify_ms - outcome.verify_extra_ms
        others_ms = outcome.total_ms - outcome.draft_ms - outcome.verify_ms
        drafted, overhead = outcome.draft_levels > 0, self.now.overhead
        if self._after_draft and not drafted:
            drafted = self._charge_after_draft(outcome, verify_ms)
        if outcome.num_nodes == 1 and not drafted:
            overhead.add(others_ms, outcome.settled and outcome.overhead_settled)
        elif outcome.num_nodes > 1 and outcome.overhead_settled:
            # deciding and committing a tree takes longer, and is no part of plain decoding
            verify_ms += others_ms - (overhead.value or 0.0)
        self.now.verify.add(outcome.num_nodes, verify_ms, outcome.settled, drafted)

    def _charge_after_draft(self, outcome: Outcome, verify_ms: float) -> bool:
        """Holds against the draft that the next rounds of plain decoding find what it left in the
        caches; returns whether this is one of them."""
        usual_ms, plain_ms = self.now.verify.at(1), self.now.plain_ms
        if outcome.num_nodes > 1 or not outcome.settled or not usual_ms or not plain_ms:
            self._after_draft = 0
            return False
        self._after_draft -= 1
        lost = (verify_ms - usual_ms) / plain_ms
        self.draft.gain.amend(-min(max(lost, -_MOST_AFTER), _MOST_AFTER))
        return True

    def _observe_plain(self, outcome: Outcome) -> None:
        """A round of plain decoding, which loses nothing."""
        self._take_time(outcome)
        usual, plain_ms = outcome.total_ms - outcome.verify_extra_ms, self.now.plain_ms
        self.now.add_rate(1.0, usual if plain_ms is None else min(usual, 2.0 * plain_ms))
        self._observe_costs(outcome)
        self._rounds["plain"] += 1

    def _observe_rate(self, outcome: Outcome, predicted: float | None) -> float:
        """Milliseconds the round took beyond those of plain decoding, less what its further tokens
        are worth.

        Args:
            outcome: the round.
            predicted: milliseconds that it was to take.
        """
        spent = outcome.total_ms
        extra = outcome.draft_extra_ms + outcome.verify_extra_ms
        usual = spent - extra
        if predicted is not None:
            # an unusual round must not move the yardstick, nor a busy machine much
            settled = outcome.settled and outcome.draft_settled
            # the prompt's share is no part of a usual round, and is spent all the same
            catch_up = self._catch_up_ms() if outcome.draft_levels else 0.0
            spent = min(usual, (2.0 if settled else 4.0) * predicted + catch_up)
            if settled:
                self.now.error.add(abs(predicted - usual) / usual)
            usual = min(usual, (2.0 if settled else 1.0) * predicted)
        tokens, rate = self._shared([len(path) for path in outcome.paths]), self.rate
        drafted = outcome.num_nodes > 1 or outcome.draft_levels
        if drafted and self._is_balanced(outcome):
            self._outlay.pay(outcome, spent + extra - tokens * (self.now.plain_ms or 0.0))
        self.now.add_rate(tokens, usual)
        # the shapes of one sequence are few and soon recorded, those of several are not
        spent += extra if len(outcome.paths) > 1 else 0.0
        if rate is None or self.now.plain_ms is None:
            return 0.0
        return spent - self.now.plain_ms - (tokens - 1.0) / rate

    def predict_round_ms(self, num_nodes: int, levels: int, lookup: bool) -> float | None:
        """Milliseconds of a round for the number of rows of the last one; None before any
        measurement."""
        verify = self.now.verify.at(num_nodes)
        if verify is None:
            return None
        draft = self._levels_ms(levels)
        lookups = (self.now.lookup.value or 0.0) if lookup else 0.0
        return verify + draft + lookups + (self.now.overhead.value or 0.0)

    def _predicted(self, outcome: Outcome) -> float | None:
        """Milliseconds that a round like this one was to take."""
        looked = outcome.match_lengths is not None
        return self.predict_round_ms(outcome.num_nodes, outcome.draft_levels, looked)

    def _learn_draft_cost(self, outcome: Outcome, looked: bool) -> None:
        levels, now = outcome.draft_levels, self.now
        self._draft_rounds += 1
        if self._draft_rounds == 1:
            # the first time in a text takes in its prompt
            if self._prefill_ms > 0:
                spent = outcome.draft_ms - outcome.draft_extra_ms - self._levels_ms(levels)
                now.catch_up.add(max(spent, 0.0) / self._prefill_ms)
            return
        lookup = now.miss if outcome.tree.lookup is None else now.lookup
        spent = outcome.draft_ms - outcome.draft_extra_ms
        doubted = self._lookups_beside > _SELDOM_ALONE
        now.add_levels(levels, spent, outcome.draft_settled, lookup if looked else None, doubted)
        self._lookups_beside += looked

    def _learn_draft_gain(self, outcome: Outcome, usual: float | None) -> None:
        """Rounds of plain decoding that the draft saved, beyond those that lookups would have saved
        without it; taking in the prompt is no part of it.

        Args:
            outcome: the round.
            usual: milliseconds that it was to take.
        """
        now, plain_ms, rows = self.now, self.now.plain_ms, len(outcome.paths)
        if plain_ms is None or usual is None or now.root.value is None or not outcome.settled:
            return
        spent = outcome.total_ms
        # the shapes of one sequence are soon recorded
        extra = (outcome.draft_extra_ms, outcome.verify_extra_ms) if rows == 1 else (0.0, 0.0)
        if self._draft_rounds == 0:
            spent += self._levels_ms(outcome.draft_levels) - outcome.draft_ms - extra[1]
        elif outcome.draft_settled:
            spent -= sum(extra)
        else:
            return
        looked_up, alone_ms = self._by_lookups(outcome)
        tokens = [len(path) - 1 - count for path, count in zip(outcome.paths, looked_up)]
        saved = self._shared(tokens) - (min(spent, 2.0 * usual) - alone_ms) / plain_ms
        self.draft.gain.add(min(max(saved, -_MOST_GAINED), _MOST_GAINED))
        self._after_draft = _AFTER_DRAFT

    def _learn_levels(self, outcome: Outcome) -> None:
        parents = outcome.tree.parents.tolist()
        for row, path in enumerate(outcome.paths):
            self.promises.learn_levels(len(path), path[-1] not in parents[row], self._found)

    def _learn_lookup(self, outcome: Outcome, brought: list[int]) -> None:
        self.lookups.gain.add(self._shared(brought))
        if outcome.tree.lookup is not None:
            self.lookups.learn(outcome, brought, self._best_levels)
            self._look_ahead(max(brought))

    def _look_ahead(self, brought: int) -> None:
        """Chooses the length of the next continuation by how much of the last one was right."""
        if self.lookup_length:
            # every length would take graphs of its own, and the longest costs a GPU nothing
            lengths = LOOKUP_LENGTHS[-1:] if self._captured else LOOKUP_LENGTHS
            longer = (length for length in lengths if length >= 2 * brought)
            self.lookup_length = next(longer, lengths[-1])

    def predictions(self) -> list[whatif.Prediction]:
        """What plain decoding, lookup alone, the best chain and the best tree would bring now."""
        costs = self.now.as_costs()
        if costs is None:
            return []
        listed = [whatif.plain(costs)]
        if self.lookup_length:
            tokens = 1.0 + self.lookups.gain.value
            round_ms = costs.predict_round_ms(12, lookup=True)
            listed.append(whatif.Prediction("lookup, 12 nodes", 12, 0, tokens, round_ms))
        if self.with_model and costs.level_ms:
            ranks = [belief.value for belief in self.draft.ranks]
            listed.append(whatif.fastest(whatif.chains(costs, ranks[0], self.max_depth)))
            grown = whatif.trees(costs, ranks, 6, _NODE_SIZES[1:], FRONTIER_WIDTH)
            if grown:
                listed.append(whatif.fastest(grown))
        return listed

    def prepared(self):
        self._outlay.prepared(self.node_sizes)

    def describe(self) -> str:
        self._pass_time()
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
                f"the right token among the root's children in {self.draft.first.value:.0%}, "
                f"among a later node's in {self.draft.later.value:.0%}, sharpness "
                f"{self.draft.sharpness:.1f}"
            )
        if self.lookup_length:
            right = enumerate(self.lookups.next_right)
            found = ", ".join(f"{length}: {b.value:.0%}" for length, b in right if length)
            lines.append(
                f"lookup: {now.lookup.value or 0.0:.2f} ms, {self.lookups.gain.value:.2f} tokens "
                f"brought when asked, right first token by match length {found}"
            )
        return "\n".join(lines)
