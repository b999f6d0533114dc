"""What a call of the speculator did: counts and times, for people and for benchmarks."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field


@dataclass
class RowStats:
    """One sequence's share: `rounds` it took part in, `new_tokens` it got, `accepted` drafted
    tokens kept."""

    rounds: int = 0
    new_tokens: int = 0
    accepted: int = 0


@dataclass
class SpeculationStats:
    """Counts and times of one call.

    `rounds` counts target forwards after prefill; `drafted_nodes` counts verified nodes without
    roots, over all rows; `accept_lengths` maps an accept length (drafted tokens kept in one round
    of one row) to how often it occurred. Times are milliseconds of wall time; `total_ms` is
    that of the whole call, without what the consumer of a stream does between rounds.
    """

    rounds: int = 0
    new_tokens: int = 0
    drafted_nodes: int = 0
    accept_lengths: Counter = field(default_factory=Counter)
    prefill_ms: float = 0.0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    commit_ms: float = 0.0
    total_ms: float = 0.0
    draft_forwards: int = 0
    per_row: list[RowStats] = field(default_factory=list)

    @property
    def tokens_per_round(self) -> float:
        """New tokens of a row per target forward it took part in: 1 + mean accept length, save for
        a cut last round."""
        rounds = sum(row.rounds for row in self.per_row)
        return self.new_tokens / rounds if rounds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Drafted nodes that were kept, as a share of those verified."""
        kept = sum(length * times for length, times in self.accept_lengths.items())
        return kept / self.drafted_nodes if self.drafted_nodes else 0.0

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.new_tokens / self.total_ms if self.total_ms else 0.0

    def as_dict(self) -> dict:
        """Plain data, ready for JSON."""
        data = asdict(self)
        data["accept_lengths"] = {int(k): v for k, v in sorted(self.accept_lengths.items())}
        for name in ("tokens_per_round", "acceptance_rate", "tokens_per_second"):
            data[name] = getattr(self, name)
        return data
