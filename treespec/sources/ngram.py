"""Lookup drafting: what followed the last tokens when they stood in the text before (prompt lookup;
Saxena 2023)."""

from __future__ import annotations

import torch

from treespec.kernels import ops
from treespec.sources.base import OneShotSource, Proposal, Sequences


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
        continuations, match_lengths = sequences.steps(
            _matches,
            sequences.tokens,
            sequences.lens_on_device,
            self.max_ngram,
            self.num_matches,
            length,
            "triton" if sequences.steps.captured else "auto",
        )
        found = match_lengths.tolist()
        if any(found):
            continuations = sequences.steps(_run_on, continuations)
        return Proposal(continuations, found)


def _matches(
    tokens: torch.Tensor,
    lens: torch.Tensor,
    max_ngram: int,
    num_matches: int,
    length: int,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.match_ngrams(
        tokens,
        lens,
        max_ngram=max_ngram,
        num_matches=num_matches,
        length=length,
        implementation=implementation,
    )


def _run_on(continuations: torch.Tensor) -> torch.Tensor:
    """Continuations that end before their time begin anew."""
    known = (continuations >= 0).sum(2, keepdim=True).clamp_min_(1)
    steps = torch.arange(continuations.shape[2], device=continuations.device)
    return continuations.gather(2, steps % known)
