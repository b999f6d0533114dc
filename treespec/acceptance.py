"""From the target's logits on a tree to the path that survives.

`decide` asks one op for all rows and reads its verdict once, or, where no kernel runs, goes down
all trees level by level. `walk` serves logits processors that look at the text: it starts at the
root and picks the target's own token there; while a child carries it, it steps down and picks
again. Every pick sees exactly the tokens that plain decoding would have had, so any processor and
any stopping rule works unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from treespec.sampling import TokenPicker
from treespec.transfer import on_device
from treespec.tree import Tree


@dataclass
class RowText:
    """One row's text, and what it may still become.

    Attributes:
        ids: int64 `[1, W]` buffer of the row's tokens as `target.generate` holds them; written to.
        length: tokens of `ids` that are committed, the root among them.
        position: unpadded position of the token after the root.
        max_tokens: most tokens to pick.
        ends: `(token, ids [1, L]) -> bool`, whether the row ends with `token`, the last of `ids`.
        keep_scores: keep scores and logits of every pick.
        read: whether anything reads `ids`, which are kept up to date only then.
    """

    ids: torch.Tensor
    length: int
    position: int
    max_tokens: int
    ends: Callable[[int, torch.Tensor], bool]
    keep_scores: bool = False
    read: bool = True


@dataclass
class RowVerdict:
    """One row's outcome: `path` of nodes from the root on, `tokens` picked (the last is the bonus
    token).

    `ended` says that the last token met the row's stopping rule. The tree had `num_nodes`, the root
    among them. `draft_rows` are the draft's rows of the path's nodes behind the root, -1 for those
    it had not forwarded.
    """

    path: list[int]
    tokens: list[int]
    ended: bool = False
    num_nodes: int = 1
    draft_rows: list[int] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


def decide(
    logits: torch.Tensor, tree: Tree, picker: TokenPicker, rows: list[RowText]
) -> list[RowVerdict] | None:
    """The verdicts of all rows, cut where a row ends; None where some node of a tree, bare roots
    aside, turned NaN, which may have reached others.

    Args:
        logits: `[B, N, V]` of the target.
        tree: the batch of trees.
        picker: picks tokens; all its processors are `warpers`.
        rows: the rows' texts.

    Raises:
        ValueError: if no token can be picked because scores are NaN or all -inf.
    """
    positions = [text.position for text in rows]
    read = (_followed if picker.follows(tree) else _told)(logits, tree, picker, positions)
    if read is None:
        return None
    verdicts = []
    for row, ((path, tokens, num_nodes, draft_rows), text) in enumerate(zip(read, rows)):
        verdict = _cut(path, tokens, logits[row], picker, row, text)
        verdict.num_nodes = num_nodes
        verdict.draft_rows = draft_rows[: len(verdict.path) - 1]
        verdicts.append(verdict)
    return verdicts


# Of a row: the path, the tokens picked along it, the nodes of its tree, and the draft's rows of
# those of the path behind the root.
_Read = tuple[list[int], list[int], int, list[int]]


def _told(
    logits: torch.Tensor, tree: Tree, picker: TokenPicker, positions: list[int]
) -> list[_Read] | None:
    """What one op found, None if a node turned NaN."""
    # the one host read of a round
    told = picker.told(logits, tree, positions).tolist()
    size = tree.tokens.shape[1]
    if size > 1 and any(values[-1] for values in told):
        return None
    read = []
    for values in told:
        accepted, bonus, num_nodes = values[:3]
        path, carried = values[3 : 4 + accepted], values[4 + size : 4 + size + accepted]
        draft_rows = [] if tree.draft_rows is None else values[4 + 2 * size :][:accepted]
        read.append((path, [*carried, bonus], num_nodes, draft_rows))
    return read


def _followed(
    logits: torch.Tensor, tree: Tree, picker: TokenPicker, positions: list[int]
) -> list[_Read] | None:
    """The same, found level by level."""
    if tree.tokens.shape[1] > 1 and bool(logits[..., 0].isnan().any()):
        return None
    paths, picked = picker.follow(logits, tree, positions)
    drafted: list[list[int]] = [[] for _ in paths]
    if tree.draft_rows is not None:
        of_nodes = tree.draft_rows.tolist()
        drafted = [[rows[node] for node in path[1:]] for rows, path in zip(of_nodes, paths)]
    return list(zip(paths, picked, tree.num_nodes.tolist(), drafted))


def _cut(
    path: list[int],
    tokens: list[int],
    logits: torch.Tensor,
    picker: TokenPicker,
    row: int,
    text: RowText,
) -> RowVerdict:
    """Writes a path's tokens down, up to the first that ends the row."""
    if tokens[-1] < 0:
        raise picker.cannot_pick(logits[path[-1]], text.position + len(path) - 1)
    count = min(len(tokens), text.max_tokens)
    if text.read:
        written = on_device(tokens[:count], text.ids.device)
        text.ids[0, text.length : text.length + count] = written
    verdict = RowVerdict(path=[], tokens=[])
    for step in range(count):
        verdict.path.append(path[step])
        verdict.tokens.append(tokens[step])
        if text.keep_scores:
            place = text.length + step
            scores = picker.scores(text.ids[:, :place], logits[path[step]], row)
            _keep(verdict, scores, logits[path[step]])
        verdict.ended = text.ends(tokens[step], text.ids[:, : text.length + step + 1])
        if verdict.ended:
            break
    return verdict


def walk(
    logits: torch.Tensor, tree: Tree, row: int, picker: TokenPicker, text: RowText
) -> RowVerdict:
    """Follows the target's tokens down one row's tree.

    Args:
        logits: `[N, V]` of the row's nodes.
        tree: the batch of trees.
        row: the row.
        picker: picks tokens.
        text: the row's text.
    """
    tokens, parents = tree.tokens[row].numpy(force=True), tree.parents[row].numpy(force=True)
    verdict = RowVerdict(path=[0], tokens=[], num_nodes=int(tree.num_nodes[row]))
    while True:
        step, node = len(verdict.tokens), verdict.path[-1]
        place = text.length + step
        token, scores = picker.pick(text.ids[:, :place], logits[node], row, text.position + step)
        text.ids[0, place] = token
        verdict.tokens.append(token)
        if text.keep_scores:
            _keep(verdict, scores, logits[node])
        # asked at once: processors and stopping rules must not see what plain decoding would not
        # have written
        verdict.ended = text.ends(token, text.ids[:, : place + 1])
        if verdict.ended or step + 1 >= text.max_tokens:
            break
        children = np.flatnonzero((parents == node) & (tokens == token))
        if len(children) == 0:
            break
        verdict.path.append(int(children[0]))
    if tree.draft_rows is not None:
        verdict.draft_rows = tree.draft_rows[row].numpy(force=True)[verdict.path[1:]].tolist()
    return verdict


def _keep(verdict: RowVerdict, scores: torch.Tensor, logits: torch.Tensor) -> None:
    verdict.scores.append(scores.to(torch.float32, copy=True))
    verdict.logits.append(logits[None].to(torch.float32, copy=True))
