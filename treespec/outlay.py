"""What `tree="auto"` may spend on forwards that were never made before.

Such a forward is slow, and so is recording it; later ones make up for that, in later texts too, but
the process may end before. So a balance against plain decoding is kept of all texts so far, and a
forward of a new kind is made only where it cannot bring the process behind by more than a small
part of its time.
"""

from __future__ import annotations

from treespec.policy import Outcome

# Shares of the time passed so far, and of what plain decoding of the rest of the text would take,
# by which a process may be behind plain decoding after one more recording.
_OF_PASSED = 0.03
_OF_AHEAD = 0.4


class Outlay:
    """The balance of a process, and which kinds of forwards it has made.

    Attributes:
        draft_begun: the draft was asked before.
    """

    def __init__(self) -> None:
        self._behind_ms = self._passed_ms = self._dearest_ms = 0.0
        self._begun: set[int] = {1}
        self.draft_begun = False

    def pass_time(self, outcome: Outcome) -> None:
        """A round is over, of whatever kind."""
        self._passed_ms += outcome.total_ms
        self._dearest_ms = max(self._dearest_ms, outcome.recording_ms)

    def pay(self, outcome: Outcome, behind_ms: float) -> None:
        """Takes in a round that drafted.

        Args:
            outcome: the round.
            behind_ms: what it took longer than plain decoding of its tokens, recordings apart;
                below 0 if it gained.
        """
        self._behind_ms += behind_ms + outcome.recording_ms
        self._begun.add(outcome.num_nodes)
        self.draft_begun |= outcome.draft_levels > 0

    def prepared(self, sizes: tuple[int, ...]) -> None:
        """Forwards of these widths, and the draft's, were made when that was asked for."""
        self._begun.update(sizes)
        self.draft_begun = True

    def allows(self, ahead_ms: float) -> bool:
        """Whether one more recording may be made.

        Args:
            ahead_ms: what plain decoding of the rest of the text would take.
        """
        most = _OF_PASSED * self._passed_ms + _OF_AHEAD * ahead_ms
        return self._behind_ms + self._dearest_ms <= most

    def begun(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Those of these widths that were verified before."""
        return tuple(size for size in sizes if size in self._begun)
