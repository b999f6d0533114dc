"""What lookups and a draft have brought lately, as `tree="auto"` believes it by kind of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from treespec.beliefs import Belief
from treespec.policy import (
    COUPLED_SHARPNESS,
    GREEDY_SHARPNESS,
    LOOKUP_PRIOR,
    Outcome,
    running_chances,
)

# What lookups are expected to bring in sampled text, as a share of what they do in greedy text.
_SAMPLED_REPEATS = 0.5
# Rounds of plain decoding that one with a draft is expected to save in texts of a kind that were
# not seen before.
_GAIN_PRIOR = 0.45
# How far above its mean a gain is taken to be, in standard errors: one round's is mostly luck.
_LUCK = 0.5
# How much a draft's sharpness moves with a node whose children were all wrong, or right beyond
# their probability, and its limits.
_SHARPNESS_STEP = 0.05
_SHARPNESS_RANGE = (0.5, 6.0)


class LookupAcceptance:
    """Of lookups.

    Attributes:
        gain: tokens that they bring when asked.
        next_right: shares of next tokens that are right, by match length.
        by_match: tokens that they bring where they matched so many.
        beyond: those of them that lie deeper than the draft would have gone.
    """

    def __init__(self) -> None:
        self.gain = Belief(0.5, 8.0, 0.98)
        self.next_right = [Belief(prior, 8.0, 0.95) for prior in LOOKUP_PRIOR]
        self.by_match = [Belief(2.0 * prior, 3.0, 0.93) for prior in LOOKUP_PRIOR]
        self.beyond = [Belief(prior, 3.0, 0.93) for prior in LOOKUP_PRIOR]

    def begin(self, kind: int, sampled: bool) -> None:
        """A new text begins; sampled text repeats itself less."""
        by_length = (*self.next_right, *self.by_match, *self.beyond)
        for belief in (self.gain, *by_length):
            belief.begin(kind)
        for belief in by_length if sampled else ():
            belief.expect_less(_SAMPLED_REPEATS)

    def age(self, rounds: int) -> None:
        for belief in (self.gain, *self.by_match, *self.beyond):
            belief.age(rounds)

    @staticmethod
    def of_length(beliefs: list[Belief], match_lengths: Sequence[int]) -> list[float]:
        """What is believed where so many tokens matched; 0 where none did."""
        longest = len(LOOKUP_PRIOR) - 1
        return [
            beliefs[min(length, longest)].value if length else 0.0 for length in match_lengths
        ]

    def chances(self, match_lengths: list[int], length: int) -> np.ndarray:
        """Per row the chances, `[B, length]`, that a continuation's tokens so far are right."""
        next_right = [0.0, *(belief.value for belief in self.next_right[1:])]
        return running_chances(next_right, match_lengths, length)

    def learn(self, outcome: Outcome, brought: list[int], levels: int) -> None:
        """Takes in a round in which they found something.

        Args:
            outcome: the round.
            brought: tokens they brought to every row.
            levels: how deep the draft would have gone.
        """
        assert outcome.match_lengths is not None and outcome.tree.lookup is not None
        lookup = outcome.tree.lookup.numpy(force=True)
        parents = outcome.tree.parents.numpy(force=True)
        longest = len(LOOKUP_PRIOR) - 1
        for row, (path, kept) in enumerate(zip(outcome.paths, brought)):
            matched = outcome.match_lengths[row]
            if matched == 0:
                continue
            slot = min(matched, longest)
            self.by_match[slot].add(kept)
            self.beyond[slot].add(max(kept - levels, 0))
            offered = set(parents[row][lookup[row]].tolist())
            for right, node in enumerate(path[: kept + 1]):
                if node not in offered:
                    break
                self.next_right[min(matched + right, longest)].add(float(node != path[kept]))


class DraftGain(Belief):
    """Rounds of plain decoding that a round with the draft saves.

    A single round's tells little where the draft is right now and then, and much where it never is.
    """

    def __init__(self) -> None:
        # squared differences from what was believed
        self._noise = Belief(0.5)
        super().__init__(_GAIN_PRIOR, 4.0, 0.95)

    def begin(self, kind: int) -> None:
        super().begin(kind)
        self._noise.begin(kind)

    def age(self, rounds: int = 1) -> None:
        super().age(rounds)
        self._noise.age(rounds)

    def add(self, value: float, weight: float = 1.0) -> None:
        self._noise.add((value - self.value) ** 2, weight)
        super().add(value, weight)

    @property
    def at_best(self) -> float:
        """What it may well be, for all that chance allows."""
        return self.value + _LUCK * math.sqrt(self._noise.value / (self._weight + self._count))


class DraftAcceptance:
    """Of a draft model.

    Attributes:
        first: the right child is among those of the root.
        later: it is among those of a later node that the draft expanded.
        ranks: the likeliest child is the right one, the second likeliest, the third.
        gain: rounds of plain decoding that a round with the draft saves.
    """

    def __init__(self) -> None:
        self.first, self.later = Belief(0.7), Belief(0.7, 4.0)
        self.ranks = [Belief(chance, 4.0) for chance in (0.5, 0.12, 0.05)]
        self.gain = DraftGain()
        self._sharpness: dict[int, float] = {}
        self.begin(0, 0, False)

    def begin(self, kind: int, like: int, sampled: bool) -> None:
        """A new text begins.

        Args:
            kind: of text.
            like: another kind, which may tell something of this one.
            sampled: its tokens are sampled.
        """
        self._kind = kind
        self._sharpness.setdefault(kind, COUPLED_SHARPNESS if sampled else GREEDY_SHARPNESS)
        for belief in (self.first, self.later, self.gain, *self.ranks):
            belief.begin(kind)
        self.gain.hope(like)

    def age(self, rounds: int) -> None:
        for belief in (self.first, self.later, self.gain):
            belief.age(rounds)

    @property
    def sharpness(self) -> float:
        """Factor on the draft's logits, in text of this kind."""
        return self._sharpness[self._kind]

    def learn(self, outcome: Outcome, scores: list[list[float]]) -> None:
        """Takes in a round that asked it.

        Args:
            outcome: the round.
            scores: cumulative log-probabilities of every row's nodes.
        """
        # plain lists: a tree is small, and every call of numpy would find cold code
        expanded, parents = outcome.tree.draft_rows.tolist(), outcome.tree.parents.tolist()
        for row, path in enumerate(outcome.paths):
            children: dict[int, list[int]] = {}
            for node, parent in enumerate(parents[row]):
                children.setdefault(parent, []).append(node)
            for node, following in zip(path, [*path[1:], None]):
                if expanded[row][node] < 0 or node not in children:
                    break  # where no child was verified, that tells nothing
                self._learn_children(children[node], following, scores[row], node)

    def _learn_children(
        self, children: list[int], following: int | None, scores: list[float], node: int
    ) -> None:
        """Which child of a node that the draft expanded was right, if any."""
        ordered = sorted(children, key=lambda child: -scores[child])
        rank = ordered.index(following) if following is not None else -1
        for place, belief in enumerate(self.ranks):
            belief.add(float(place == rank))
        hit = float(following is not None)
        (self.first if node == 0 else self.later).add(hit)
        expected = sum(math.exp(scores[child] - scores[node]) for child in children)
        factor = math.exp(_SHARPNESS_STEP * (hit - min(expected, 1.0)))
        least, most = _SHARPNESS_RANGE
        self._sharpness[self._kind] = min(max(self.sharpness * factor, least), most)
