"""Truth for drafting: one parent, one token at a time, in Python numbers (re-exported by
``reference``).
"""

from __future__ import annotations

import math

import torch

from .drafting_rules import LEAST_LOGPROB
from .reference_acceptance import token_noise, warped_probs


def draft_children(
    logits: torch.Tensor,
    cum_logprobs: torch.Tensor,
    num_children: int,
    *,
    drafting: str = "top",
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    sharpness: float | torch.Tensor = 1.0,
    breadth: torch.Tensor | None = None,
    min_logprob: float = -math.inf,
    seed: int | torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    nodes: torch.Tensor | None = None,
    root_positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort the whole vocabulary of every parent; log-softmax in float64, ranks by float32."""
    batch, frontier, _ = logits.shape
    tokens = torch.full((batch, frontier, num_children), -1)
    logprobs = torch.full((batch, frontier, num_children), -math.inf)
    for b in range(batch):
        settings = [_row_value(value, b) for value in (temperature, top_k, top_p, min_p)]
        for parent in range(frontier):
            above = float(cum_logprobs[b, parent])
            if not (above > -math.inf and above >= min_logprob):
                continue
            stream = 0
            place = None
            if drafting == "coupled":
                place = int(positions[b, parent])
            elif drafting == "sampled":
                place = int(nodes[b, parent])
                stream = 4 * int(root_positions[b]) + 1
            noise = torch.zeros(logits.shape[2])
            if place is not None:
                row = b if rows is None else int(rows[b])
                key = _row_value(seed, b)
                for token in range(logits.shape[2]):
                    noise[token] = token_noise(key, row, place, token, stream)
            most = num_children if breadth is None else min(num_children, int(breadth[b, parent]))
            factor = _row_value(sharpness, b)
            children = _children(logits[b, parent], settings, factor, noise, drafting)
            for slot, (token, logprob) in enumerate(children[: max(most, 0)]):
                tokens[b, parent, slot] = token
                logprobs[b, parent, slot] = above + logprob
    return tokens, logprobs


def _children(
    logits: torch.Tensor, settings: list, sharpness: float, noise: torch.Tensor, drafting: str
) -> list[tuple[int, float]]:
    """All tokens, the first child first, and their log-probabilities; -1 for one that cannot be."""
    if bool((logits == math.inf).any()):
        return []
    probs = warped_probs(logits.double().tolist(), *settings)
    if probs is None:
        return []
    scaled = logits.float() / settings[0]
    scaled[torch.tensor(probs) == 0] = -math.inf
    scores = (scaled + noise if drafting == "coupled" else scaled) * sharpness
    logprobs = torch.log_softmax(scores.double(), 0).tolist()
    ranks = (scores + noise if drafting == "sampled" else scores).tolist()
    order = sorted(range(len(ranks)), key=lambda token: (-ranks[token], token))
    return [
        (token, logprobs[token]) if logprobs[token] >= LEAST_LOGPROB else (-1, -math.inf)
        for token in order
    ]


def _row_value(value, row: int):
    return value[row].item() if isinstance(value, torch.Tensor) else value
