"""What `tree="auto"` may lose by a source of drafts."""

from __future__ import annotations

# Share of the time lately passed that trials of a source of drafts may lose.
_EXPLORATION = 0.005
# The share that gains may save up.
_SAVINGS = 0.01
# What a round's time and losses still count after the next one.
_MEMORY = 0.998


class Purse:
    """What may be lost by a source of drafts: a small share of the time lately passed.

    Gains make up for losses and little of them is saved up, so what a source is worth in one place
    cannot be lost in another.
    """

    def __init__(self) -> None:
        self._lost = self._elapsed = self._wait = 0.0
        self.begin()

    def begin(self) -> None:
        """A new text: what has failed may not fail now."""
        self._wait = self._lost_here = self._elapsed_here = 0.0

    def pass_time(self, milliseconds: float, rounds: int = 1) -> None:
        """Rounds are over that took so long together."""
        memory = _MEMORY**rounds
        self._elapsed = memory * self._elapsed + milliseconds
        self._lost *= memory
        self._elapsed_here += milliseconds
        self._wait -= milliseconds

    def owes(self, shares: tuple[float, float], ahead_ms: float) -> bool:
        """Whether more than these shares were lost: of the time lately passed, unless enough was
        gained in this text, or of this text's time.

        Args:
            shares: of the time lately passed and of this text's.
            ahead_ms: what the rest of this text would take.
        """
        lately, here = shares
        text_ms = self._elapsed_here + ahead_ms
        in_debt = self._lost > lately * self._elapsed and self._lost_here > -_SAVINGS * text_ms
        return in_debt or self._lost_here > here * text_ms

    def allows(self, milliseconds: float) -> bool:
        """Whether a trial of that cost may be made, of what is not expected to pay: while trials
        gain they go on, and after one that lost the next one waits until its share of the time has
        passed."""
        return self._wait <= 0 and self._lost + milliseconds <= _EXPLORATION * self._elapsed

    def pay(self, lost_ms: float, trial: bool) -> None:
        """What a round cost beyond what it brought; below 0 if it gained."""
        self._lost = max(self._lost + lost_ms, -_SAVINGS * self._elapsed)
        self._lost_here += lost_ms
        if trial:
            self._wait = lost_ms / _EXPLORATION
