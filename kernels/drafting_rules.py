"""Constants that every version of the drafting ops shares."""

from __future__ import annotations

DRAFTINGS = ("top", "coupled", "sampled")
# A probability below e^-103 is none: float32 holds nothing smaller.
LEAST_LOGPROB = -103.0
# How much a continuation counts among several, the likelier first; the last is that of all further.
VOTES = (0.4, 0.25, 0.2, 0.15)


def vote_of(index: int) -> float:
    """The weight of continuation ``index``."""
    return VOTES[min(index, len(VOTES) - 1)]
