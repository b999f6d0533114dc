"""Readable truth for every kernel: plain PyTorch, one idea per line, no Triton.

Each function has the signature of its namesake in ``ops`` and works in any precision, float64
included. Nothing here is tuned; the kernels and the fast PyTorch paths are tested against it.
"""

from __future__ import annotations

import torch

from .reference_acceptance import gumbel_noise as gumbel_noise
from .reference_acceptance import verify_greedy as verify_greedy
from .reference_acceptance import verify_sampled as verify_sampled
from .reference_drafting import draft_children as draft_children
from .reference_trees import ancestor_bits as ancestor_bits
from .reference_trees import append_rotary as append_rotary
from .reference_trees import compact_kv as compact_kv
from .reference_trees import match_ngrams as match_ngrams
from .reference_trees import merge_continuations as merge_continuations
from .reference_trees import node_depths as node_depths
from .reference_trees import select_best_nodes as select_best_nodes


def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    ancestor_bits: torch.Tensor,
    prefix_lens: torch.Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    depths: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of N tree nodes over the committed prefix and each node's ancestors.

    One sequence, one head and one node at a time: the keys a node sees are gathered by index, so
    nothing else is read. Works in the dtype of ``q``; pass float64 tensors for the truth. Arguments
    and result as in ``ops.tree_attention``.
    """
    batch, q_heads, num_nodes, head_dim = q.shape
    group = q_heads // k_cache.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    out = q.new_zeros(batch, num_nodes, q_heads, v_cache.shape[-1])
    for b in range(batch):
        prefix = int(prefix_lens[b])
        words = ancestor_bits[b].tolist()
        for i in range(num_nodes):
            ancestors = [j for j in range(num_nodes) if words[i][j // 32] >> (j % 32) & 1]
            slots = torch.tensor(
                [*range(prefix), *(prefix + j for j in ancestors)], dtype=torch.long
            )
            tree_depths = (
                [0] * len(ancestors) if depths is None else [int(depths[b, j]) for j in ancestors]
            )
            positions = torch.tensor(
                [*range(prefix), *(prefix + depth for depth in tree_depths)], dtype=torch.long
            )
            distance = (prefix + (0 if depths is None else int(depths[b, i]))) - positions
            if sliding_window is not None:
                slots, distance = (
                    slots[distance < sliding_window],
                    distance[distance < sliding_window],
                )
            for h in range(q_heads):
                keys, values = k_cache[b, h // group, slots], v_cache[b, h // group, slots]
                scores = (keys @ q[b, h, i]) * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if alibi_slopes is not None:
                    scores = scores - alibi_slopes[h].to(scores) * distance.to(scores)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h].to(scores).reshape(1)])
                probs = torch.softmax(scores, dim=0)[: len(slots)]
                out[b, i, h] = probs @ values
    return out
