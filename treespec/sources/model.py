"""A causal LM as a draft: one forward a level over the frontier of all rows, tree nodes as rows of
its own cache."""

from __future__ import annotations

import torch

from treespec.model import TreeModel
from treespec.sources.base import Sequences, StepwiseSource
from treespec.transfer import on_device

# Catch-ups longer than this go through the prefill, so that few shapes need recording.
_LONGEST_CATCH_UP = 32


class ModelSource(StepwiseSource):
    """Drafts with a model.

    Args:
        model: the draft, made ready for trees.
        max_rows: node rows a round may need beyond the committed ones.
    """

    name = "model"

    def __init__(self, model: TreeModel, max_rows: int) -> None:
        self.model = model
        self.vocab_size = model.vocab_size
        self.max_rows = max_rows + _LONGEST_CATCH_UP
        self._ingested = False
        self.forwards = 0

    def begin(self, sequences: Sequences, capacity: int) -> None:
        self.model.begin()
        # the text is taken in when the draft is first asked: it may never be
        self.model.allocate(len(sequences.lens), capacity + self.max_rows)
        self.forwards = 0

    def drop_row(self, row: int) -> None:
        self.model.drop_row(row)

    def start_round(self) -> None:
        self.model.start_round()
        self._ingested = False

    @property
    def recording_ms(self) -> float:
        grown = self.model.grown
        return self.model.recording_ms + grown.capture_ms + grown.first_ms

    @property
    def compile_ms(self) -> float:
        return self.model.compile_ms + self.model.grown.first_ms

    @property
    def unrecorded_ms(self) -> float:
        return self.model.unrecorded_ms + self.model.grown.extra_ms

    @property
    def settled(self) -> bool:
        return self.model.settled and not self._ingested

    @property
    def can_be_captured(self) -> bool:
        """Whether forwards of the draft may be part of a step that is captured."""
        return self.model.grown.captured and self.model.recording_reason is None

    def catch_up(
        self, sequences: Sequences
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Takes in what is too much for one forward; returns what `enter` needs."""
        prefix_lens = self.model.cache.prefix_lens
        self.model.rounds_ahead = sequences.rounds_ahead
        self._steps = sequences.steps
        while max(self._lag(sequences)) > _LONGEST_CATCH_UP or min(prefix_lens) == 0:
            if min(prefix_lens) > 0 and self._steps.captured:
                self._take_in(sequences)
                continue
            self._ingested = True
            self.model.ingest(sequences.tokens, [length - 1 for length in sequences.lens])
            break
        self._behind = self._lag(sequences)
        width = _bucket(max(self._behind))
        if self._steps.captured:
            # some nodes more cost a GPU nothing, and graphs of their own would
            width = _LONGEST_CATCH_UP
        prefix = on_device(prefix_lens, sequences.tokens.device)
        return sequences.tokens, sequences.lens_on_device, prefix, width

    def _lag(self, sequences: Sequences) -> list[int]:
        """Tokens of every row that the draft has not taken in, the root among them."""
        return [
            length - have for length, have in zip(sequences.lens, self.model.cache.prefix_lens)
        ]

    def _take_in(self, sequences: Sequences) -> None:
        """Some of them, in a forward that is captured; a prompt is taken in only once."""
        width, history = _LONGEST_CATCH_UP, sequences.tokens
        prefix = on_device(self.model.cache.prefix_lens, history.device)
        nodes, positions, chain = self._steps(_next_tokens, history, prefix, width)
        self.model.forward(nodes, positions, chain, prefix_lens=prefix)
        taken = [min(width, lag - 1) for lag in self._lag(sequences)]
        self.model.cache.commit([list(range(count)) for count in taken])

    def enter(
        self, tokens: torch.Tensor, lens: torch.Tensor, prefix_lens: torch.Tensor, width: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """The first forward of a round, over the last `width` tokens of the texts `[B, S]`;
        returns what `root_logits` does."""
        self._lens, self._prefix = lens, prefix_lens
        nodes, positions, chain, root_row, sees = self._steps(
            _last_tokens, tokens, lens, prefix_lens, width
        )
        self._positions = positions
        self.forwards += 1
        logits = self.model.forward(nodes, positions, chain, prefix_lens=prefix_lens)
        return self._steps(_of_row, logits, root_row), root_row, sees, width

    def root_logits(self, sequences: Sequences):
        return self.enter(*self.catch_up(sequences))

    def level_logits(self, tokens, depth, visible, offset):
        positions, self._positions = self._steps(
            _level_positions, self._lens, self._positions, offset, depth, tokens.shape[1]
        )
        self.forwards += 1
        return self.model.forward(
            tokens, positions, visible, offset, self._positions, prefix_lens=self._prefix
        )

    def commit(self, paths: list[list[int]]) -> None:
        self.model.cache.commit(
            [list(range(behind)) + path for behind, path in zip(self._behind, paths)]
        )


def _next_tokens(
    history: torch.Tensor, prefix_lens: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first `width` tokens behind every prefix, their positions, and what they see."""
    positions = prefix_lens.unsqueeze(1) + torch.arange(width, device=history.device)
    # tokens past a row's end are padding that no other node sees
    tokens = history.gather(1, positions.clamp_max(history.shape[1] - 1))
    square = torch.ones(width, width, dtype=torch.bool, device=history.device).tril_()
    return tokens, positions, square.expand(len(history), -1, -1)


def _last_tokens(
    history: torch.Tensor, lens: torch.Tensor, prefix_lens: torch.Tensor, width: int
) -> tuple[torch.Tensor, ...]:
    """The same, the root among them, its row and what it sees."""
    tokens, positions, chain = _next_tokens(history, prefix_lens, width)
    root_row = lens - prefix_lens - 1
    sees = chain.gather(1, root_row.view(-1, 1, 1).expand(-1, 1, width)).squeeze(1)
    return tokens, positions, chain, root_row, sees


def _of_row(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`[B, 1, V]`, of `[B, N, V]` a row each."""
    return values.gather(1, rows.view(-1, 1, 1).expand(-1, 1, values.shape[2]))


def _level_positions(
    lens: torch.Tensor, before: torch.Tensor, offset: int, depth: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of a level's nodes, and of all nodes up to them."""
    positions = (lens.unsqueeze(1) - 1 + depth).expand(-1, width)
    return positions, torch.cat([before[:, :offset], positions], dim=1)


def _bucket(count: int) -> int:
    """One of few widths, each of which is recorded: 1, 2, 4, then multiples of 8."""
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8
