"""One batch of trees: growing candidate nodes level by level, merging lookups as a trie, selecting the best.

A `Growth` collects candidates of all rows in step (same count for every row, `-inf` marks an empty place), parents
always before children. `select` cuts it down to the `Tree` that is verified. No step loops over nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

_EMPTY = float("-inf")


@dataclass
class Tree:
    """Trees ready to be verified; node 0 is the root, parents come before children, places beyond are padding.

    Attributes:
        tokens: int64 `[B, N]`.
        parents: int64 `[B, N]`; -1 for the root and for padding.
        depths: int64 `[B, N]`.
        visible: bool `[B, N, N]`; row i marks the ancestors of node i and itself.
        num_nodes: int64 `[B]`.
        scores: float32 `[B, N]` cumulative log-probabilities; 0 for the root.
        draft_rows: int64 `[B, N]`, the draft's row of a node it has forwarded, else -1; None without a draft model.
        lookup: bool `[B, N]`, nodes that a lookup proposed; None without lookups.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    visible: torch.Tensor
    num_nodes: torch.Tensor
    scores: torch.Tensor
    draft_rows: torch.Tensor | None = None
    lookup: torch.Tensor | None = None


NODE_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256)


def round_up_nodes(count: int) -> int:
    """The next of a few widths, so that few shapes of forwards occur."""
    return next(size for size in NODE_SIZES if size >= count)


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


def pack_bits(visible: torch.Tensor) -> torch.Tensor:
    """Bool `[B, N, T]` as int32 words `[B, N, ceil(T/32)]`; bit j % 32 of word j // 32 is column j."""
    words = F.pad(visible, (0, -visible.shape[2] % 32)).unflatten(2, (-1, 32)).long()
    packed = (words << torch.arange(32, device=visible.device)).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


# How much an occurrence counts among several, the likelier first.
_VOTES = (0.4, 0.25, 0.2, 0.15)


def merge_continuations(continuations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shares common beginnings of continuations, making them a trie.

    Args:
        continuations: int64 `[B, M, L]`, -1 padded.

    Returns:
        parents: int64 `[B, M, L]`; place `m * L + l` of the parent, -1 where the parent is the root.
        fresh: bool `[B, M, L]`; whether the place holds a node of its own.
        share: float32 `[B, M, L]`; the weighted share of continuations that go through the place.
    """
    batch, num, length = continuations.shape
    device = continuations.device
    known = continuations >= 0
    same = ((continuations.unsqueeze(2) == continuations.unsqueeze(1)) & known.unsqueeze(1)).cumprod(-1)
    first = same.argmax(2)  # the first continuation that begins the same way
    order = torch.arange(num, device=device).view(1, num, 1)
    fresh = (first == order) & known
    place = first * length + torch.arange(length, device=device)
    parents = torch.cat([torch.full((batch, num, 1), -1, device=device), place[..., :-1]], dim=2)
    votes = torch.tensor([_VOTES[min(k, len(_VOTES) - 1)] for k in range(num)], device=device)
    total = (votes * known[..., 0]).sum(1).clamp_min_(1e-9)
    share = torch.einsum("bmnl,n->bml", same.to(votes.dtype), votes) / total.view(batch, 1, 1)
    return parents, fresh, share


class Growth:
    """Candidate nodes of one round.

    Args:
        root_tokens: int64 `[B]`, the last committed token of every row.
    """

    def __init__(self, root_tokens: torch.Tensor) -> None:
        batch, device = root_tokens.shape[0], root_tokens.device
        zeros = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.tokens = [root_tokens.view(batch, 1)]
        self.parents = [zeros - 1]
        self.depths = [0]
        self.scores = [torch.zeros(batch, 1, device=device)]
        self.count = 1
        self.num_lookups = 0
        self._sizes = [1]
        self._zeros = zeros
        self._draft_rows: torch.Tensor | None = None
        self._draft_visible: torch.Tensor | None = None

    # --- lookups ------------------------------------------------------------------------------------------------

    def add_lookups(self, continuations: torch.Tensor, first: list[float], later: list[float]) -> None:
        """Adds continuations of the committed text as a trie. At most once, before any level.

        Args:
            continuations: int64 `[B, M, L]`, -1 padded.
            first: per row the chance that one of the first tokens is right.
            later: per row the chance that a token is right when the one before it was.
        """
        batch, num, length = continuations.shape
        device = continuations.device
        parents, fresh, share = merge_continuations(continuations)
        chances = torch.tensor([first, later], device=device).clamp_min_(1e-9).log_().view(2, batch, 1, 1)
        steps = torch.arange(length, device=device)
        scores = (share.log() + chances[0] + steps * chances[1]).masked_fill_(~fresh, _EMPTY)
        self.num_lookups = num * length
        self.tokens.append(continuations.reshape(batch, -1).clamp_min(0))
        self.parents.append((parents + 1).view(batch, -1))
        self.scores.append(scores.view(batch, -1))
        self._sizes.append(self.num_lookups)
        self._lookup_depths = torch.arange(1, length + 1, device=device).repeat(num)
        self.count += self.num_lookups

    # --- levels of a stepwise source ----------------------------------------------------------------------------

    def begin_levels(self, max_rows: int, root_row: torch.Tensor, chain: torch.Tensor) -> None:
        """Prepares for a draft that forwards nodes as rows of its cache.

        Args:
            max_rows: rows the draft may use this round.
            root_row: int64 `[B]`, the draft's row of the root.
            chain: bool `[B, R]`, the rows of this round's first forward that precede or hold the root.
        """
        batch, device = root_row.shape[0], root_row.device
        self._draft_rows = torch.full((batch, self.count), -1, dtype=torch.long, device=device)
        self._draft_rows[:, 0] = root_row
        self._draft_visible = torch.zeros(batch, max_rows, max_rows, dtype=torch.bool, device=device)
        self._draft_visible.scatter_(
            1,
            root_row.view(batch, 1, 1).expand(-1, 1, chain.shape[1]),
            chain.unsqueeze(1),
        )
        self.frontier = self._zeros
        self._frontier_scores = self.scores[0]

    def expand(self, depth: int, logprobs: torch.Tensor, num_children: int, breadth: torch.Tensor | None = None) -> None:
        """Gives every node of the frontier its likeliest children; children that a lookup had proposed are merged.

        Args:
            depth: of the children.
            logprobs: float32 `[B, F, V]` of the frontier.
            num_children: children of each, K.
            breadth: int64 `[B, F]` children to keep of each, at most K; None keeps all.
        """
        batch, width, _ = logprobs.shape
        num_children = min(num_children, logprobs.shape[2])
        values, tokens = logprobs.topk(num_children, dim=-1)
        # a place of the frontier that is not to be expanded has -inf here, whatever its node's score
        scores = self._frontier_scores.unsqueeze(2) + values
        if breadth is not None:
            rank = torch.arange(num_children, device=values.device)
            scores = scores.masked_fill(rank >= breadth.unsqueeze(2), _EMPTY)
        scores, tokens = scores.view(batch, -1), tokens.view(batch, -1)
        parents = self.frontier.repeat_interleave(num_children, dim=1)
        if self.num_lookups:
            scores = self._merge_with_lookups(tokens, parents, scores)
        self.tokens.append(tokens)
        self.parents.append(parents)
        self.scores.append(scores)
        self._sizes.append(tokens.shape[1])
        self.count += tokens.shape[1]

    def _merge_with_lookups(self, tokens: torch.Tensor, parents: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Where a new child repeats a lookup's node, that node takes the better score and the child vanishes."""
        known = self.scores[1] > _EMPTY
        same = (tokens.unsqueeze(2) == self.tokens[1].unsqueeze(1)) & known.unsqueeze(1)
        same &= parents.unsqueeze(2) == self.parents[1].unsqueeze(1)
        better = torch.where(same, scores.unsqueeze(2), _EMPTY).amax(1)
        self.scores[1] = torch.maximum(self.scores[1], better)
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
        start = self.count - self._sizes[-1]
        scores = self.scores[-1]
        if self.num_lookups:
            parent_rows = self._draft_rows.gather(1, self.parents[1])
            eligible = (self._lookup_depths == depth) & (parent_rows >= 0)
            scores = torch.cat([self.scores[1].masked_fill(~eligible, _EMPTY), scores], dim=1)
        best, index = scores.topk(min(width, scores.shape[1]), dim=1)
        if self.num_lookups:
            index = torch.where(index < self.num_lookups, index + 1, index - self.num_lookups + start)
        else:
            index = index + start
        self.frontier = index
        self._frontier_scores = best.masked_fill(best < min_score, _EMPTY)
        return self._frontier_scores

    def enter_rows(self, scores: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives the frontier the draft rows from `offset` on.

        Returns:
            tokens: int64 `[B, F]`.
            visible: bool `[B, F, offset + F]` for the draft's forward.
        """
        batch, width = self.frontier.shape
        device = self.frontier.device
        rows = torch.arange(offset, offset + width, device=device).expand(batch, -1)
        self._draft_rows = F.pad(self._draft_rows, (0, self.count - self._draft_rows.shape[1]), value=-1)
        tokens = self._gather(self.tokens, self.frontier)
        parents = self._gather(self.parents, self.frontier)
        parent_rows = self._draft_rows.gather(1, parents).clamp_min(0)
        self._draft_rows.scatter_(1, self.frontier, torch.where(scores > _EMPTY, rows, -1))
        size = self._draft_visible.shape[2]
        visible = self._draft_visible.gather(1, parent_rows.unsqueeze(2).expand(-1, -1, size))
        visible.scatter_(2, rows.unsqueeze(2), True)
        self._draft_visible[:, offset : offset + width] = visible
        return tokens, visible[:, :, : offset + width]

    # --- selection ----------------------------------------------------------------------------------------------

    def all_scores(self) -> torch.Tensor:
        return torch.cat(self.scores, dim=1)

    def _gather(self, blocks: list[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
        return torch.cat(blocks, dim=1).gather(1, index)

    def select(self, max_nodes: int, max_depth: int) -> Tree:
        """The best `max_nodes` candidates, root included, as a tree; its width is rounded up to a common size.

        A child is never likelier than its parent and never before it, so the best of a stable order are closed
        under ancestors.
        """
        scores = self.all_scores()
        batch, total = scores.shape
        if total > max_nodes:
            order = scores.sort(dim=1, descending=True, stable=True).indices[:, :max_nodes]
            kept = order.sort(dim=1).values
            scores = scores.gather(1, kept)
        else:
            kept = torch.arange(total, device=scores.device).expand(batch, -1)
        present = scores > _EMPTY
        num_nodes = present.sum(1)
        # empty places to the end, the others in their order
        front = (~present).to(torch.int8).sort(dim=1, stable=True).indices
        limit = int(num_nodes.max())
        kept = kept.gather(1, front)[:, :limit]
        present = present.gather(1, front)[:, :limit]
        new_place = torch.zeros(batch, total, dtype=torch.long, device=scores.device)
        new_place.scatter_(1, kept, torch.arange(limit, device=scores.device).expand(batch, -1))
        parents = self._gather(self.parents, kept)
        parents = torch.where(present, new_place.gather(1, parents.clamp_min(0)), -1)
        parents[:, 0] = -1
        padding = round_up_nodes(limit) - limit
        parents = F.pad(parents, (0, padding), value=-1)
        visible = ancestor_matrix(parents, max_depth)
        draft_rows = None
        if self._draft_rows is not None:
            grown = F.pad(self._draft_rows, (0, total - self._draft_rows.shape[1]), value=-1)
            draft_rows = grown.gather(1, kept).masked_fill_(~present, -1)
            draft_rows = F.pad(draft_rows, (0, padding), value=-1)
        lookup = None
        if self.num_lookups:
            lookup = F.pad((kept >= 1) & (kept <= self.num_lookups) & present, (0, padding))
        return Tree(
            tokens=F.pad(self._gather(self.tokens, kept), (0, padding)),
            parents=parents,
            depths=visible.sum(2) - 1,
            visible=visible,
            num_nodes=num_nodes,
            scores=F.pad(scores.gather(1, front)[:, :limit], (0, padding), value=_EMPTY),
            draft_rows=draft_rows,
            lookup=lookup,
        )
