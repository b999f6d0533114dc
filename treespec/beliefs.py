"""What `tree="auto"` expects of drafts and lookups: running shares with two memories."""

from __future__ import annotations

# How far above its mean a share is taken to be when a text begins, in units of its variance.
_HOPE = 0.5
# Samples that a prior counts for.
_PRIOR_COUNT = 3.0
# The part of what is missing to its prior that a belief regains with every text, at least.
_FORGIVEN = 0.1
# Rounds after which what a text told counts among the earlier texts too.
_LONG_AGO = 60


class Belief:
    """A running mean with two memories: this text, which tells quickly, and the texts before it.

    Args:
        prior: believed before anything is seen.
        weight: how many samples of this text it takes to weigh as much as the earlier texts.
        forget: what a sample of this text is worth after the next one.
        prior_count: samples that the prior counts for.
    """

    def __init__(
        self,
        prior: float,
        weight: float = 2.0,
        forget: float = 0.9,
        prior_count: float = _PRIOR_COUNT,
    ) -> None:
        self._weight, self._forget = weight, forget
        self._prior, self._prior_count = prior, prior_count
        self._kinds: dict[int, list[float]] = {}
        self.begin(0)

    def begin(self, kind: int) -> None:
        """A new text begins; texts of another kind tell nothing of it."""
        count = self._prior_count
        self._long = self._kinds.setdefault(kind, [count * self._prior, count])
        self._sum = self._count = 0.0
        # of the last sample, among the earlier texts
        self._share = 0.0
        self._look_back()

    def _look_back(self) -> None:
        """Takes what this text told so far for a part of what is known of its kind."""
        self._earlier, self._since = self._long[0] / self._long[1], 0

    def hope(self, like: int) -> None:
        """At the beginning of a text: what was believed to be less than the prior is forgiven in
        time, and a kind of which nothing is known is taken to be half like another one."""
        mean = self._long[0] / self._long[1]
        if self._long[1] == self._prior_count and like in self._kinds:
            total, count = self._kinds[like]
            mean = 0.5 * (self._prior + total / count)
        elif mean < self._prior:
            # the less is known, the sooner
            mean += max(_FORGIVEN, 1.0 / self._long[1]) * (self._prior - mean)
        self._long[0] = mean * self._long[1]
        self._look_back()

    def expect_less(self, share: float) -> None:
        """Lowers what is believed of this kind of text, if none of it was seen yet."""
        if self._long[1] == self._prior_count and self.untold:
            self._long[0] = share * self._prior * self._prior_count
            self._look_back()

    def age(self, rounds: int = 1) -> None:
        """Rounds have passed; what the text told is a little staler."""
        memory = 0.98**rounds
        self._sum *= memory
        self._count *= memory
        self._since += rounds
        if self._since > _LONG_AGO:
            self._look_back()

    def add(self, value: float, weight: float = 1.0) -> None:
        """Takes in a sample, or so many of one value."""
        # the many samples of a text that suits the draft must not drown out those that do not
        share = self._share = weight / (1.0 + self._count / 3.0)
        self._long[0] += share * (value - 0.05 * self._long[0])
        self._long[1] += share * (1.0 - 0.05 * self._long[1])
        forget = self._forget**weight
        self._sum = self._sum * forget + weight * value
        self._count = self._count * forget + weight

    def amend(self, difference: float) -> None:
        """The last sample, of weight one, was this much more than it seemed."""
        self._sum += difference
        self._long[0] += self._share * difference

    @property
    def value(self) -> float:
        return (self._weight * self._earlier + self._sum) / (self._weight + self._count)

    @property
    def hardly_known(self) -> bool:
        """Whether this kind of text has told no more than chance may have."""
        return self._long[1] < self._prior_count + 2.0

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
