"""Lookup drafting: what followed the last tokens when they stood in the text before (prompt lookup;
Saxena 2023)."""

from __future__ import annotations

import torch

from treespec.kernels import ops
from treespec.sources.base import OneShotSource, Proposal, Sequences
from treespec.transfer import on_device


class NgramSource(OneShotSource):
    """Continuations of earlier occurrences of the text's last tokens, the longest match first, then
    the latest.

    Where the text repeats with a short period the continuation runs on into itself, as in LZ77.

    Args:
        max_ngram: longest match looked for, in tokens.
        num_matches: occurrences that are proposed.
    """

    name = "ngram"

    def __init__(self, max_ngram: int = 8, num_matches: int = 4) -> None:
        self.max_ngram = max_ngram
        self.num_matches = num_matches

    def propose(self, sequences: Sequences, length: int) -> Proposal:
        lens = on_device(sequences.lens, sequences.tokens.device)
        continuations, match_lengths = ops.match_ngrams(
            sequences.tokens,
            lens,
            max_ngram=self.max_ngram,
            num_matches=self.num_matches,
            length=length,
        )
        found = match_lengths.tolist()
        if any(found):
            known = (continuations >= 0).sum(2, keepdim=True).clamp_min_(1)
            steps = torch.arange(length, device=lens.device)
            continuations = continuations.gather(2, steps % known)
        return Proposal(continuations, found)
