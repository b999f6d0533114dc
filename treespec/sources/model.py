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
        return self.model.recording_ms

    @property
    def unrecorded_ms(self) -> float:
        return self.model.unrecorded_ms

    @property
    def settled(self) -> bool:
        return self.model.settled and not self._ingested

    def root_logits(self, sequences: Sequences):
        prefix_lens = self.model.cache.prefix_lens
        self.model.rounds_ahead = sequences.rounds_ahead
        behind = max(length - prefix for length, prefix in zip(sequences.lens, prefix_lens))
        if behind > _LONGEST_CATCH_UP or min(prefix_lens) == 0:
            self._ingested = True
            self.model.ingest(sequences.tokens, [length - 1 for length in sequences.lens])
        self._behind = [length - prefix for length, prefix in zip(sequences.lens, prefix_lens)]
        device = sequences.tokens.device
        width = _bucket(max(self._behind))
        prefix = on_device(prefix_lens, device).unsqueeze(1)
        positions = prefix + torch.arange(width, device=device)
        # tokens past a row's end are padding that no other node sees
        tokens = sequences.tokens.gather(1, positions.clamp_max(sequences.tokens.shape[1] - 1))
        chain = (
            torch.ones(width, width, dtype=torch.bool, device=device)
            .tril_()
            .expand(len(prefix_lens), -1, -1)
        )
        root_row = on_device(self._behind, device) - 1
        self._roots = prefix + root_row.unsqueeze(1)
        self._positions = positions
        self.forwards += 1
        logits = self.model.forward(tokens, positions, chain)
        index = root_row.view(-1, 1, 1)
        root_logits = logits.gather(1, index.expand(-1, 1, logits.shape[2]))
        sees = chain.gather(1, index.expand(-1, 1, width)).squeeze(1)
        return root_logits, root_row, sees, width

    def level_logits(self, tokens, depth, visible, offset):
        positions = (self._roots + depth).expand_as(tokens)
        self._positions = torch.cat([self._positions[:, :offset], positions], dim=1)
        self.forwards += 1
        return self.model.forward(tokens, positions, visible, offset, self._positions)

    def commit(self, paths: list[list[int]]) -> None:
        self.model.cache.commit(
            [list(range(behind)) + path for behind, path in zip(self._behind, paths)]
        )


def _bucket(count: int) -> int:
    """One of few widths, each of which is recorded: 1, 2, 4, then multiples of 8."""
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8
