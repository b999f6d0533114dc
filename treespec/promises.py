"""How well candidates keep what their probabilities promise.

Probabilities multiply along a path, and what each of them leaves out multiplies too, so deep and
unlikely candidates are right less often than their product says. What such ones kept, over what
they promised, is learnt by draft level and by place among all candidates of a round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from treespec.beliefs import Belief

# Shares kept by a draft's further levels before any was seen; deeper ones are like the last.
_LEVELS = (1.0, 1.0, 0.9, 0.8, 0.8, 0.8)
# The same where lookups had found something.
_LEVELS_BESIDE = (0.85, 0.8, 0.7, 0.65, 0.6, 0.6)
# The same of candidates by their place, likeliest first: the first one, the next two, the next
# four, and so on.
_BY_PLACE = (1.0, 1.0, 0.9, 0.85, 0.6, 0.5)
PLACES = [slice((1 << step) - 1, (2 << step) - 1) for step in range(len(_BY_PLACE))]
# Promised tokens that a share before any was seen counts for: what is not drafted or verified after
# a few unlucky rounds would never be learnt better.
_PRIOR_COUNT = 10.0
# Candidates that promise fewer tokens tell nothing.
_LEAST_PROMISED = 0.01


class Promises:
    """Shares of promised tokens that proved right.

    Attributes:
        by_level: of a draft's further levels, alone and beside what lookups found.
        by_place: of candidates by their place, as `PLACES`.
        levels: tokens that the further levels of this round promised.
    """

    def __init__(self) -> None:
        self.by_level = [
            [Belief(share, 8.0, 0.97, _PRIOR_COUNT) for share in shares]
            for shares in (_LEVELS, _LEVELS_BESIDE)
        ]
        self.by_place = [Belief(share, 8.0, 0.97, _PRIOR_COUNT) for share in _BY_PLACE]
        self.levels: list[float] = []

    def begin(self, kind: int, like: int) -> None:
        """A new text begins.

        Args:
            kind: of text.
            like: another kind, which may tell something of this one.
        """
        for belief in (*self.by_level[False], *self.by_level[True], *self.by_place):
            belief.begin(kind)
            belief.hope(like)

    def of_level(self, level: int, beside: bool) -> Belief:
        """
        Args:
            level: 0 for the first further one.
            beside: lookups had found something.
        """
        return self.by_level[beside][min(level, len(_LEVELS) - 1)]

    def held(self, promised: list[float]) -> list[float]:
        """What candidates will keep of these tokens; by place."""
        kept = list(promised)
        for belief, places in zip(self.by_place, PLACES):
            share = belief.value
            kept[places] = [share * tokens for tokens in kept[places]]
        return kept

    def learn_levels(self, length: int, cut_off: bool, beside: bool) -> None:
        """Which further levels of this round had the right token; of those that were cut off when
        nodes to verify were chosen it is not known.

        Args:
            length: nodes of the path, the root among them.
            cut_off: no child of its last node was verified.
            beside: lookups had found something.
        """
        for level, promised in enumerate(self.levels):
            kept = length > level + 2
            if kept or not cut_off:
                self.of_level(level, beside).add(kept / promised, promised)

    def learn_places(self, path: Sequence[int], scores: Sequence[float]) -> None:
        """Which candidates of a row were right.

        Args:
            path: its nodes.
            scores: cumulative log-probabilities of all nodes, the root's first.
        """
        # equals stay in their order
        likeliest = sorted(enumerate(scores[1:], 1), key=_less_likely)
        right = [place for place, (node, _) in enumerate(likeliest) if node in path]
        for belief, places in zip(self.by_place, PLACES):
            promised = sum(math.exp(score) for _, score in likeliest[places])
            if promised < _LEAST_PROMISED:
                break
            kept = sum(places.start <= place < places.stop for place in right)
            belief.add(kept / promised, promised)


def _less_likely(candidate: tuple[int, float]) -> float:
    return -candidate[1]
