"""The tree ops without Triton: batched PyTorch, and NumPy where it is the quicker of the two on a
host.

These run on a CPU and on devices Triton does not serve. Arguments are those of the namesakes in
``ops``, already checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .verdict import NodeSelection


def host_array(values: torch.Tensor) -> np.ndarray:
    """``values`` as a NumPy array, without a copy where it lies in host memory."""
    return values.detach().cpu().numpy()


def ancestor_bits(parents: torch.Tensor, num_nodes: torch.Tensor) -> torch.Tensor:
    """See ``ops.ancestor_bits``; pointer doubling, so the passes are the logarithm of the depth."""
    parent_array, counts = host_array(parents), host_array(num_nodes)
    batch, capacity = parent_array.shape
    width = -(-capacity // 32)
    index = np.arange(capacity)
    present = index < counts[:, None]
    # One spare node without bits stands for "no parent".
    spare = batch * capacity
    bits = np.zeros((spare + 1, width), np.uint32)
    bits[:spare].reshape(batch, capacity, width)[:, index, index // 32] = np.where(
        present, np.uint32(1) << (index % 32).astype(np.uint32), np.uint32(0)
    )
    offsets = (np.arange(batch) * capacity)[:, None]
    jump = np.append(
        np.where(present & (parent_array >= 0), parent_array + offsets, spare).ravel(), spare
    )
    while jump.min() < spare:
        bits |= bits[jump]
        jump = jump[jump]
    words = bits[:spare].view(np.int32).reshape(batch, capacity, width)
    return torch.from_numpy(words).to(parents.device)


def node_depths(parents: torch.Tensor, num_nodes: torch.Tensor) -> torch.Tensor:
    """See ``ops.node_depths``; pointer doubling."""
    parent_array, counts = host_array(parents), host_array(num_nodes)
    batch, capacity = parent_array.shape
    present = np.arange(capacity) < counts[:, None]
    spare = batch * capacity
    offsets = (np.arange(batch) * capacity)[:, None]
    jump = np.append(
        np.where(present & (parent_array >= 0), parent_array + offsets, spare).ravel(), spare
    )
    depths = (jump < spare).astype(np.int64)
    while jump.min() < spare:
        depths += depths[jump]
        jump = jump[jump]
    return torch.from_numpy(depths[:spare].reshape(batch, capacity)).to(parents.device)


def select_best_nodes(
    cum_logprobs: torch.Tensor, parents: torch.Tensor, max_nodes: int
) -> NodeSelection:
    """See ``ops.select_best_nodes``."""
    scores = np.nan_to_num(
        host_array(cum_logprobs.float()), nan=-np.inf, posinf=np.inf, neginf=-np.inf
    )
    parent_array = host_array(parents).astype(np.int64)
    batch, candidates = scores.shape
    rows = np.arange(batch)[:, None]
    # A node is worth no more than its least ancestor: then the best N always contain their
    # ancestors.
    jump = parent_array
    while (jump >= 0).any():
        above = np.where(jump >= 0, scores[rows, jump], np.inf)
        scores = np.minimum(scores, above)
        jump = np.where(jump >= 0, jump[rows, jump], -1)
    keep = min(max_nodes, candidates)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :keep]
    order = np.sort(np.where(scores[rows, order] > -np.inf, order, candidates), axis=1)
    chosen = order < candidates
    nodes = np.full((batch, max_nodes), -1)
    nodes[:, :keep] = np.where(chosen, order, -1)
    # The place of every candidate in the selection; the spare last column swallows the padding.
    place = np.full((batch, candidates + 1), -1)
    place[rows, order] = np.arange(keep)
    place[:, candidates] = -1
    selected_parents = np.full((batch, max_nodes), -1)
    parent_of = np.where(
        chosen, np.append(parent_array, np.full((batch, 1), -1), axis=1)[rows, order], -1
    )
    selected_parents[:, :keep] = np.where(parent_of >= 0, place[rows, parent_of], -1)
    results = nodes, selected_parents, chosen.sum(axis=1)
    return NodeSelection(
        *(torch.from_numpy(np.ascontiguousarray(x)).to(parents.device) for x in results)
    )


def compact_kv(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    path: torch.Tensor,
    accept_length: torch.Tensor,
    prefix_lens: torch.Tensor,
) -> None:
    """See ``ops.compact_kv``; moves only the rows that change place."""
    path_array, accepted = host_array(path), host_array(accept_length)
    place = np.arange(path_array.shape[1])
    moving = (place <= accepted[:, None]) & (path_array != place) & (path_array >= 0)
    batch_index, places = np.nonzero(moving)
    if batch_index.size == 0:
        return
    starts = host_array(prefix_lens)[batch_index]
    sources = torch.from_numpy(starts + path_array[batch_index, places])
    targets = torch.from_numpy(starts + places)
    # With one sequence a pair of index ops on a view is the shortest way; reading all rows first
    # makes overlaps safe.
    single = path_array.shape[0] == 1
    batches = torch.from_numpy(batch_index)
    devices: dict[torch.device, tuple[torch.Tensor, ...]] = {}
    for pair in layers:
        for cache in pair:
            if cache.device not in devices:
                devices[cache.device] = tuple(
                    x.to(cache.device) for x in (batches, sources, targets)
                )
            b, source, target = devices[cache.device]
            if single:
                view = cache[0]
                view.index_copy_(1, target, view.index_select(1, source))
            else:
                cache[b, :, target] = cache[b, :, source]


def match_ngrams(
    tokens: torch.Tensor,
    lens: torch.Tensor,
    max_ngram: int,
    num_matches: int,
    length: int,
    min_ngram: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.match_ngrams``."""
    lengths = host_array(lens).astype(np.int64)
    batch = lengths.shape[0]
    capacity = max(int(lengths.max(initial=0)), 1)
    history = host_array(tokens)[:, :capacity]
    rows = np.arange(batch)[:, None]
    ends = np.arange(capacity)
    # matched[b, e]: how many tokens up to and including e equal the last ones of the history.
    matched = np.zeros((batch, capacity), np.int64)
    running = ends < (lengths - 1)[:, None]
    for back in range(min(max_ngram, capacity)):
        last = history[rows, np.maximum(lengths - 1 - back, 0)[:, None]]
        same = np.zeros_like(running)
        same[:, back:] = history[:, : capacity - back] == last
        running = running & same
        if not running.any():
            break
        matched += running
    best = matched.max(axis=1)
    shortest = np.maximum(best if min_ngram is None else min_ngram, 1)
    ranks = np.where(matched >= np.reshape(shortest, (-1, 1)), matched * capacity + ends + 1, 0)
    count = min(num_matches, capacity)
    chosen = np.argpartition(-ranks, count - 1, axis=1)[:, :count]
    chosen = np.take_along_axis(chosen, np.argsort(-ranks[rows, chosen], axis=1), axis=1)
    found = ranks[rows, chosen] > 0
    spots = chosen[:, :, None] + 1 + np.arange(length)
    inside = found[:, :, None] & (spots < lengths[:, None, None])
    continuations = np.full((batch, num_matches, length), -1, np.int64)
    gathered = history[rows[:, :, None], np.minimum(spots, capacity - 1)]
    continuations[:, :count] = np.where(inside, gathered, -1)
    best = np.where(found[:, 0], best, 0)
    return torch.from_numpy(continuations).to(tokens.device), torch.from_numpy(best).to(
        tokens.device
    )


def append_rotary(
    q, k, v, cos, sin, k_cache, v_cache, prefix_lens, interleaved: bool
) -> torch.Tensor:
    """See ``ops.append_rotary``."""
    num_nodes = q.shape[2]
    slots = prefix_lens.long()[:, None] + torch.arange(num_nodes, device=q.device)
    rows = torch.arange(q.shape[0], device=q.device)[:, None]
    # Advanced indices around a slice come first: [B, N, Hkv, D].
    k_cache[rows, :, slots] = _rotate(k, cos, sin, interleaved).transpose(1, 2)
    v_cache[rows, :, slots] = v.transpose(1, 2)
    return _rotate(q, cos, sin, interleaved)


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """The first ``cos.shape[2]`` columns rotated in float32 or wider, then rounded once."""
    rotary_dim = cos.shape[2]
    turned = x[..., :rotary_dim].to(torch.promote_types(x.dtype, torch.float32))
    if interleaved:
        partner = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        partner = torch.cat([-second, first], -1)
    turned = turned * cos[:, None] + partner * sin[:, None]
    return torch.cat([turned.to(x.dtype), x[..., rotary_dim:]], -1)
