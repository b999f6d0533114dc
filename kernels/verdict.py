"""What the ops hand back: the verdict of a round and a selection of nodes."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Verdict(NamedTuple):
    """The outcome of verifying one batch of trees.

    Attributes:
        path: int64 [B, N], the accepted nodes from the root (node 0) on, padded with -1.
        accept_length: int64 [B], the accepted draft tokens: neither the root nor the bonus token
            counts.
        bonus_token: int64 [B], the target's own token after the path; -1 flags a row whose decision
            met a row of logits with NaN or with nothing above -inf, or a row without nodes.
    """

    path: torch.Tensor
    accept_length: torch.Tensor
    bonus_token: torch.Tensor


class NodeSelection(NamedTuple):
    """A choice of candidates that is closed under ancestors.

    Attributes:
        nodes: int64 [B, max_nodes], candidate indices in ascending order, so parents come first;
            padded with -1.
        parents: int64 [B, max_nodes], the place of each node's parent in ``nodes``; -1 for a node
            without parent and for padding.
        num_nodes: int64 [B], how many were selected.
    """

    nodes: torch.Tensor
    parents: torch.Tensor
    num_nodes: torch.Tensor
