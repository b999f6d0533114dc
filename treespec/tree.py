"""One batch of trees: growing candidate nodes level by level, merging lookups as a trie, selecting
the best.

A `Growth` collects candidates of all rows in step (same count for every row, `-inf` marks an empty
place), parents always before children. `select` cuts it down to the `Tree` that is verified. No
step loops over nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from treespec.kernels import ops
from treespec.kernels.checks import MAX_CANDIDATES
from treespec.shapes import MAX_NODES

_EMPTY = float("-inf")
_POOL = 512


@dataclass
class Tree:
    """Trees ready to be verified; node 0 is the root, parents come before children, places beyond
    are padding.

    Attributes:
        tokens: int64 `[B, N]`.
        parents: int64 `[B, N]`; -1 for the root and for padding.
        depths: int64 `[B, N]`.
        visible: bool `[B, N, N]`; row i marks the ancestors of node i and itself.
        num_nodes: int64 `[B]`.
        scores: float32 `[B, N]` cumulative log-probabilities; 0 for the root.
        draft_rows: int64 `[B, N]`, the draft's row of a node it has forwarded, else -1; None
            without a draft model.
        lookup: bool `[B, N]`, nodes that a lookup proposed; None without lookups.
        draft_probs: float32 `[B, N, V]`, what the children of each node were drawn from; None
            unless they were drawn.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    visible: torch.Tensor
    num_nodes: torch.Tensor
    scores: torch.Tensor
    draft_rows: torch.Tensor | None = None
    lookup: torch.Tensor | None = None
    draft_probs: torch.Tensor | None = None


NODE_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256)


def round_up_nodes(count: int, sizes: tuple[int, ...] = NODE_SIZES) -> int:
    """The next of a few widths, so that few shapes of forwards occur."""
    return next(size for size in sizes if size >= count)


def root_only(root_tokens: torch.Tensor) -> Tree:
    """Trees of nothing but their root: plain decoding."""
    batch, device = root_tokens.shape[0], root_tokens.device
    zeros = torch.zeros(batch, 1, dtype=torch.long, device=device)
    return Tree(
        tokens=root_tokens.view(batch, 1),
        parents=zeros - 1,
        depths=zeros,
        visible=torch.ones(batch, 1, 1, dtype=torch.bool, device=device),
        num_nodes=torch.ones(batch, dtype=torch.long, device=device),
        scores=torch.zeros(batch, 1, device=device),
    )


def packed(
    num_nodes: torch.Tensor,
    parents: torch.Tensor,
    scores: torch.Tensor,
    draft_rows: torch.Tensor | None,
    lookup: torch.Tensor | None,
) -> torch.Tensor:
    """float64 `[B, 1 + 2N]` to `[B, 1 + 4N]`: what is told of trees, for `with_read`; all of it is
    exact in float64."""
    told = [num_nodes.unsqueeze(1), parents, scores, draft_rows, lookup]
    return torch.cat([part.double() for part in told if part is not None], dim=1)


def with_read(tree: Tree, told: torch.Tensor) -> Tree:
    """The trees with what `packed` told of them on the host, by one read."""
    size = tree.tokens.shape[1]
    sizes = [1, *[size] * ((told.shape[1] - 1) // size)]
    num_nodes, *parts = told.cpu().split(sizes, dim=1)
    parents, scores, *rest = parts
    return replace(
        tree,
        num_nodes=num_nodes.long().squeeze(1),
        parents=parents.long(),
        scores=scores.float(),
        draft_rows=None if tree.draft_rows is None else rest[0].long(),
        lookup=None if tree.lookup is None else rest[-1].bool(),
    )


def ancestor_matrix(parents: torch.Tensor, max_depth: int) -> torch.Tensor:
    """Bool `[B, N, N]`: entry (i, j) says that node j is an ancestor of node i, or i itself.

    Paths double in length at every step, so a tree of depth D takes log2(D) products.

    Args:
        parents: int64 `[B, N]`, -1 for roots.
        max_depth: no node lies deeper.
    """
    batch, num_nodes = parents.shape
    # float: small integer products are exact, and matrix products of bool do not exist
    reach = torch.eye(num_nodes, device=parents.device).repeat(batch, 1, 1)
    has_parent = (parents >= 0).to(reach.dtype).unsqueeze(2)
    reach.scatter_add_(2, parents.clamp_min(0).unsqueeze(2), has_parent)
    length = 1
    while length < max_depth:
        reach = torch.bmm(reach, reach).clamp_max_(1.0)
        length *= 2
    return reach > 0


def ancestors_on_host(parents: np.ndarray) -> np.ndarray:
    """`ancestor_matrix` of an array, by fewer calls: every node takes over what its ancestor
    sees, then jumps to that one's, so that a tree of depth D takes log2(D) steps."""
    batch, num_nodes = parents.shape
    # one spare node that sees nothing stands for "no parent"
    spare = batch * num_nodes
    places = parents if batch == 1 else parents + np.arange(0, spare, num_nodes)[:, None]
    jump = np.full(spare + 1, spare)
    jump[:spare] = np.where(parents < 0, spare, places).ravel()
    reach = np.zeros((spare + 1, num_nodes), bool)
    own = np.arange(spare)
    reach[own, own % num_nodes] = True
    while jump.min() < spare:
        reach |= reach[jump]
        jump = jump[jump]
    return reach[:spare].reshape(batch, num_nodes, num_nodes)


def pack_bits(visible: torch.Tensor) -> torch.Tensor:
    """Bool `[B, N, T]` as int32 words `[B, N, ceil(T/32)]`; bit j % 32 of word j // 32 is column
    j."""
    words = F.pad(visible, (0, -visible.shape[2] % 32)).unflatten(2, (-1, 32)).long()
    packed = (words << torch.arange(32, device=visible.device)).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def sibling_counts(
    parent_scores: torch.Tensor, logprobs: torch.Tensor, limit: int
) -> torch.Tensor:
    """How many children to draw for each node of a level, decided before any is drawn.

    The j-th sibling is worth the parent's probability times what the j - 1 likeliest tokens leave;
    the `limit` worthiest of the level are drawn. Nothing that was drawn on this level enters, so
    every draw keeps its distribution (docs/design/006-drawn-siblings.md).

    Args:
        parent_scores: float32 `[B, F]` cumulative log-probabilities.
        logprobs: float32 `[B, F, K]` of each node's likeliest tokens, in their order.
        limit: most of the level.

    Returns:
        int64 `[B, F]`.
    """
    likeliest = logprobs.exp()
    left = (1 - (likeliest.cumsum(2) - likeliest)).clamp_min_(1e-9)
    worth = (parent_scores.unsqueeze(2) + left.log_()).nan_to_num_(nan=_EMPTY)
    flat = worth.flatten(1)
    chosen = flat.sort(dim=1, descending=True, stable=True).indices[:, :limit]
    drawn = torch.zeros_like(flat, dtype=torch.long).scatter_(1, chosen, 1)
    return drawn.view(worth.shape).sum(2)


class Growth:
    """Candidate nodes of one round, in one pool per row; node 0 is the root.

    Args:
        root_tokens: int64 `[B]`, the last committed token of every row.
        implementation: of the ops: "auto", "triton" or "torch".

    Attributes:
        frontier: int64 `[B, F]`, the nodes whose children come next.
        frontier_scores: float32 `[B, F]` their cumulative log-probabilities, -inf where there is no
            node.
    """

    def __init__(self, root_tokens: torch.Tensor, implementation: str = "auto") -> None:
        batch, device = root_tokens.shape[0], root_tokens.device
        self._implementation = implementation
        self.tokens = torch.zeros(batch, _POOL, dtype=torch.long, device=device)
        self.tokens[:, 0] = root_tokens
        self.parents = torch.full((batch, _POOL), -1, dtype=torch.long, device=device)
        self.scores = torch.zeros(batch, _POOL, device=device)
        self.count = 1
        self.num_lookups = 0
        self._level_start = 1
        self.frontier = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.frontier_scores = self.scores[:, :1]
        self._draft_rows: torch.Tensor | None = None
        self._draft_visible: torch.Tensor | None = None
        self._probs: tuple[torch.Tensor, ...] = ()
        self._prob_rows: torch.Tensor | None = None

    def all_scores(self) -> torch.Tensor:
        """float32 `[B, C]` cumulative log-probabilities of all candidates, -inf for empty
        places."""
        return self.scores[:, : self.count]

    def lookup_scores(self) -> torch.Tensor:
        """Those of the looked-up nodes, `[B, M * L]`; no column without lookups."""
        return self.scores[:, 1 : 1 + self.num_lookups]

    def _append(self, tokens: torch.Tensor, parents: torch.Tensor, scores: torch.Tensor) -> None:
        end = self.count + tokens.shape[1]
        while end > self.tokens.shape[1]:
            more = (0, self.tokens.shape[1])
            self.tokens, self.scores = F.pad(self.tokens, more), F.pad(self.scores, more)
            self.parents = F.pad(self.parents, more, value=-1)
            if self._draft_rows is not None:
                self._draft_rows = F.pad(self._draft_rows, more, value=-1)
            if self._prob_rows is not None:
                self._prob_rows = F.pad(self._prob_rows, more)
        place = slice(self.count, end)
        self.tokens[:, place] = tokens
        self.parents[:, place] = parents
        self.scores[:, place] = scores
        self._level_start, self.count = self.count, end

    def add_lookups(self, continuations: torch.Tensor, weights: torch.Tensor) -> None:
        """Adds continuations of the committed text as a trie. At most once, before any level.

        Args:
            continuations: int64 `[B, M, L]`, -1 padded.
            weights: float32 `[B, L]`, the chances that a row's tokens so far are right, up to each
                place; above 0.
        """
        num, self._lookup_length = continuations.shape[1:]
        parents, fresh, share = ops.merge_continuations(
            continuations, implementation=self._implementation
        )
        scores = (share * weights.unsqueeze(1)).log_().masked_fill_(~fresh, _EMPTY)
        self.num_lookups = num * self._lookup_length
        self._append(
            continuations.flatten(1).clamp_min(0), parents.flatten(1) + 1, scores.flatten(1)
        )
        self._level_start = self.count

    def begin_levels(self, max_rows: int, root_row: torch.Tensor, chain: torch.Tensor) -> None:
        """Prepares for a draft that forwards nodes as rows of its cache.

        Args:
            max_rows: rows the draft may use this round.
            root_row: int64 `[B]`, the draft's row of the root.
            chain: bool `[B, R]`, the rows of this round's first forward that precede or hold the
                root.
        """
        batch, device = root_row.shape[0], root_row.device
        if self.num_lookups:
            depths = torch.arange(1, self._lookup_length + 1, device=device)
            self._lookup_depths = depths.repeat(self.num_lookups // self._lookup_length)
        self._draft_rows = torch.full(self.tokens.shape, -1, dtype=torch.long, device=device)
        self._draft_rows[:, 0] = root_row
        self._draft_visible = torch.zeros(
            batch, max_rows, max_rows, dtype=torch.bool, device=device
        )
        index = root_row.view(batch, 1, 1).expand(-1, 1, chain.shape[1])
        self._draft_visible.scatter_(1, index, chain.unsqueeze(1))

    def expand(
        self, tokens: torch.Tensor, scores: torch.Tensor, probs: torch.Tensor | None = None
    ) -> None:
        """Gives every node of the frontier children; those that a lookup had proposed are merged.

        Args:
            tokens: int64 `[B, F, K]`; anything where there is no child.
            scores: float32 `[B, F, K]` cumulative log-probabilities, -inf where there is no child.
            probs: float32 `[B, F, V]` what the children were drawn from, if they were.
        """
        if probs is not None:
            self._remember(probs)
        parents = self.frontier.unsqueeze(2).expand_as(tokens).flatten(1)
        tokens, scores = tokens.flatten(1).clamp_min(0), scores.flatten(1)
        if self.num_lookups:
            scores = self._merge_with_lookups(tokens, parents, scores)
        self._append(tokens, parents, scores)

    def _remember(self, probs: torch.Tensor) -> None:
        """Keeps what the frontier's children were drawn from."""
        if self._prob_rows is None:
            self._prob_rows = torch.zeros_like(self.parents)
        first = sum(rows.shape[1] for rows in self._probs)
        rows = torch.arange(first, first + probs.shape[1], device=probs.device)
        self._prob_rows.scatter_(1, self.frontier, rows.expand_as(self.frontier))
        self._probs += (probs,)

    def _merge_with_lookups(
        self, tokens: torch.Tensor, parents: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """Where a new child repeats a lookup's node, that node takes the better score and the child
        vanishes."""
        place = slice(1, 1 + self.num_lookups)
        known = self.scores[:, place]
        same = (tokens.unsqueeze(2) == self.tokens[:, place].unsqueeze(1)) & (
            known > _EMPTY
        ).unsqueeze(1)
        same &= parents.unsqueeze(2) == self.parents[:, place].unsqueeze(1)
        better = torch.where(same, scores.unsqueeze(2), _EMPTY).amax(1)
        torch.maximum(known, better, out=known)
        return scores.masked_fill(same.any(2), _EMPTY)

    def choose_frontier(self, depth: int, width: int, min_score: float) -> torch.Tensor:
        """The likeliest nodes of a level that the draft can expand; those it cannot are empty.

        Args:
            depth: level of the nodes.
            width: most nodes, F.
            min_score: cumulative log-probability below which a node is not expanded.

        Returns:
            float32 `[B, F]` scores, -inf where there is no node; the nodes are `frontier`.
        """
        scores, shift = self.scores[:, self._level_start : self.count], self._level_start
        if self.num_lookups:
            parent_rows = self._draft_rows.gather(1, self.parents[:, 1 : 1 + self.num_lookups])
            hidden = (self._lookup_depths != depth) | (parent_rows < 0)
            scores = torch.cat([self.lookup_scores().masked_fill(hidden, _EMPTY), scores], dim=1)
            shift -= self.num_lookups
        best, index = scores.topk(min(width, scores.shape[1]), dim=1)
        if self.num_lookups:
            shift = torch.where(index < self.num_lookups, 1, shift)
        self.frontier = index + shift
        self.frontier_scores = best.masked_fill_(best < min_score, _EMPTY)
        return self.frontier_scores

    def enter_rows(self, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives the frontier the draft rows from `offset` on.

        Returns:
            tokens: int64 `[B, F]`.
            visible: bool `[B, F, offset + F]` for the draft's forward.
        """
        assert self._draft_rows is not None and self._draft_visible is not None
        batch, width = self.frontier.shape
        rows = torch.arange(offset, offset + width, device=self.frontier.device).expand(batch, -1)
        parent_rows = self._draft_rows.gather(1, self.parents.gather(1, self.frontier)).clamp_min_(
            0
        )
        self._draft_rows.scatter_(
            1, self.frontier, rows.masked_fill(self.frontier_scores == _EMPTY, -1)
        )
        size = offset + width
        visible = self._draft_visible.gather(1, parent_rows.unsqueeze(2).expand(-1, -1, size))
        visible.scatter_(2, rows.unsqueeze(2), True)
        self._draft_visible[:, offset:size, :size] = visible
        return self.tokens.gather(1, self.frontier), visible

    def _best_candidates(self) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Places (None for all), scores and parents of the best candidates, as many as
        `ops.select_best_nodes` takes at once.

        A child is never likelier than its parent and never before it, so the best of a stable order
        are closed under ancestors.
        """
        scores, parents = self.all_scores(), self.parents[:, : self.count]
        if self.count <= MAX_CANDIDATES:
            return None, scores, parents
        order = scores.sort(dim=1, descending=True, stable=True).indices
        places = order[:, :MAX_CANDIDATES].sort(dim=1).values
        above = parents.gather(1, places)
        parents = torch.searchsorted(places, above).masked_fill_(above < 0, -1)
        return places, scores.gather(1, places), parents

    def select(self, max_nodes: int, max_depth: int, sizes: tuple[int, ...] = NODE_SIZES) -> Tree:
        """The best `max_nodes` candidates, root included, as a tree; its width is rounded up to a
        common size.

        Args:
            max_nodes: most nodes.
            max_depth: no candidate lies deeper.
            sizes: widths a tree may have.
        """
        most = min(max_nodes, MAX_NODES, self.count)
        # reading how many there are would make a GPU wait
        if self.tokens.device.type == "cpu" and self._implementation != "triton":
            return self._select_on_host(most, sizes)
        places, scores, parents = self._best_candidates()
        chosen = ops.select_best_nodes(scores, parents, most, implementation=self._implementation)
        return self._built(places, chosen, round_up_nodes(most, sizes), max_depth)

    def _built(
        self,
        places: torch.Tensor | None,
        selection: ops.NodeSelection,
        width: int,
        max_depth: int,
    ) -> Tree:
        """The tree of the selected candidates, whose nodes are indices into `places`."""
        chosen, parents, num_nodes = selection
        missing = width - chosen.shape[1]
        if missing:
            chosen, parents = (F.pad(x, (0, missing), value=-1) for x in (chosen, parents))
        absent, kept = chosen < 0, chosen.clamp_min(0)
        if places is not None:
            kept = places.gather(1, kept)
        visible = ancestor_matrix(parents, max_depth)
        draft_rows = lookup = None
        if self._draft_rows is not None:
            draft_rows = self._draft_rows.gather(1, kept).masked_fill_(absent, -1)
        if self.num_lookups:
            # the root stands in for those that are absent
            lookup = (kept >= 1) & (kept <= self.num_lookups)
        return Tree(
            tokens=self.tokens.gather(1, kept).masked_fill_(absent, 0),
            parents=parents,
            depths=visible.sum(2) - 1,
            visible=visible,
            num_nodes=num_nodes,
            scores=self.scores.gather(1, kept).masked_fill_(absent, _EMPTY),
            draft_rows=draft_rows,
            lookup=lookup,
            draft_probs=self._probs_of(kept),
        )

    def _select_on_host(self, most: int, sizes: tuple[int, ...]) -> Tree:
        """The same, no wider than the tree needs: between two forwards all code is cold, and NumPy
        runs through less of it than PyTorch does."""
        worth = self.all_scores().numpy()
        batch, total = worth.shape
        # no child is likelier than its parent, nor before it; the root is taken in any case
        order = np.argsort(-worth[:, 1:], axis=1, kind="stable")[:, : most - 1]
        num_nodes = np.minimum((worth[:, 1:] > _EMPTY).sum(axis=1) + 1, most)
        limit = int(num_nodes.max())
        width = round_up_nodes(limit, sizes)
        absent = np.arange(width) >= num_nodes[:, None]
        kept = np.zeros((batch, width), np.int64)
        kept[:, 1:limit] = order[:, : limit - 1] + 1
        kept[absent] = total
        kept.sort(axis=1)
        rows = np.arange(batch)[:, None]
        # the place of every candidate among them; the last stands for "no parent"
        place = np.full((batch, total + 1), -1)
        place[rows, kept] = np.arange(width)
        place[:, total] = -1
        kept[absent] = 0

        def taken(values: torch.Tensor, missing: float) -> np.ndarray:
            of_nodes = values.numpy()[rows, kept]
            of_nodes[absent] = missing
            return of_nodes

        parents = place[rows, taken(self.parents, -1)]
        visible = ancestors_on_host(parents)
        draft_rows = lookup = None
        if self._draft_rows is not None:
            draft_rows = torch.from_numpy(taken(self._draft_rows, -1))
        if self.num_lookups:
            lookup = torch.from_numpy((kept >= 1) & (kept <= self.num_lookups))
        return Tree(
            tokens=torch.from_numpy(taken(self.tokens, 0)),
            parents=torch.from_numpy(parents),
            depths=torch.from_numpy(visible.sum(2) - 1),
            visible=torch.from_numpy(visible),
            num_nodes=torch.from_numpy(num_nodes),
            scores=torch.from_numpy(taken(self.scores, _EMPTY)),
            draft_rows=draft_rows,
            lookup=lookup,
            draft_probs=self._probs_of(torch.from_numpy(kept)),
        )

    def _probs_of(self, nodes: torch.Tensor) -> torch.Tensor | None:
        """float32 `[B, N, V]` that the children of `nodes` were drawn from, if they were."""
        if self._prob_rows is None:
            return None
        batch = torch.arange(len(nodes), device=nodes.device).unsqueeze(1)
        return torch.cat(self._probs, dim=1)[batch, self._prob_rows.gather(1, nodes)]

