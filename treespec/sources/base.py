"""The protocol of draft sources.

Three kinds: *one-shot* sources propose continuations of the committed text at once
(`OneShotSource`); *stepwise* sources are asked once a level with a frontier of nodes
(`StepwiseSource`). Sources that answer with a block of levels from one pass fit the first kind when
they propose paths. A source may propose anything: a bad proposal costs time, never text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import torch

from treespec.steps import Steps
from treespec.transfer import on_device


@dataclass
class Sequences:
    """The committed text of every active row, as sources see it.

    Attributes:
        tokens: int64 `[B, S]`, unpadded, left-aligned; what lies beyond a row's length is
            undefined.
        lens: committed tokens of every row; the last one is the root, whose key-value row is not
            written yet.
        rounds_ahead: about how many rounds of as many rows are still to come; None where that is
            unknown.
        steps: calls functions of tensors, on a GPU perhaps as graphs.
    """

    tokens: torch.Tensor
    lens: list[int]
    rounds_ahead: float | None = None
    steps: Steps = field(default_factory=Steps)

    @cached_property
    def lens_on_device(self) -> torch.Tensor:
        """int64 `[B]`, `lens` where the tokens are."""
        return on_device(self.lens, self.tokens.device)

    def roots(self) -> torch.Tensor:
        """int64 `[B]`, the last committed token of every row."""
        return self.tokens.gather(1, self.lens_on_device.unsqueeze(1) - 1).squeeze(1)


@dataclass
class Proposal:
    """Continuations of every row.

    Attributes:
        continuations: int64 `[B, M, L]`, -1 padded; the likelier first.
        match_lengths: per row how many last tokens the lookup matched; 0 where it found nothing.
        runs_on: continuations that end before their time begin anew, as in LZ77.
    """

    continuations: torch.Tensor
    match_lengths: list[int]
    runs_on: bool = False


class DraftSource(ABC):  # noqa: B024 - its two kinds have the abstract methods
    """Where drafted tokens come from. Subclass `OneShotSource` or `StepwiseSource`."""

    name = "draft"

    def begin(self, sequences: Sequences, capacity: int) -> None:  # noqa: B027
        """A new batch of sequences of at most `capacity` tokens begins."""

    def drop_row(self, row: int) -> None:  # noqa: B027
        """Row `row` is finished; the last active row takes its place."""

    def end(self) -> None:  # noqa: B027
        """The batch is over, also after an error."""


class OneShotSource(DraftSource):
    """Proposes continuations of the committed text without being asked level by level."""

    @abstractmethod
    def propose(self, sequences: Sequences, length: int) -> Proposal:
        """Continuations of at most `length` tokens."""


class StepwiseSource(DraftSource):
    """Gives next-token logits for nodes, one call a level, and keeps its own state of every node it
    was asked about."""

    vocab_size: int

    def start_round(self) -> None:
        """From here on the times of a round are summed up."""

    @property
    def recording_ms(self) -> float:
        """What recording forwards took in this round, once and for all."""
        return 0.0

    @property
    def compile_ms(self) -> float:
        """The part of that which compiling kernels took."""
        return 0.0

    @property
    def unrecorded_ms(self) -> float:
        """What forwards that are not recorded took longer than they will when they are."""
        return 0.0

    @property
    def settled(self) -> bool:
        """Whether that is all that was unusual about the round's time."""
        return True

    @abstractmethod
    def root_logits(
        self, sequences: Sequences
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Takes in what was committed since the last call.

        Returns:
            logits: `[B, 1, V]` after the last committed token.
            root_row: int64 `[B]`, the root's row of this round.
            chain: bool `[B, R]`, rows the root sees, itself among them.
            offset: the first free row, R.
        """

    @abstractmethod
    def level_logits(
        self, tokens: torch.Tensor, depth: int, visible: torch.Tensor, offset: int
    ) -> torch.Tensor:
        """Logits `[B, F, V]` after the nodes of a frontier.

        Args:
            tokens: int64 `[B, F]`.
            depth: of the nodes; the root's is 0.
            visible: bool `[B, F, offset + F]`, rows each node sees, itself among them.
            offset: row of the first node.
        """

    @abstractmethod
    def commit(self, paths: list[list[int]]) -> None:
        """Keeps, behind the root, the rows of the nodes that were accepted and had been
        forwarded."""
