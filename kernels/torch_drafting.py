"""Drafting without Triton, on a CPU and on devices Triton does not serve."""

from __future__ import annotations

import numpy as np
import torch

from .drafting_rules import LEAST_LOGPROB
from .noise import DRAFT_STREAM, SHARED_STREAM
from .torch_acceptance import gumbel_noise
from .warpers import Warpers, warped_scores

_LEAST_FLOAT = torch.finfo(torch.float32).min
# Top-k that leaves less than this part of the vocabulary is worth a selection of its own.
_FEW = 8


def draft_children(
    logits: torch.Tensor,
    cum_logprobs: torch.Tensor,
    num_children: int,
    drafting: str,
    warpers: Warpers,
    sharpness: float | torch.Tensor,
    breadth: torch.Tensor | None,
    min_logprob: float,
    seed: int | torch.Tensor | None,
    rows: torch.Tensor | None,
    places: torch.Tensor | None,
    root_positions: torch.Tensor | None,
    noise: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.draft_children``; arguments are checked, and ``places`` are positions or nodes."""
    batch, frontier, vocab_size = logits.shape
    device = logits.device
    if drafting != "top" and noise is None:
        stream = SHARED_STREAM
        if drafting == "sampled":
            stream = 4 * root_positions.long() + DRAFT_STREAM
        noise = gumbel_noise(seed, rows, places, vocab_size, stream)
    scores, tokens = _warped(logits.detach().float(), warpers)
    if tokens is not None and noise is not None:
        noise = noise.expand(batch, frontier, -1).gather(2, tokens)
    if drafting == "coupled":
        scores = scores + noise
    if isinstance(sharpness, torch.Tensor):
        scores = scores * sharpness.view(batch, 1, 1)
    elif sharpness != 1.0:
        scores = scores * sharpness
    logprobs = torch.log_softmax(scores, -1)
    ranks = scores + noise if drafting == "sampled" else scores
    width = scores.shape[2]
    count = min(num_children, width)
    best = best_tokens(ranks.reshape(-1, width), count)
    chosen = torch.from_numpy(best).to(device)
    values = logprobs.view(-1, width).gather(1, chosen).cpu().numpy()
    if tokens is not None:
        best = tokens.view(-1, width).gather(1, chosen).cpu().numpy()
    above = cum_logprobs.detach().float().reshape(-1, 1).cpu().numpy()
    # NaN, of a draft or of a place without a node, compares as false.
    alive = (values >= LEAST_LOGPROB) & (above >= max(min_logprob, _LEAST_FLOAT))
    if breadth is not None:
        alive &= np.arange(count) < breadth.reshape(-1, 1).cpu().numpy()
    children = np.full((batch * frontier, num_children), -1)
    totals = np.full((batch * frontier, num_children), -np.inf, np.float32)
    np.copyto(children[:, :count], best, where=alive)
    np.add(values, above, out=totals[:, :count], where=alive)
    shape = (batch, frontier, num_children)
    return tuple(torch.from_numpy(x).view(shape).to(device) for x in (children, totals))


def _warped(
    scores: torch.Tensor, warpers: Warpers
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scores [B, F, K] after temperature and filters, and their tokens where only some of the
    vocabulary is left to look at, ascending; None for all of it.
    """
    if not any(warpers.active(name) for name in Warpers._fields):
        return scores, None
    shape = scores.shape[:2]
    parents = np.repeat(np.arange(shape[0]), shape[1])
    warpers = Warpers(
        *(x.to(scores.device) if isinstance(x, torch.Tensor) else x for x in warpers)
    ).rows(parents)
    scores = scores.flatten(0, 1) / warpers.temperature
    tokens = _within_top_k(scores, warpers.top_k)
    left = warpers._replace(temperature=1.0)
    if tokens is not None:
        scores, left = scores.gather(1, tokens), left._replace(top_k=0)
        tokens = tokens.unflatten(0, shape)
    return warped_scores(scores, left).unflatten(0, shape), tokens


def _within_top_k(scores: torch.Tensor, top_k: int | torch.Tensor) -> torch.Tensor | None:
    """The tokens [R, top_k] that top-k leaves, ascending; None where looking at all of them is as
    quick, or equal scores pass together.
    """
    if isinstance(top_k, torch.Tensor) or not 0 < top_k < scores.shape[1] // _FEW:
        return None
    values, tokens = scores.topk(int(top_k) + 1)
    last, next_best = values[:, -2], values[:, -1]
    if bool(((last == next_best) & (last > -float("inf"))).any()):
        return None
    return tokens[:, :-1].sort(1).values


def best_tokens(scores: torch.Tensor, count: int) -> np.ndarray:
    """The indices of the greatest of every row; ties go to the lower index, which ``torch.topk``
    does not promise.

    Args:
        scores: float32 [R, V].
        count: at most V.

    Returns:
        int64 [R, count]; in no order where scores are -inf, undefined for a row with NaN.
    """
    # One more than wanted shows a tie at the end.
    values, indices = (
        x.cpu().numpy() for x in scores.topk(min(count + 1, scores.shape[1]), 1)
    )
    best = np.ascontiguousarray(indices[:, :count])
    ties = values[:, 1:] == values[:, :-1]
    if ties.any():
        ties &= values[:, 1:] > -np.inf
        for row in np.flatnonzero(ties.any(1)):
            line = scores[row].cpu().numpy()
            real = np.count_nonzero(values[row, :count] > -np.inf)
            found = np.flatnonzero(line >= values[row, real - 1])
            best[row, :real] = found[np.argsort(-line[found], kind="stable")[:real]]
    return best
