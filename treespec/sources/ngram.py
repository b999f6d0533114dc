"""Lookup drafting: what followed the last tokens when they stood in the text before (prompt lookup;
Saxena 2023)."""

from __future__ import annotations

import numpy as np
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
        # of the rows, where their tokens are on the host anyway
        self._histories: list[_History] = []

    def begin(self, sequences: Sequences, capacity: int) -> None:
        on_host = sequences.tokens.device.type == "cpu" and not sequences.steps.captured
        self._histories = [_History() for _ in sequences.lens] if on_host else []

    def drop_row(self, row: int) -> None:
        if self._histories:
            self._histories[row] = self._histories[-1]
            self._histories.pop()

    def end(self) -> None:
        self._histories = []

    def propose(self, sequences: Sequences, length: int) -> Proposal:
        if self._histories:
            return self._propose_on_host(sequences, length)
        continuations, match_lengths = sequences.steps(
            _matches,
            sequences.tokens,
            sequences.lens_on_device,
            self.max_ngram,
            self.num_matches,
            length,
            "triton" if sequences.steps.captured else "auto",
        )
        return Proposal(continuations, match_lengths.tolist(), runs_on=True)

    def _propose_on_host(self, sequences: Sequences, length: int) -> Proposal:
        """What `ops.match_ngrams` finds, by few steps: between two forwards all code is cold."""
        found = []
        for row, (history, count) in enumerate(zip(self._histories, sequences.lens)):
            history.follow(sequences.tokens[row], count)
            found.append(history.match(self.max_ngram, self.num_matches))
        # a line alone is merged sooner
        lines = max(1, *(len(ends) for _, ends in found))
        continuations = np.full((len(found), lines, length), -1)
        for row, (_, ends) in enumerate(found):
            for slot, end in enumerate(ends):
                continuations[row, slot] = self._histories[row].run_on(end, length)
        return Proposal(torch.from_numpy(continuations), [matched for matched, _ in found])


class _History:
    """A text, and where each of its tokens stands.

    Attributes:
        tokens: of the text so far.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._places: dict[int, list[int]] = {}

    def follow(self, text: torch.Tensor, count: int) -> None:
        """Takes in what was written since the last time.

        Args:
            text: int64 `[S]`.
            count: of its tokens that are committed.
        """
        new = text[len(self.tokens) : count].tolist()
        for place, token in enumerate(new, len(self.tokens)):
            self._places.setdefault(token, []).append(place)
        self.tokens += new

    def match(self, max_ngram: int, num_matches: int) -> tuple[int, list[int]]:
        """The most last tokens that stand elsewhere too, and where they end there, the latest
        first."""
        tokens, last = self.tokens, len(self.tokens) - 1
        longest, ends = 0, []
        places = self._places[tokens[last]]  # the last of them is the last token's own
        for end in reversed(places[:-1]):
            matched = 1
            while matched < max_ngram and matched <= end:
                if tokens[end - matched] != tokens[last - matched]:
                    break
                matched += 1
            if matched > longest:
                longest, ends = matched, [end]
            elif matched == longest and len(ends) < num_matches:
                ends.append(end)
            if longest == max_ngram and len(ends) == num_matches:
                break
        return longest, ends

    def run_on(self, end: int, length: int) -> list[int]:
        """So many tokens after place `end`, those up to the text's own end over and over."""
        following = self.tokens[end + 1 : end + 1 + length]
        return (following * -(-length // len(following)))[:length]


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
