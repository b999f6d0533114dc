"""Rounds of every shape that `tree="auto"` may choose where rounds are captured as graphs, for a
warm-up: as they occur, each would be slow for its first few times."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from treespec.auto import FEW_NODE_SIZES, FRONTIER, LEVELS_AHEAD, LOOKUP_LENGTHS
from treespec.costs import FRONTIER_WIDTH
from treespec.policy import Policy
from treespec.steps import CALLS_BEFORE

# Calls, the capture, and a replay.
_TIMES = CALLS_BEFORE + 2


class Scene(NamedTuple):
    """One shape: draft levels, whether lookups found something, and nodes verified."""

    levels: int
    lookup: bool
    num_nodes: int


class Rehearsal(Policy):
    """Draws every shape a few times.

    Args:
        with_model: a draft model is among the sources.
        with_lookup: a lookup is among the sources.

    Attributes:
        left: shapes still to be drawn.
    """

    max_nodes = FEW_NODE_SIZES[-1]
    node_sizes = FEW_NODE_SIZES
    max_depth = LEVELS_AHEAD[-1]
    max_rows = FRONTIER_WIDTH * max_depth + 1
    reads_trees = True

    def __init__(self, with_model: bool, with_lookup: bool) -> None:
        self.lookup_length = LOOKUP_LENGTHS[-1] if with_lookup else 0
        levels = (0, *LEVELS_AHEAD) if with_model else (0,)
        lookups = (False, True) if with_lookup else (False,)
        scenes = (Scene(*scene) for scene in product(levels, lookups, FEW_NODE_SIZES[1:]))
        self.left = [scene for scene in scenes if _occurs(scene) for _ in range(_TIMES)]

    def begin_round(self, left):
        self._scene = self.left.pop() if self.left else Scene(0, False, 1)
        return True

    def wants_lookup(self):
        return self._scene.lookup

    def wants_matches(self, match_lengths):
        return True

    def wants_draft(self, lookup_scores):
        return self._scene.levels > 0

    def children(self, depth):
        return FRONTIER_WIDTH

    def frontier(self, depth):
        return FRONTIER

    def levels_ahead(self):
        return self._scene.levels

    def nodes_to_verify(self, scores):
        return self._scene.num_nodes


def _occurs(scene: Scene) -> bool:
    """Whether there may be as many candidates as it takes to verify so many."""
    if not scene.levels:
        return scene.lookup
    most = 1 + FRONTIER_WIDTH + FRONTIER_WIDTH**2 * (scene.levels - 1)
    narrower = FEW_NODE_SIZES[FEW_NODE_SIZES.index(scene.num_nodes) - 1]
    return scene.lookup or narrower < most
