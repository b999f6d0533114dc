"""What to draft next: fixed shapes answer from their definition, `AutoPolicy` from measured costs
and running acceptance.

A policy answers four questions of a round: what a lookup is worth, whether to ask the draft at all,
which nodes of a level to expand, and how many nodes to verify. It learns from `observe` and decides
on the host.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from treespec.sampling import TokenPicker
from treespec.shapes import AdaptiveTree, BestFirstTree, Chain, FixedTree, Shape
from treespec.tree import NODE_SIZES, Tree

_LOWEST = float("-inf")

# Shares of looked-up tokens that proved right, by match length 0, 1, 2, ...
LOOKUP_PRIOR = (0.0, 0.25, 0.45, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)

# A draft's probability says how often a token is *drawn*; which token is the argmax, with or
# without known noise, is more certain. These factors fit the demo pair (docs/design/003-auto.md);
# `AutoPolicy` goes on from them.
GREEDY_SHARPNESS = 3.0
COUPLED_SHARPNESS = 2.0


def running_chances(
    next_right: Sequence[float], match_lengths: list[int], length: int
) -> np.ndarray:
    """Chances `[B, length]` that a continuation's tokens so far are right. One that proved right so
    far is a longer match.

    Args:
        next_right: the share of next tokens that are right, by match length; 0 for none, and the
            last one goes for longer matches too.
        match_lengths: of every row.
        length: tokens of a continuation.
    """
    matched = np.array(match_lengths)[:, None] + np.arange(length)
    return np.cumprod(np.take(next_right, matched, mode="clip"), axis=1)


@dataclass
class Outcome:
    """What a round did: per row the tree's path, and the milliseconds of its parts without those
    spent on recording forwards.

    `draft_extra_ms` and `verify_extra_ms` are what forwards of the draft and the target took longer
    because they are not recorded, and part of the times above. `draft_settled` and `settled` are
    False where that is not known, and where the draft took in a prompt; `overhead_settled` is where
    what is between the forwards was called or captured, which a GPU still busy may have hidden.
    `recording_ms` is what recording took; while `warming` up it was asked for.
    """

    tree: Tree
    paths: list[list[int]]
    match_lengths: list[int] | None
    draft_levels: int
    draft_ms: float
    verify_ms: float
    total_ms: float
    num_nodes: int
    new_tokens: int
    sampled: bool
    draft_extra_ms: float = 0.0
    verify_extra_ms: float = 0.0
    settled: bool = True
    draft_settled: bool = True
    overhead_settled: bool = True
    recording_ms: float = 0.0
    warming: bool = False

    def brought_by_lookups(self) -> list[int]:
        """Tokens of every row's path that lookups proposed, up to the first that they did not."""
        if self.tree.lookup is None:
            return [0] * len(self.paths)
        brought = []
        for path, lookup in zip(self.paths, self.tree.lookup.tolist()):
            wrong = [at for at, node in enumerate(path[1:]) if not lookup[node]]
            brought.append(wrong[0] if wrong else len(path) - 1)
        return brought


class Policy:
    """Grows nothing, verifies the root alone: plain decoding."""

    max_nodes = 1
    node_sizes: tuple[int, ...] = NODE_SIZES
    max_depth = 0
    max_rows = 0
    lookup_length = 0
    # forwards of this round's drafts may be recorded at once, however seldom they were made
    may_record = False
    # `observe` reads the trees
    reads_trees = False
    # as many nodes are verified whatever the draft says
    looks_at_nothing = False

    def lookup_chances(self, match_lengths: list[int], length: int) -> np.ndarray:
        """Per row the chances, `[B, length]`, that a continuation's tokens so far are right."""
        return running_chances(LOOKUP_PRIOR, match_lengths, length)

    def begin(
        self, longest: int, sampled: bool, prefill_ms: float = 0.0, captured: bool = False
    ) -> None:
        """A new batch of texts begins.

        Args:
            longest: tokens of the longest prompt.
            sampled: new tokens are sampled.
            prefill_ms: what it took the target to take in the prompts.
            captured: rounds are captured as graphs, of which every shape takes its own.
        """

    def begin_round(self, left: list[int]) -> bool:
        """A round begins, of sequences that may still write so many tokens each; returns whether
        anything is to be drafted in it."""
        return True

    def wants_lookup(self) -> bool:
        return self.lookup_length > 0

    def wants_matches(self, match_lengths: list[int]) -> bool:
        """Whether what lookups found becomes candidates."""
        return max(match_lengths) > 0

    def sharpness(self, picker: TokenPicker) -> float:
        """Factor on a draft's logits before they become probabilities."""
        return COUPLED_SHARPNESS if picker.knows_pick else 1.0

    def wants_draft(self, lookup_scores: torch.Tensor) -> bool:
        """Whether the draft model is asked this round, given the scores `[B, M * L]` of what
        lookups proposed."""
        return self.max_depth > 0

    def children(self, depth: int) -> int:
        """Most children of a node at `depth`."""
        raise NotImplementedError

    def breadth(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Children of every node, int64 `[B, F]`, given the log-probabilities `[B, F, K]` of the
        likeliest ones; where a policy does not say, as many as there may be."""
        raise NotImplementedError

    def frontier(self, depth: int) -> tuple[int, float]:
        """Most nodes to expand at `depth`, and the cumulative log-probability below which none
        is."""
        raise NotImplementedError

    def levels_ahead(self) -> int | None:
        """How many levels are grown without a look at them, on devices that would wait for it; None
        where each tells whether the next one pays."""
        return self.max_depth if self.looks_at_nothing else None

    def levels_grown(self, reached: list[list[float]]) -> None:
        """Levels were grown without a look at them.

        Args:
            reached: of every row the probabilities, at most 1, that the text goes on through the
                nodes expanded on each further level.
        """

    def worth_expanding(self, scores: torch.Tensor) -> bool:
        """Whether a level pays, given its frontier's cumulative log-probabilities `[B, F]`."""
        return bool((scores > _LOWEST).any())

    def nodes_to_verify(self, scores: torch.Tensor) -> int:
        """Nodes to verify, root included, given all candidates' cumulative log-probabilities `[B,
        C]`."""
        return self.max_nodes

    def node_budget(self) -> int:
        """Nodes to verify, root included, where siblings are drawn and none may be left out
        later."""
        return self.max_nodes

    def observe(self, outcome: Outcome) -> None:
        """Learns from a finished round."""

    def prepared(self) -> None:
        """All that may be drafted was made before, because that was asked for."""

    def describe(self) -> str:
        return "plain decoding: one token a round"


class ShapePolicy(Policy):
    """Draws exactly the trees a shape describes.

    Args:
        shape: the shape.
        with_model: a draft model is among the sources.
        with_lookup: a lookup is among the sources.
    """

    def __init__(self, shape: Shape, with_model: bool, with_lookup: bool) -> None:
        self.shape = shape
        self.max_nodes = shape.max_nodes
        self.max_depth = shape.depth
        self.with_model = with_model
        self.lookup_length = shape.depth if with_lookup else 0
        self.max_rows = sum(self._widths()) + 1 if with_model else 0
        self.looks_at_nothing = with_model and self.frontier(1)[1] == _LOWEST

    def _widths(self) -> list[int]:
        return [self.frontier(depth)[0] for depth in range(1, self.max_depth)]

    def wants_draft(self, lookup_scores):
        return self.with_model

    def sharpness(self, picker):
        # thresholds of the other shapes are on the draft's own probability
        if isinstance(self.shape, BestFirstTree) and not picker.do_sample:
            return GREEDY_SHARPNESS
        return super().sharpness(picker)

    def children(self, depth):
        shape = self.shape
        if isinstance(shape, Chain):
            return 1
        if isinstance(shape, FixedTree):
            return (shape.first_branching or shape.branching) if depth == 0 else shape.branching
        assert isinstance(shape, BestFirstTree)
        return shape.width

    def frontier(self, depth):
        shape = self.shape
        if isinstance(shape, Chain):
            return 1, _LOWEST
        if isinstance(shape, FixedTree):
            width = (shape.first_branching or shape.branching) * shape.branching ** (depth - 1)
            threshold = math.log(shape.prune_threshold) if shape.prune_threshold > 0 else _LOWEST
            return min(width, shape.max_nodes), threshold
        assert isinstance(shape, BestFirstTree)
        return shape.width, _LOWEST

    def worth_expanding(self, scores):
        return self.looks_at_nothing or super().worth_expanding(scores)

    def describe(self):
        return f"{self.shape}, as asked for"


class AdaptivePolicy(ShapePolicy):
    """DynaTree's three adaptive rules; see `AdaptiveTree`."""

    shape: AdaptiveTree

    def __init__(self, shape: AdaptiveTree, with_model: bool, with_lookup: bool) -> None:
        self.base_depth = shape.base_depth
        self.shift = 0.0
        self._history: deque[float] = deque(maxlen=shape.window)
        super().__init__(shape, with_model, with_lookup)

    def children(self, depth):
        return self.shape.max_branching

    def breadth(self, logprobs):
        shape = self.shape
        confidence = logprobs[..., 0].exp()
        breadth = torch.full(
            confidence.shape, shape.branching, dtype=torch.long, device=confidence.device
        )
        breadth.masked_fill_(confidence > shape.high_confidence, 1)
        return breadth.masked_fill_(confidence < shape.low_confidence, shape.max_branching)

    def frontier(self, depth):
        shape = self.shape
        threshold = shape.stop_threshold if depth < self.base_depth else shape.deepen_threshold
        threshold = min(max(threshold + self.shift, 1e-6), 0.999)
        return min(shape.max_branching**depth, shape.max_nodes), math.log(threshold)

    def observe(self, outcome):
        shape = self.shape
        self._history.extend((len(path) - 1) / self.base_depth for path in outcome.paths)
        if len(self._history) < shape.window:
            return
        acceptance = sum(self._history) / len(self._history)
        if acceptance > shape.target_acceptance + shape.tolerance:
            self._move(1)
        elif acceptance < shape.target_acceptance - shape.tolerance:
            self._move(-1)

    def _move(self, step: int) -> None:
        """One level deeper and more lenient, or shallower and stricter; then a fresh window."""
        self.base_depth = min(max(self.base_depth + step, 1), self.shape.max_depth)
        self.shift = min(max(self.shift - step * self.shape.threshold_step, -0.5), 0.5)
        self._history.clear()


def make_policy(shape: Shape, with_model: bool, with_lookup: bool) -> Policy:
    """The policy of an explicit shape."""
    if isinstance(shape, AdaptiveTree):
        return AdaptivePolicy(shape, with_model, with_lookup)
    return ShapePolicy(shape, with_model, with_lookup)
