"""The two rejection rules over a batch of trees, on the host: which path survives, and the
distribution its bonus token comes from.

Mathematics and proofs are in docs/kernels/verify_sampled.md. As in the papers, p is the target's
distribution at a node, q the draft's, and x the token of a child. Rows advance together, each at
its own node; every step works on all rows that are still deciding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass
class DraftTrees:
    """A batch of trees of sampled children.

    Attributes:
        tokens: int [B, N].
        parents: int [B, N]; node 0 is the root.
        num_nodes: int [B].
        target_probs: (rows [K], nodes [K]) -> p [K, V], NaN where the logits decide nothing.
        draft_probs: (rows [K], nodes [K]) -> q [K, V]; asked for nodes with children only.
        coins: float32 [B, N], the uniform number of each node.
        vocab_size: V.
    """

    tokens: np.ndarray
    parents: np.ndarray
    num_nodes: np.ndarray
    target_probs: Callable[[np.ndarray, np.ndarray], np.ndarray]
    draft_probs: Callable[[np.ndarray, np.ndarray], np.ndarray]
    coins: np.ndarray
    vocab_size: int

    def next_child(self, rows: np.ndarray, nodes: np.ndarray, after: np.ndarray) -> np.ndarray:
        """The first child of each node whose index exceeds ``after``; -1 without one."""
        index = np.arange(self.parents.shape[1])
        hits = self.parents[rows] == nodes[:, None]
        hits &= (index > after[:, None]) & (index < self.num_nodes[rows, None])
        first = hits.argmax(1)
        return np.where(hits[np.arange(len(first)), first], first, -1)

    def load(
        self, rows: np.ndarray, nodes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """p [K, V] and q [K, V] of the nodes, q 0 at a leaf, and which of them are numbers [K]."""
        p = self.target_probs(rows, nodes)
        q = np.zeros_like(p)
        inner = self.next_child(rows, nodes, nodes) >= 0
        if inner.any():
            q[inner] = self.draft_probs(rows[inner], nodes[inner])
        return p, q, np.isfinite(p.sum(1) + q.sum(1))


@dataclass
class Outcome:
    """``path`` int64 [B, N] padded with -1, ``accept_length`` int64 [B], ``last`` int64 [B] the
    last
    node of each path, ``bonus_probs`` [B, V], ``decided`` bool [B]: False where NaN was met or the
    tree is empty.
    """

    path: np.ndarray
    accept_length: np.ndarray
    last: np.ndarray
    bonus_probs: np.ndarray
    decided: np.ndarray


def without_replacement(trees: DraftTrees) -> Outcome:
    """Recursive rejection sampling (Jeon et al. 2024, algorithm 3; Sequoia, algorithm 2)."""
    batch = trees.tokens.shape[0]
    node, tried = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
    decided = trees.num_nodes > 0
    p, q = (np.zeros((batch, trees.vocab_size), trees.coins.dtype) for _ in range(2))

    def enter(rows: np.ndarray) -> np.ndarray:
        """Load the node each row has come to; returns the rows that met NaN."""
        p[rows], q[rows], fine = trees.load(rows, node[rows])
        decided[rows] = fine
        return rows[~fine]

    live = np.flatnonzero(decided)
    live = np.setdiff1d(live, enter(live), assume_unique=True)
    while live.size:
        child = trees.next_child(live, node[live], tried[live])
        live, child = live[child >= 0], child[child >= 0]
        x = trees.tokens[live, child]
        tried[live] = child
        # A token the draft cannot have drawn tells nothing: its child is passed over.
        possible = q[live, x] > 0
        rows, child, x = live[possible], child[possible], x[possible]
        accepted = trees.coins[rows, child] * q[rows, x] < p[rows, x]
        lost, lost_tokens = rows[~accepted], x[~accepted]
        if lost.size:
            p[lost], _ = residual(p[lost], q[lost], 1.0)
            q[lost] = without_token(q[lost], lost_tokens)
        entered = rows[accepted]
        if entered.size:
            node[entered] = child[accepted]
            live = np.setdiff1d(live, enter(entered), assume_unique=True)
    return _outcome(trees, node, p, decided)


def traversal(trees: DraftTrees) -> Outcome:
    """Traversal verification (Weng et al. 2025, algorithm 2): the path of the first leaf is
    accepted
    whole with the leaf's rate, else the leaf is deleted and its parent takes up the residual.
    """
    batch, capacity = trees.tokens.shape
    node = np.zeros(batch, np.int64)
    tried = np.broadcast_to(np.arange(capacity), (batch, capacity)).copy()
    decided = trees.num_nodes > 0
    p, q = (np.empty((batch, capacity, trees.vocab_size), trees.coins.dtype) for _ in range(2))
    rate = np.ones((batch, capacity), p.dtype)

    def enter(rows: np.ndarray) -> np.ndarray:
        """Load the node each row has come to; returns the rows that met NaN."""
        p[rows, node[rows]], q[rows, node[rows]], fine = trees.load(rows, node[rows])
        decided[rows] = fine
        return rows[~fine]

    live = np.flatnonzero(decided)
    live = np.setdiff1d(live, enter(live), assume_unique=True)
    while live.size:
        here = node[live]
        child = trees.next_child(live, here, tried[live, here])
        # 1. Rows with a child left go down to it, unless the draft cannot have drawn its token.
        down, below, above = live[child >= 0], child[child >= 0], here[child >= 0]
        x = trees.tokens[down, below]
        tried[down, above] = below
        chance = q[down, above, x]
        possible = chance > 0
        down, below, above, x, chance = (v[possible] for v in (down, below, above, x, chance))
        rate[down, below] = np.minimum(1, rate[down, above] * p[down, above, x] / chance)
        node[down] = below
        undecided = enter(down) if down.size else down
        # 2. Rows at a leaf accept its path, or delete it and go back to the parent.
        leaf_rows, leaf = live[child < 0], here[child < 0]
        accepted = (leaf == 0) | (trees.coins[leaf_rows, leaf] < rate[leaf_rows, leaf])
        back, leaf, done = leaf_rows[~accepted], leaf[~accepted], leaf_rows[accepted]
        if back.size:
            parent = trees.parents[back, leaf].astype(np.int64)
            old = rate[back, parent]
            p[back, parent], mass = residual(p[back, parent], q[back, parent], old[:, None])
            kept = np.divide(mass, mass + 1 - old, out=np.zeros_like(mass), where=mass > 0)
            rate[back, parent] = np.where(parent == 0, 1, kept)
            q[back, parent] = without_token(q[back, parent], trees.tokens[back, leaf])
            node[back] = parent
        stopped = np.concatenate([done, undecided])
        if stopped.size:
            live = np.setdiff1d(live, stopped, assume_unique=True)
    return _outcome(trees, node, p[np.arange(batch), node], decided)


def residual(p: np.ndarray, q: np.ndarray, rate) -> tuple[np.ndarray, np.ndarray]:
    """``norm(max(rate * p - q, 0))`` [K, V] and the mass [K] before the norm; p "
    "where none is left."""
    left = np.maximum(rate * p - q, 0)
    mass = left.sum(1)
    some = mass[:, None] > 0
    return np.divide(left, mass[:, None], out=p.copy(), where=some), mass


def without_token(q: np.ndarray, x: np.ndarray) -> np.ndarray:
    """q [K, V] without token x [K], normalised again; all zero where nothing else was left."""
    q = q.copy()
    q[np.arange(len(x)), x] = 0
    total = q.sum(1, keepdims=True)
    return np.divide(q, total, out=q, where=total > 0)


def _outcome(
    trees: DraftTrees, last: np.ndarray, bonus_probs: np.ndarray, decided: np.ndarray
) -> Outcome:
    """Climb from the last node of every row to its root."""
    batch, capacity = trees.tokens.shape
    path, accept_length = np.full((batch, capacity), -1), np.zeros(batch, np.int64)
    for b in np.flatnonzero(trees.num_nodes > 0).tolist():
        nodes = [int(last[b])]
        while nodes[-1] > 0:
            nodes.append(int(trees.parents[b, nodes[-1]]))
        path[b, : len(nodes)] = nodes[::-1]
        accept_length[b] = len(nodes) - 1
    return Outcome(path, accept_length, last, bonus_probs, decided)
