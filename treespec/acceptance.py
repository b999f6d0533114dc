"""From the target's logits on a tree to the path that survives.

The walk starts at the root and picks the target's own token there; while a child carries it, it
steps down and picks again. Every pick sees exactly the tokens that plain decoding would have had,
so any logits processor and any stopping rule works unchanged, and logits of nodes off the path are
never looked at. The picks of a path number its length, not the tree's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from treespec.sampling import TokenPicker
from treespec.tree import Tree


@dataclass
class RowVerdict:
    """One row's outcome: `path` of nodes from the root on, `tokens` picked (the last is the bonus
    token).

    `ended` says that the last token met the row's stopping rule.
    """

    path: list[int]
    tokens: list[int]
    ended: bool = False
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


def walk(
    logits: torch.Tensor,
    tree: Tree,
    row: int,
    picker: TokenPicker,
    ids: torch.Tensor,
    length: int,
    position: int,
    max_tokens: int,
    ends: Callable[[int, torch.Tensor], bool],
    keep_scores: bool = False,
) -> RowVerdict:
    """Follows the target's tokens down one row's tree.

    Args:
        logits: `[N, V]` of the row's nodes.
        tree: the batch of trees.
        row: the row.
        picker: picks tokens.
        ids: int64 `[1, W]` buffer of the row's tokens as `target.generate` holds them; written to.
        length: tokens of `ids` that are committed, the root among them.
        position: unpadded position of the token after the root.
        max_tokens: most tokens to pick.
        ends: `(token, ids [1, L]) -> bool`, whether the row ends with `token`, the last of `ids`.
        keep_scores: keep scores and logits of every pick.
    """
    tokens, parents = tree.tokens[row].numpy(force=True), tree.parents[row].numpy(force=True)
    verdict = RowVerdict(path=[0], tokens=[])
    while True:
        step, node = len(verdict.tokens), verdict.path[-1]
        token, scores = picker.pick(ids[:, : length + step], logits[node], row, position + step)
        ids[0, length + step] = token
        verdict.tokens.append(token)
        if keep_scores:
            verdict.scores.append(scores.to(torch.float32, copy=True))
            verdict.logits.append(logits[node][None].to(torch.float32, copy=True))
        # asked at once: processors and stopping rules must not see what plain decoding would not
        # have written
        verdict.ended = ends(token, ids[:, : length + step + 1])
        if verdict.ended or step + 1 >= max_tokens:
            return verdict
        children = np.flatnonzero((parents == node) & (tokens == token))
        if len(children) == 0:
            return verdict
        verdict.path.append(int(children[0]))
