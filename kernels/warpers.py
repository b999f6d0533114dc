"""Temperature, top-k, top-p and min-p as one cut: a token stays when its scaled logit reaches a
threshold.

Each filter keeps the tokens at or above some value, so the three together keep those above the
greatest of three values, and nothing need be sorted back or masked beyond finding it. Equal logits
pass or fail together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch


class Warpers(NamedTuple):
    """The warpers of a batch, each a number or a tensor [B].

    ``temperature`` is positive; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off.
    """

    temperature: float | torch.Tensor = 1.0
    top_k: int | torch.Tensor = 0
    top_p: float | torch.Tensor = 1.0
    min_p: float | torch.Tensor = 0.0

    def rows(self, indices: Sequence[int]) -> Warpers:
        """The warpers of some rows: numbers stay, tensors become [K, 1]."""
        return Warpers(*(x[indices, None] if isinstance(x, torch.Tensor) else x for x in self))

    def active(self, name: str) -> bool:
        """Whether a filter may cut anything."""
        value = getattr(self, name)
        return isinstance(value, torch.Tensor) or value != Warpers._field_defaults[name]


def warped_scores(logits: torch.Tensor, warpers: Warpers) -> torch.Tensor:
    """Scaled logits with -inf for every token that is cut.

    Args:
        logits: float32 or float64 [K, V].
        warpers: of K rows, as ``Warpers.rows`` gives them.

    Returns:
        [K, V], undefined for a row with NaN or nothing above -inf.
    """
    scores = logits / warpers.temperature
    if not any(warpers.active(name) for name in ("top_k", "top_p", "min_p")):
        return scores
    return scores.masked_fill(scores < cut(scores, warpers), -float("inf"))


def cut(scores: torch.Tensor, warpers: Warpers) -> torch.Tensor:
    """The least scaled logit that stays, [K, 1]."""
    if warpers.active("top_k") or warpers.active("top_p"):
        descending, threshold = _top(scores, warpers.top_k)
    else:
        threshold = scores.new_full((len(scores), 1), -float("inf"))
    if warpers.active("top_p"):
        # A token stays while less than top_p lies strictly before it; the first always does.
        kept = scores.masked_fill(scores < threshold, -float("inf"))
        probs = (descending - kept.logsumexp(1, keepdim=True)).exp()
        before = probs.cumsum(1) - probs
        places = (before < torch.as_tensor(warpers.top_p)).sum(1, keepdim=True).clamp(min=1)
        threshold = torch.maximum(threshold, descending.gather(1, places - 1))
    if warpers.active("min_p"):
        log_min_p = torch.as_tensor(warpers.min_p).to(scores).log()
        threshold = torch.maximum(threshold, scores.amax(1, keepdim=True) + log_min_p)
    return threshold


def _top(scores: torch.Tensor, top_k: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest scores of every row, descending, and the one that top-k keeps last, [K, 1]."""
    count = scores.shape[1]
    if not isinstance(top_k, torch.Tensor):
        descending = _greatest(scores, min(int(top_k) or count, count))
        return descending, descending[:, -1:]
    top_k = torch.where(top_k > 0, top_k, count).clamp(max=count).long()
    descending = _greatest(scores, int(top_k.max()) if len(top_k) else 1)
    return descending, descending.gather(1, top_k - 1)


def _greatest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The greatest of every row, descending, [K, count]."""
    if scores.device.type != "cpu":
        return scores.topk(count).values
    # NumPy sorts with vector instructions, many times faster.
    values, others = scores.detach().numpy(), scores.shape[1] - count
    if others:
        values = np.partition(values, others, axis=1)[:, others:]
    return torch.from_numpy(np.sort(values, axis=1)[:, ::-1].copy())
